//! The D-module image: the data half of a storage node.
fn main() {}
