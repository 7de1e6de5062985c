//! Rules of single Rust files: how they open, how long they are, how they are named, and that all their tests run.

use std::path::Path;

use super::Finding;

/// Longer files hold more than one idea.
const MAX_LINES: usize = 450;

/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 6] = ["util", "utils", "common", "prelude", "types", "helpers"];

/// Where unsafe code may be allowed, which the compiler refuses otherwise.
const UNSAFE: [&str; 3] = ["crates/comm/src/lib.rs", "crates/simd-kernels/src/lib.rs", "crates/tensor/src/lib.rs"];

/// Checks one file; `file` is relative to the root.
pub fn check(file: &Path, source: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |line: usize, text: String| findings.push(Finding { file: file.to_path_buf(), line, text });

    if !source.starts_with("//!") {
        find(1, "the first line is no `//!` line that says what the file is".to_owned());
    }
    let lines = source.lines().count();
    if lines > MAX_LINES {
        find(0, format!("{lines} lines; a file holds one idea in at most {MAX_LINES}"));
    }
    let name = file.to_str().unwrap_or_default();
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    if EMPTY_NAMES.contains(&stem.as_ref()) {
        find(0, format!("a file named {stem} says nothing about what is in it"));
    }
    for (index, line) in source.lines().enumerate() {
        let line = line.trim_start();
        // rustfmt gives an attribute a line of its own.
        if line.starts_with("#[ignore") {
            find(index + 1, "an ignored test tests nothing".to_owned());
        }
        if line.trim_start_matches(['#', '!', '[']).starts_with("allow(unsafe_code") && !UNSAFE.contains(&name) {
            find(index + 1, format!("unsafe code may be allowed in {} only", UNSAFE.join(", ")));
        }
        let comment = line.strip_prefix("///").or_else(|| line.strip_prefix("//!"));
        let info = comment.and_then(|text| text.trim_start().strip_prefix("```"));
        if info.is_some_and(|info| info.split(',').any(|word| word.trim() == "ignore")) {
            find(index + 1, "an ignored example is never compiled".to_owned());
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(file: &str, source: &str) -> Vec<String> {
        check(Path::new(file), source).iter().map(ToString::to_string).collect()
    }

    fn one(file: &str, source: &str) -> String {
        let texts = texts(file, source);
        assert_eq!(texts.len(), 1, "{texts:?}");
        texts[0].clone()
    }

    #[test]
    fn the_opening_line() {
        assert!(one("crates/ops/src/lib.rs", "// No doc comment.\n").contains(":1: the first line"));
        assert!(one("crates/ops/src/lib.rs", "").contains("the first line"));
        assert!(texts("crates/ops/src/lib.rs", "//! Fine.\n").is_empty());
    }

    #[test]
    fn the_length() {
        let lines = |n: usize| format!("//! Long.\n{}", "\n".repeat(n - 1));
        assert!(texts("a/b.rs", &lines(450)).is_empty());
        assert!(one("a/b.rs", &lines(451)).contains("451 lines"));
    }

    #[test]
    fn the_name() {
        assert!(one("crates/ops/src/util.rs", "//! Things.\n").contains("named util"));
        assert!(texts("crates/ops/src/utility_of_heads.rs", "//! Things.\n").is_empty());
    }

    #[test]
    fn unsafe_code() {
        for source in ["//! X.\n#[allow(unsafe_code)]\nmod a;\n", "//! X.\n#![allow(unsafe_code, reason = \"\")]\n"] {
            assert!(one("crates/ops/src/lib.rs", source).contains(":2: unsafe code may be allowed in crates/comm"));
            assert!(texts("crates/tensor/src/lib.rs", source).is_empty());
        }
    }

    #[test]
    fn tests_and_examples_that_never_run() {
        assert!(one("a/b.rs", "//! X.\n#[test]\n#[ignore = \"slow\"]\nfn f() {}\n").contains(":3: an ignored test"));
        assert!(
            one("a/b.rs", "//! X.\n/// ```ignore\n/// f();\n/// ```\nfn f() {}\n").contains(":2: an ignored example")
        );
        let fine = "//! #[ignore]\n/// ```no_run\n/// ```\nfn g(ignore: u8) {}\n";
        assert!(texts("a/b.rs", fine).is_empty());
    }
}
