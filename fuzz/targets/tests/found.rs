//! What the targets have found, so that it stays found.

fn feed(target: &str, input: &[u8]) {
    fuzz_targets::target(target).unwrap_or_else(|| panic!("no target {target}")).feed(input);
}

/// The mistake had no field.
#[test]
fn a_field_without_a_name() {
    feed("config_json", br#"{"image":"x","":"n"}"#);
}
