//! The N-module image: the network half of a storage node.
fn main() {}
