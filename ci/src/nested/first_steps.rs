//! The first steps of docs/vmm.md for the emulated machine: what they make, and the commands that follow.
//!
//! What is made is made by the page's own commands, once for their text, and kept; a run that was interrupted leaves nothing that
//! counts. The scenario `newcomer` runs the rest (`first-steps.bash`).
use super::document::{self, Steps};
use crate::process;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The page.
pub const PAGE: &str = include_str!("../../../docs/vmm.md");
/// Files the page's `make` leaves for the steps that follow.
const MADE: [&str; 3] = ["vmlinuz", "initrd.img", "disk.img"];
/// Where they are in the emulated machine, and the steps.
const INSIDE: &str = "/first-steps";
/// Says which text made the files, when all are there.
const DONE: &str = "made.sh";

/// Files (path here, path inside) and texts (path inside, what is in them).
pub struct Parts {
    /// What was made.
    pub files: Vec<(PathBuf, String)>,
    /// The steps, `NN.run`, `NN.type`, `NN.shows` (a pattern), and who runs them.
    pub texts: Vec<(String, String)>,
}

/// Makes what is not in `cache` yet.
pub fn parts(cache: &Path) -> Result<Parts> {
    let steps = document::steps(PAGE).context("docs/vmm.md")?;
    let made = make(&steps.make, &cache.join("first-steps")).context("the first steps of docs/vmm.md")?;
    let files = MADE.map(|name| (made.join(name), format!("{INSIDE}/{name}"))).to_vec();
    Ok(Parts { files, texts: texts(&steps) })
}

fn texts(steps: &Steps) -> Vec<(String, String)> {
    let mut texts = vec![(format!("{INSIDE}/run.bash"), include_str!("first-steps.bash").into())];
    for (i, step) in steps.run.iter().enumerate() {
        let mut add = |kind: &str, text: String| texts.push((format!("{INSIDE}/{i:02}.{kind}"), text));
        add("run", step.run.clone());
        step.typed.iter().for_each(|typed| add("type", typed.clone()));
        step.shows.iter().for_each(|shows| add("shows", document::pattern(shows)));
    }
    texts
}

fn make(commands: &str, dir: &Path) -> Result<PathBuf> {
    let done = dir.join(DONE);
    if std::fs::read_to_string(&done).is_ok_and(|made_by| made_by == commands) {
        return Ok(dir.to_owned());
    }
    if bash(commands, dir).is_err() {
        // No package lists, or old ones.
        process::run(Command::new("apt-get").args(["-q", "update"]))?;
        bash(commands, dir)?;
    }
    std::fs::write(&done, commands)?;
    Ok(dir.to_owned())
}

/// Runs the commands in a directory made anew.
fn bash(commands: &str, dir: &Path) -> Result<()> {
    if dir.exists() {
        std::fs::remove_dir_all(dir)?;
    }
    std::fs::create_dir_all(dir)?;
    process::run(Command::new("bash").args(["-e", "-o", "pipefail", "-c", commands]).current_dir(dir))
}
