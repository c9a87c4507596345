//! The list of scenarios. A new one is a script in `scenarios/` and an entry here.

/// Something that must hold for a Linux guest of ours.
#[derive(Debug)]
pub struct Scenario {
    /// What it is called in reports and on the command line.
    pub name: &'static str,
    /// The shell script.
    pub script: &'static str,
    /// About how long it takes on an idle machine, in seconds: the share of a machine is made up by this.
    pub seconds: u32,
    /// Whether both module images are needed.
    pub images: bool,
    /// Whether what docs/vmm.md makes in its first steps is needed.
    pub first_steps: bool,
}

impl Scenario {
    /// When it is given up: emulation on a busy machine is many times slower than on an idle one.
    pub fn limit_seconds(&self) -> u32 {
        60 + 6 * self.seconds
    }
}

macro_rules! scenario {
    ($name:literal, $seconds:literal) => {
        Scenario {
            name: $name,
            script: include_str!(concat!("scenarios/", $name, ".sh")),
            seconds: $seconds,
            images: false,
            first_steps: false,
        }
    };
}

/// All scenarios.
pub const ALL: &[Scenario] = &[
    scenario!("pvh", 8),
    scenario!("boot", 10),
    scenario!("disk", 30),
    scenario!("net", 20),
    scenario!("vhost_net", 45),
    scenario!("smp", 25),
    scenario!("power", 40),
    scenario!("devices", 30),
    scenario!("console", 15),
    scenario!("vhost_user", 40),
    scenario!("checkpoint", 50),
    scenario!("migrate", 40),
    scenario!("migrate_disk", 40),
    Scenario { images: true, ..scenario!("modules", 20) },
    Scenario { first_steps: true, ..scenario!("newcomer", 30) },
];

/// Scripts in the guest's `/jobs`: run by the word `or.job=NAME` of its command line, or by `guest "sh /jobs/NAME"`.
pub const JOBS: &[(&str, &str)] = &[
    ("poweroff", include_str!("jobs/poweroff")),
    ("fill", include_str!("jobs/fill")),
    ("check", include_str!("jobs/check")),
    ("diskwork", include_str!("jobs/diskwork")),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_fit_for_a_shell() {
        for (i, scenario) in ALL.iter().enumerate() {
            assert!(scenario.name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'), "{}", scenario.name);
            assert!(ALL[..i].iter().all(|s| s.name != scenario.name), "{}", scenario.name);
            assert_ne!(scenario.name, "shell");
        }
    }

    #[test]
    fn every_script_says_first_what_must_hold() {
        for scenario in ALL {
            assert!(scenario.script.starts_with("# "), "{}", scenario.name);
        }
    }
}
