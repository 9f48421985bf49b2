//! Placeholder until its module lands.

fn main() {}
