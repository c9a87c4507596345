//! Hands the link arguments of a bare-metal image to the crates that depend on this one.
//!
//! All the wiring of an image is *link* arguments, so a plain `cargo build -p guest-nmodule --profile guest` needs
//! no RUSTFLAGS, no cargo configuration and no target of our own. An image's build.rs only repeats them:
//!
//! ```ignore
//! for arg in std::env::var("DEP_OUTRIGGER_GUEST_LINK_ARGS").expect("guest-rt").split_terminator(';') {
//!     println!("cargo::rustc-link-arg-bins={arg}");
//! }
//! ```
fn main() {
    // A bin of a hosted build is an ordinary program.
    if std::env::var_os("CARGO_FEATURE_HOSTED").is_some() {
        println!("cargo::metadata=LINK_ARGS=");
        return;
    }
    let dir = std::env::var("CARGO_MANIFEST_DIR").expect("set by cargo");
    let script = format!("{dir}/link/guest.ld");
    println!("cargo::rerun-if-changed={script}");
    println!("cargo::rerun-if-changed=build.rs");
    let args = [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        // rustc passes -pie before; the later option wins. The image is linked at fixed addresses.
        "-no-pie",
        &format!("-Wl,-T,{script}"),
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,-z,max-page-size=4096",
        "-Wl,-z,noexecstack",
        "-Wl,--no-dynamic-linker",
        // A section the script does not place would land anywhere: an error instead.
        "-Wl,--orphan-handling=error",
    ];
    println!("cargo::metadata=LINK_ARGS={}", args.join(";"));
}
