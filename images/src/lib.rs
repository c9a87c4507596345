//! Builds and describes bootable images: both module images, the one that measures a VMM, and the Linux image of the nested test ([`linux`]).
//!
//! Always true: images are built by cargo runs of their own, one a module, so that neither the host's nor the other module's
//! features leak into an image; what comes out has been looked at ([`elf`]) before it is handed on.
#![forbid(unsafe_code)]

pub mod elf;
pub mod linux;

use std::path::{Path, PathBuf};
use std::process::Command;

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tool could not be started.
    #[error("cannot run {tool}: {source}")]
    Tool {
        /// The tool.
        tool: String,
        /// Why.
        source: std::io::Error,
    },
    /// A tool failed.
    #[error("{tool} failed: {message}")]
    Failed {
        /// The tool and its arguments.
        tool: String,
        /// What it said.
        message: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// An image is not what a VMM can boot.
    #[error("{path}: {message}")]
    Image {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A program of the nested test needs something that is not installed.
    #[error("{0} is not there; `cargo xtask setup` installs it")]
    Missing(String),
}

/// The module images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Images {
    /// The N-module.
    pub nmodule: PathBuf,
    /// The D-module.
    pub dmodule: PathBuf,
}

/// The cargo profile of the images.
pub const PROFILE: &str = "guest";

/// Builds both images of the workspace at `root` with `profile` (normally [`PROFILE`]) and checks them.
pub fn build(root: &Path, profile: &str) -> Result<Images, Error> {
    for package in ["guest-nmodule", "guest-dmodule"] {
        build_package(root, profile, package)?;
    }
    find(root, profile)
}

/// Builds the image that measures a VMM's devices, and checks it.
pub fn build_bench(root: &Path, profile: &str) -> Result<PathBuf, Error> {
    build_package(root, profile, BENCH_IMAGE)?;
    let image = target_dir(root)?.join(profile).join(BENCH_IMAGE);
    elf::check(&image)?;
    Ok(image)
}

/// Package and file name of the image that measures.
const BENCH_IMAGE: &str = "benchguest";

fn build_package(root: &Path, profile: &str, package: &str) -> Result<(), Error> {
    let mut cargo = cargo(root);
    cargo.args(["build", "--locked", "--profile", profile, "--package", package]);
    let status = cargo.status().map_err(|source| Error::Tool { tool: "cargo".into(), source })?;
    if !status.success() {
        let tool = format!("cargo build --profile {profile} -p {package}");
        return Err(Error::Failed { tool, message: status.to_string() });
    }
    Ok(())
}

/// The images [`build`] has made earlier, checked.
pub fn find(root: &Path, profile: &str) -> Result<Images, Error> {
    let target = target_dir(root)?.join(profile);
    let images = Images { nmodule: target.join("nmodule"), dmodule: target.join("dmodule") };
    for image in [&images.nmodule, &images.dmodule] {
        elf::check(image)?;
    }
    Ok(images)
}

/// A cargo for the workspace at `root`, without what an outer cargo has put into the environment for its own build.
pub fn cargo(root: &Path) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root);
    for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER", "CARGO_MAKEFLAGS", "MAKEFLAGS"] {
        command.env_remove(name);
    }
    command
}

/// Where cargo puts what it builds.
pub fn target_dir(root: &Path) -> Result<PathBuf, Error> {
    let mut cargo = cargo(root);
    cargo.args(["metadata", "--no-deps", "--offline", "--format-version", "1"]);
    let out = cargo.output().map_err(|source| Error::Tool { tool: "cargo".into(), source })?;
    let metadata: Option<serde_json::Value> = serde_json::from_slice(&out.stdout).ok();
    match metadata.as_ref().and_then(|m| m["target_directory"].as_str()) {
        Some(path) => Ok(path.into()),
        None => Err(Error::Failed {
            tool: "cargo metadata".into(),
            message: String::from_utf8_lossy(&out.stderr).trim().to_owned(),
        }),
    }
}
