use crate::one_at_a_time;
use xtask::artifacts::Artifacts;
use xtask::nested;

#[test]
fn both_modules_serve_and_the_nmodule_is_ported_on_amd_v() {
    let _one = one_at_a_time();
    let console = nested::run(&Artifacts::find().unwrap()).unwrap();
    assert!(console.contains("NESTED: ported"), "{console}");
}
