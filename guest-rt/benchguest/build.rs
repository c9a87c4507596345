//! Links the image by guest-rt's linker script.
fn main() {
    for arg in std::env::var("DEP_OUTRIGGER_GUEST_LINK_ARGS").expect("from guest-rt").split_terminator(';') {
        println!("cargo::rustc-link-arg-bins={arg}");
    }
}
