//! The records in a directory: a file `owners`, replaced as a whole with each change, and a file `lock` that one process has.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use fabric::owner::{OwnerChange, OwnerTable};

use super::image::{IMAGE_MAX, decode, encode};
use crate::error::{Error, Result, host};

const FILE: &str = "owners";
/// What is to become the file.
const NEXT: &str = "owners.next";
const LOCK: &str = "lock";

/// See the module. While it lives nobody else has the directory.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    directory: File,
    table: OwnerTable,
    _lock: File,
}

impl Store {
    /// Takes a directory, which is made if it is not there, and reads what is in it.
    pub fn open(path: &Path) -> Result<Store> {
        std::fs::create_dir_all(path).map_err(host(format!("directory {}", path.display())))?;
        let directory = File::open(path).map_err(host(format!("directory {}", path.display())))?;
        let place = path.join(LOCK);
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&place);
        let lock = lock.map_err(host(place.display().to_string()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Conflict(format!(
                    "{}: another process keeps the records in this directory",
                    path.display()
                )));
            }
            Err(TryLockError::Error(e)) => return Err(host(place.display().to_string())(e)),
        }
        let table = read(&path.join(FILE))?;
        Ok(Store { path: path.into(), directory, table, _lock: lock })
    }

    /// The records, as they are on the disk.
    pub fn table(&self) -> &OwnerTable {
        &self.table
    }

    /// Makes a change durable. After an error the disk has the former table or the new one.
    pub fn write(&mut self, change: &OwnerChange) -> Result<()> {
        let mut table = self.table.clone();
        table.apply(change);
        let (next, file) = (self.path.join(NEXT), self.path.join(FILE));
        let failed = || host(next.display().to_string());
        let mut written = File::create(&next).map_err(failed())?;
        written.write_all(&encode(&table)).map_err(failed())?;
        written.sync_all().map_err(failed())?;
        std::fs::rename(&next, &file).map_err(host(file.display().to_string()))?;
        // The file holds it from here on, whether or not its name is durable: what is written next must be based on it.
        self.table = table;
        self.directory.sync_all().map_err(host(format!("directory {}", self.path.display())))
    }
}

fn read(path: &Path) -> Result<OwnerTable> {
    let mut bytes = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(IMAGE_MAX as u64 + 1).read_to_end(&mut bytes),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(OwnerTable::default()),
        Err(e) => Err(e),
    }
    .map_err(host(path.display().to_string()))?;
    decode(&bytes).map_err(|e| Error::State(format!("{}: {e}", path.display())))
}
