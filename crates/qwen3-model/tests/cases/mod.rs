//! The reference cases of `tests/data`.

use std::path::{Path, PathBuf};

/// Their names, the mixture of experts last.
pub const CASES: [&str; 6] = [
    "dense-tied-bf16",
    "dense-untied-f32",
    "dense-uneven-bf16",
    "dense-sharded-f16",
    "dense-yarn-bf16",
    "moe-bf16",
];

/// The checkpoint and the answers of a case: in `tests/data`, or beside the workspace.
pub fn folder(case: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let own = root.join("tests/data").join(case);
    if own.is_dir() { own } else { root.join("../../../shared/oracle").join(case) }
}
