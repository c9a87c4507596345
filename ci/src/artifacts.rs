//! What is built before anything can run: the `vmm` binary and both module images.
use crate::process;
use anyhow::{Context, Result, bail};
use images::Images;
use std::path::{Path, PathBuf};

/// Paths of what was built.
#[derive(Clone, Debug)]
pub struct Artifacts {
    /// The workspace.
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
    /// The monitor.
    pub vmm: PathBuf,
    /// The module images.
    pub images: Images,
}

/// The workspace this program was built from.
pub fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new(".")).to_owned()
}

/// Directory for disk images, client files and downloads, below cargo's target directory: on a real disk, and not in the way.
pub fn data_dir() -> Result<PathBuf> {
    Ok(target_dir()?.join("lab"))
}

/// Cargo's target directory.
pub fn target_dir() -> Result<PathBuf> {
    Ok(images::target_dir(&workspace_root())?)
}

/// Builds the monitor alone.
pub fn build_vmm() -> Result<PathBuf> {
    let root = workspace_root();
    let mut cargo = images::cargo(&root);
    cargo.args(["build", "--locked", "--release", "--package", "vmm", "--bin", "vmm"]);
    process::run(&mut cargo).context("cannot build the vmm")?;
    Ok(target_dir()?.join("release/vmm"))
}

impl Artifacts {
    /// Builds everything; cargo shows the progress.
    pub fn build() -> Result<Self> {
        let root = workspace_root();
        build_vmm()?;
        images::build(&root, images::PROFILE).context("cannot build the module images")?;
        Self::find()
    }

    /// What [`Artifacts::build`] has built earlier.
    pub fn find() -> Result<Self> {
        let root = workspace_root();
        let target = images::target_dir(&root)?;
        let vmm = target.join("release/vmm");
        if !vmm.is_file() {
            bail!("{} is not built; `cargo xtask setup` does it", vmm.display());
        }
        let images = images::find(&root, images::PROFILE)?;
        Ok(Artifacts { root, target, vmm, images })
    }
}
