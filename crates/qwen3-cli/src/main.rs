//! The program `qwen3`.
fn main() {}
