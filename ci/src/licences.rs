//! The licences of everything that is linked or used to build: each crate must offer one of those in deny.toml.
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::Path;

const DENY: &str = include_str!("../../deny.toml");

/// The allowed licences: the strings of the first `allow` list of deny.toml.
fn listed() -> impl Iterator<Item = &'static str> {
    let list = DENY.split_once("\nallow = [").and_then(|(_, rest)| rest.split_once(']')).map_or("", |(list, _)| list);
    // Between the quotes.
    list.split('"').skip(1).step_by(2)
}

/// Crates of which there must be one version: guest memory and KVM go through them.
const ONE_VERSION: [&str; 5] = ["kvm-bindings", "kvm-ioctls", "virtio-queue", "vm-memory", "vmm-sys-util"];

/// What is built and run here; only this platform's packages are sure to be on the machine.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";

/// Checks every package that a build for our platform uses, without the network; returns how many.
pub fn check(root: &Path) -> Result<usize> {
    let mut cargo = images::cargo(root);
    cargo.args(["metadata", "--locked", "--offline", "--format-version", "1", "--filter-platform", PLATFORM]);
    let metadata: Value = serde_json::from_str(&crate::process::succeed(&mut cargo)?)?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let mut refused = Vec::new();
    for package in packages {
        let licence = package["license"].as_str().unwrap_or("none given");
        if !allowed(licence) {
            refused.push(format!("{} {}: {licence}", package["name"], package["version"]));
        }
    }
    for name in ONE_VERSION {
        let versions = packages.iter().filter(|p| p["name"] == name).count();
        if versions != 1 {
            bail!("{versions} versions of {name} in Cargo.lock, and there must be one");
        }
    }
    if !refused.is_empty() {
        bail!("licences that are not on the list in deny.toml:\n  {}", refused.join("\n  "));
    }
    Ok(packages.len())
}

/// Whether an SPDX expression can be met with allowed licences: one side of an OR, both of an AND.
fn allowed(expression: &str) -> bool {
    // The slash is what older crates write for OR.
    let expression = expression.replace('/', " OR ");
    let spaced = expression.replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    any_of(&words, &mut at) && at == words.len()
}

fn any_of(words: &[&str], at: &mut usize) -> bool {
    let mut met = all_of(words, at);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        met |= all_of(words, at);
    }
    met
}

fn all_of(words: &[&str], at: &mut usize) -> bool {
    let mut met = licence(words, at);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        met &= licence(words, at);
    }
    met
}

fn licence(words: &[&str], at: &mut usize) -> bool {
    let Some(word) = words.get(*at) else { return false };
    *at += 1;
    if *word == "(" {
        let met = any_of(words, at);
        let closed = words.get(*at) == Some(&")");
        *at += 1;
        return met && closed;
    }
    if words.get(*at) == Some(&"WITH") {
        let exception = words.get(*at + 1).copied().unwrap_or("");
        *at += 2;
        let both = format!("{word} WITH {exception}");
        return listed().any(|l| l == both);
    }
    listed().any(|l| l == *word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_understood() {
        for good in [
            "MIT",
            "MIT/Apache-2.0",
            "MIT OR GPL-3.0",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception OR GPL-2.0",
        ] {
            assert!(allowed(good), "{good}");
        }
        for bad in
            ["GPL-3.0", "MIT AND GPL-3.0", "(MIT OR Apache-2.0", "", "none given", "Apache-2.0 WITH other", "MIT MIT"]
        {
            assert!(!allowed(bad), "{bad}");
        }
    }

    #[test]
    fn the_list_is_found() {
        assert!(listed().count() > 5);
        assert!(listed().all(|l| !l.is_empty() && !l.contains([',', '\n'])));
    }

    #[test]
    fn every_dependency_is_allowed() {
        assert!(check(&crate::artifacts::workspace_root()).unwrap() > 10);
    }
}
