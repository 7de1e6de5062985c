//! `cargo xtask tidy`: the rules of the code that no compiler checks.
//!
//! Each rule is a function from the tree to findings; a finding names file, line and what to do.
//! The rules are tested on small bad trees, one for each thing they must catch.

mod documents;
mod layers;
mod modules;
mod sources;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::workspace;

/// One breach of a rule.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    /// The file, relative to the root.
    file: PathBuf,
    /// Its line, from 1; 0 for the file as a whole.
    line: usize,
    /// What is wrong.
    text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.file.display(), self.text),
            line => write!(f, "{}:{line}: {}", self.file.display(), self.text),
        }
    }
}

/// Checks this repository.
pub fn command() -> Result<ExitCode> {
    let findings = check(&workspace::root())?;
    for finding in &findings {
        println!("{finding}");
    }
    println!("tidy: {} findings", findings.len());
    Ok(if findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// All findings in the tree at `root`, sorted by file and line.
fn check(root: &Path) -> Result<Vec<Finding>> {
    let packages = workspace::packages(root)?;
    let files = files(root)?;
    let mut findings = layers::check(root, &packages);
    for file in files.iter().filter(|file| has_extension(file, "rs")) {
        let source = read(root, file)?;
        findings.extend(sources::check(file, &source));
        findings.extend(modules::check(root, file)?);
    }
    findings.extend(documents::check(root, &files, &packages)?);
    findings.sort();
    Ok(findings)
}

/// Every file below `root`, relative to it and sorted, without build outputs and what git keeps for
/// itself.
fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)
            .with_context(|| format!("cannot list {}", folder.display()))?
        {
            let entry = entry?;
            let (name, path) = (entry.file_name(), entry.path());
            if entry.file_type()?.is_dir() {
                if name != "target" && name != ".git" {
                    folders.push(path);
                }
            } else {
                found.push(path.strip_prefix(root).unwrap_or(&path).to_path_buf());
            }
        }
    }
    found.sort();
    Ok(found)
}

fn read(root: &Path, file: &Path) -> Result<String> {
    std::fs::read_to_string(root.join(file))
        .with_context(|| format!("cannot read {}", file.display()))
}

fn has_extension(file: &Path, extension: &str) -> bool {
    file.extension().is_some_and(|e| e == extension)
}

/// Small trees for the tests of the rules.
#[cfg(test)]
mod trees {
    /// A folder with these files.
    pub fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    /// The manifest of a package in which there is nothing to find.
    pub fn manifest(name: &str) -> String {
        format!("[package]\nname = \"{name}\"\nedition = \"2024\"\n[lints]\nworkspace = true\n")
    }

    /// A workspace of two of the real crates, in which there is nothing to find, with `changes`
    /// laid over it.
    pub fn workspace(changes: &[(&str, &str)]) -> tempfile::TempDir {
        let good = [
            (
                "Cargo.toml",
                "[workspace]\nresolver = \"3\"\nmembers = [\"crates/*\"]\n[workspace.lints]\n",
            ),
            ("README.md", "The crates are `comm` and `ops`.\n"),
            ("docs/architecture.md", "See `crates/comm` and `crates/ops`.\n"),
            ("crates/comm/Cargo.toml", &manifest("comm")),
            ("crates/comm/README.md", "# comm\n"),
            ("crates/comm/LICENSE-MIT", ""),
            ("crates/comm/LICENSE-APACHE", ""),
            ("crates/ops/LICENSE-MIT", ""),
            ("crates/ops/LICENSE-APACHE", ""),
            ("crates/comm/src/lib.rs", "//! Collectives.\n"),
            (
                "crates/ops/Cargo.toml",
                &(manifest("ops") + "[dependencies]\ncomm.path = \"../comm\"\n"),
            ),
            ("crates/ops/README.md", "# ops\n"),
            ("crates/ops/src/lib.rs", "//! Operations.\n"),
        ];
        // What comes later is written over what came before.
        tree(&[&good[..], changes].concat())
    }

    /// The findings of the whole check on such a workspace, one per line.
    pub fn findings(changes: &[(&str, &str)]) -> String {
        let root = workspace(changes);
        let findings = super::check(root.path()).unwrap();
        findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_good_tree_has_no_findings() {
        assert_eq!(trees::findings(&[]), "");
    }

    #[test]
    fn build_outputs_are_not_looked_at() {
        assert_eq!(trees::findings(&[("target/debug/build/x.rs", "fn main() {}")]), "");
    }

    #[test]
    fn findings_are_sorted_and_name_their_line() {
        let text = trees::findings(&[
            ("crates/ops/src/lib.rs", "//! Operations.\n#[test]\n#[ignore]\nfn f() {}\n"),
            ("crates/comm/src/lib.rs", "fn f() {}\n"),
        ]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        assert!(lines[0].starts_with("crates/comm/src/lib.rs:1: "), "{text}");
        assert!(lines[1].starts_with("crates/ops/src/lib.rs:3: "), "{text}");
    }
}
