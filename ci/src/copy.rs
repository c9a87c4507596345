//! Files of random bytes, copied in and out with Debian's `nfs-cp` (libnfs-utils), and their SHA-256.
use crate::lab::{BRIDGE, Host};
use crate::modules::{NFS, VOLUME};
use crate::process::{self, Daemon};
use crate::report::Progress;
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// A copy that has not ended by then has failed.
const COPY_LIMIT: Duration = Duration::from_secs(600);
const PIECE: usize = 4 << 20;

/// Writes `bytes` random bytes.
pub fn random_file(path: &Path, bytes: u64) -> Result<()> {
    let mut random = File::open("/dev/urandom")?;
    let mut file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    let mut piece = vec![0; PIECE];
    let mut left = bytes;
    while left > 0 {
        let n = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
        random.read_exact(&mut piece[..n])?;
        file.write_all(&piece[..n]).with_context(|| format!("cannot write {}", path.display()))?;
        left -= n as u64;
    }
    Ok(())
}

/// SHA-256 of a file, in hexadecimal.
pub fn sha256(path: &Path) -> Result<String> {
    let out = process::output(Command::new("sha256sum").arg(path))?;
    Ok(out.split_whitespace().next().context("sha256sum printed nothing")?.to_owned())
}

/// NFS URL of a file of the N-module.
pub fn url(file: &str) -> String {
    format!("nfs://{}/{VOLUME}/{file}", NFS.ip())
}

/// A copy under way.
pub struct Copy {
    daemon: Daemon,
    bytes: u64,
    counted_before: u64,
}

impl Copy {
    /// Starts `nfs-cp` on `host`; `bytes` is the size of the file.
    pub fn start(host: &Host, from: &str, to: &str, bytes: u64, log: &Path) -> Result<Self> {
        let mut command = Command::new("nfs-cp");
        let daemon = host.daemon("nfs-cp", command.args([from, to]), log)?;
        let counted_before = counted(daemon.pid());
        Ok(Copy { daemon, bytes, counted_before })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// Whether it still runs.
    pub fn runs(&mut self) -> Result<bool> {
        Ok(self.daemon.ended()?.is_none())
    }

    /// Bytes of the file copied so far, as the network shows it.
    pub fn copied(&self) -> u64 {
        counted(self.pid()).saturating_sub(self.counted_before).min(self.bytes)
    }

    /// How far it is, for people.
    pub fn how_far(&self) -> String {
        format!("{} of {} MiB", self.copied() >> 20, self.bytes >> 20)
    }

    /// Waits for its end, which must be a success.
    pub fn finish(mut self, progress: &mut Progress) -> Result<()> {
        let begin = Instant::now();
        let status = loop {
            if let Some(status) = self.daemon.ended()? {
                break status;
            }
            if begin.elapsed() > COPY_LIMIT {
                bail!("the copy has not ended after {COPY_LIMIT:?}");
            }
            progress.update(&self.how_far());
            std::thread::sleep(Duration::from_millis(5));
        };
        if !status.success() {
            bail!("nfs-cp ended with {status}{}", self.daemon.quote_log());
        }
        Ok(())
    }
}

/// Bytes through the host's interface, in the network of a process; 0 when the process is gone.
fn counted(pid: u32) -> u64 {
    let dev = std::fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap_or_default();
    crate::throughput::counters(&dev, BRIDGE).map_or(0, |(received, sent)| received + sent)
}
