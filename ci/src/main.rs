//! cargo xtask: set-up, lab, demo, tests, benchmarks.
fn main() {}
