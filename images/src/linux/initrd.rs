//! The initial RAM disk: a directory of what was asked for, packed by cpio, not compressed (unpacking costs more than
//! loading does).
use super::{Contents, Kernel, copy, create_dir, find_deep, kmod, remove_dir, run};
use crate::Error;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where Debian's busybox-static puts it.
const BUSYBOX: &str = "/bin/busybox";
/// Directories that are always there.
const DIRECTORIES: [&str; 7] = ["bin", "dev", "proc", "sys", "tmp", "run", "modules"];

/// Writes the initial RAM disk to `output`, by way of the directory `work`, which is made anew.
pub fn initrd(kernel: &Kernel, contents: &Contents, work: &Path, output: &Path) -> Result<(), Error> {
    if work.exists() {
        remove_dir(work)?;
    }
    for dir in DIRECTORIES {
        create_dir(&work.join(dir))?;
    }
    copy(Path::new(BUSYBOX), &work.join("bin/busybox"))?;
    for (from, to) in &contents.programs {
        copy(from, &work.join(to.trim_start_matches('/')))?;
    }
    for library in libraries(contents.programs.iter().map(|(from, _)| from.as_path()))? {
        copy(&library, &work.join(library.strip_prefix("/").unwrap_or(&library)))?;
    }
    for (from, to) in &contents.files {
        copy(from, &work.join(to.trim_start_matches('/')))?;
    }
    for (to, text) in &contents.texts {
        let path = work.join(to.trim_start_matches('/'));
        if let Some(parent) = path.parent() {
            create_dir(parent)?;
        }
        std::fs::write(&path, text).map_err(|source| Error::File { path, source })?;
    }
    for module in &contents.modules {
        let order = kmod::order(module, &mut |name| kernel_module(kernel, name))?;
        for (name, from) in &order {
            copy(from, &work.join("modules").join(format!("{name}.ko")))?;
        }
        let list: String = order.iter().map(|(name, _)| format!("{name}\n")).collect();
        let path = work.join("modules").join(format!("{module}.order"));
        std::fs::write(&path, list).map_err(|source| Error::File { path, source })?;
    }
    let init = work.join("init");
    std::fs::write(&init, &contents.init).map_err(|source| Error::File { path: init.clone(), source })?;
    run(Command::new("chmod").arg("0755").arg(&init))?;
    let file = std::fs::File::create(output).map_err(|source| Error::File { path: output.to_owned(), source })?;
    let mut pack = Command::new("sh");
    pack.args(["-c", "find . | cpio --quiet -o -H newc"]).current_dir(work).stdout(file);
    run(&mut pack)?;
    Ok(())
}

/// The file of a kernel module; the names in `depends` have `_` where the file's name may have `-`.
fn kernel_module(kernel: &Kernel, name: &str) -> Result<PathBuf, Error> {
    let wanted = name.replace('-', "_");
    let passes = |file: &str| file.strip_suffix(".ko").is_some_and(|stem| stem.replace('-', "_") == wanted);
    find_deep(&kernel.modules, &passes)?.ok_or_else(|| Error::Missing(format!("kernel module {name}")))
}

/// The shared libraries that programs load, with the dynamic linker.
fn libraries<'a>(programs: impl Iterator<Item = &'a Path>) -> Result<BTreeSet<PathBuf>, Error> {
    let mut all = BTreeSet::new();
    for program in programs {
        let list = run(Command::new("ldd").arg(program))?;
        // `name => /path (address)` or `/path (address)`.
        all.extend(list.split_whitespace().filter(|w| w.starts_with('/')).map(PathBuf::from));
    }
    Ok(all)
}
