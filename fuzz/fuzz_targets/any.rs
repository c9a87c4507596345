//! All programs of this package: each feeds the target it is named after.
#![no_main]

use std::sync::LazyLock;

use fuzz_targets::{Target, target};
use libfuzzer_sys::fuzz_target;

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = env!("CARGO_BIN_NAME");
    target(name).unwrap_or_else(|| panic!("no target {name}"))
});

fuzz_target!(|input: &[u8]| TARGET.feed(input));
