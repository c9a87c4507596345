//! Every target for a few rounds; `FUZZ_ROUNDS=n` for more.

use fuzz_targets::device::served;
use fuzz_targets::run::run;
use fuzz_targets::{TARGETS, Target};

const DEVICES: [&str; 5] = ["rng", "balloon", "blk", "vsock", "net"];

fn brief(name: &str) {
    let target = target(name);
    let before = served();
    run(target);
    let served = served() - before;
    assert!(!DEVICES.contains(&name) || served >= target.rounds / 4, "only {served} requests reach the device");
}

fn target(name: &str) -> &'static Target {
    fuzz_targets::target(name).unwrap_or_else(|| panic!("no target {name}"))
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            brief(stringify!($name));
        })*

        #[test]
        fn all_are_here_and_have_a_program() {
            let here = [$(stringify!($name)),*];
            let names: Vec<_> = TARGETS.iter().map(|t| t.name).collect();
            assert_eq!(here[..], names);
            let manifest = include_str!("../../Cargo.toml");
            for name in names {
                assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is missing in fuzz/Cargo.toml");
            }
        }
    };
}

targets!(api checkpoint config_json config_flags wire_frame wire_message wire_pages ticket rng balloon blk vsock net device_state);

#[test]
fn an_input_that_costs_too_much_is_a_finding() {
    let greedy = Target {
        name: "greedy",
        run: |input| drop(std::hint::black_box(vec![1u8; input.len() << 20])),
        seeds: Vec::new,
        memory: 2 << 20,
        rounds: 0,
    };
    greedy.feed(&[0; 1]);
    assert!(std::panic::catch_unwind(|| greedy.feed(&[0; 4])).is_err());
}
