//! Who may use whom: the arrows of the design, and nothing beside them.

use std::fs;
use std::path::Path;

use super::Finding;
use crate::workspace::Package;

/// Each crate of the design, existing or planned, and what it may use of this workspace, lowest
/// first.
const MAY_USE: [(&str, &[&str]); 13] = [
    ("simd-kernels", &[]),
    ("tensor", &[]),
    ("comm", &[]),
    ("checkpoint", &["tensor"]),
    ("ops", &["simd-kernels", "tensor", "comm"]),
    ("qwen3-model", &["ops", "checkpoint", "tensor", "comm"]),
    ("qwen3-text", &[]),
    ("ranks", &["comm"]),
    ("planner", &["qwen3-model"]),
    ("engine", &["qwen3-model", "ranks"]),
    ("qwen3-server", &["engine", "qwen3-text"]),
    ("qwen3-cli", &["qwen3-server", "planner", "engine", "ranks", "qwen3-text", "qwen3-model"]),
    ("xtask", &[]),
];

/// Packages that measure; they may use every crate, and no one may use them.
const BENCHES: &str = "benches";

/// Checks every dependency between packages of the workspace, and that each crate has a README and
/// the workspace's lints.
pub fn check(root: &Path, packages: &[Package]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for package in packages {
        let folder = package.folder.strip_prefix(root).unwrap_or(&package.folder);
        let mut find = |text: String| {
            findings.push(Finding { file: folder.join("Cargo.toml"), line: 0, text });
        };
        let rule = MAY_USE.iter().find(|(name, _)| *name == package.name);
        if rule.is_none() && package.name != BENCHES {
            find(format!(
                "{} is no crate of the design; docs/architecture.md and this check list them all",
                package.name
            ));
        }
        if folder.starts_with("crates") && !package.folder.join("README.md").is_file() {
            find(format!("{} has no README.md", package.name));
        }
        if rule.is_some() && folder.starts_with("crates") {
            for licence in ["LICENSE-MIT", "LICENSE-APACHE"] {
                if !package.folder.join(licence).is_file() {
                    find(format!(
                        "{} has no {licence} (a link to the one in the root)",
                        package.name
                    ));
                }
            }
        }
        // The lints, among which is the one that refuses unsafe code.
        let manifest = fs::read_to_string(package.folder.join("Cargo.toml")).unwrap_or_default();
        if !manifest.contains("[lints]\nworkspace = true\n") {
            find(format!(
                "{} has not the workspace's lints: [lints] workspace = true",
                package.name
            ));
        }
        for dependency in &package.dependencies {
            let name = dependency.name.as_str();
            if !packages.iter().any(|other| other.name == name) {
                continue;
            }
            if name == BENCHES || name == "xtask" {
                find(format!("{} uses {name}, which nothing may use", package.name));
            } else if let Some((_, allowed)) = rule
                && !allowed.contains(&name)
                // Tests above the leaves may reach further down, e.g. to build inputs; leaves stay
                // alone in tests too.
                && !(dependency.dev && is_below(name, &package.name) && !allowed.is_empty())
            {
                find(format!("{} may not use {name}, only: {}", package.name, list(allowed)));
            }
        }
    }
    findings
}

fn is_below(lower: &str, upper: &str) -> bool {
    let level = |name: &str| MAY_USE.iter().position(|(known, _)| *known == name);
    level(lower) < level(upper)
}

fn list(names: &[&str]) -> String {
    if names.is_empty() { "no crate of the workspace".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::super::trees::{findings, manifest};

    #[test]
    fn a_leaf_that_uses_a_leaf() {
        let kernels = ("crates/simd-kernels/Cargo.toml", &*manifest("simd-kernels"));
        let rest = [
            ("crates/simd-kernels/src/lib.rs", "//! K.\n"),
            ("crates/simd-kernels/README.md", "K\n"),
            ("crates/simd-kernels/LICENSE-MIT", ""),
            ("crates/simd-kernels/LICENSE-APACHE", ""),
        ];
        let documents = [
            ("README.md", "`comm` `ops` `simd-kernels`\n"),
            ("docs/architecture.md", "`comm` `ops` `simd-kernels`\n"),
        ];
        for section in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let comm = manifest("comm")
                + &format!("[{section}]\nsimd-kernels.path = \"../simd-kernels\"\n");
            let comm = [("crates/comm/Cargo.toml", &*comm)];
            let text = findings(&[&[kernels], &rest[..], &documents, &comm].concat());
            assert_eq!(
                text,
                "crates/comm/Cargo.toml: comm may not use simd-kernels, only: no crate of the workspace",
                "{section}"
            );
        }
    }

    #[test]
    fn a_crate_without_the_lints() {
        let comm = manifest("comm").replace("workspace = true", "");
        assert!(
            findings(&[("crates/comm/Cargo.toml", &comm)])
                .contains("comm has not the workspace's lints")
        );
    }

    #[test]
    fn a_crate_without_its_licences() {
        let kernels = [
            ("crates/simd-kernels/Cargo.toml", &*manifest("simd-kernels")),
            ("crates/simd-kernels/src/lib.rs", "//! K.\n"),
            ("crates/simd-kernels/LICENSE-MIT", ""),
        ];
        assert!(findings(&kernels).contains("simd-kernels has no LICENSE-APACHE"));
    }

    #[test]
    fn an_arrow_that_points_up() {
        let ops = ("crates/ops/Cargo.toml", &*manifest("ops"));
        let comm = manifest("comm") + "[dependencies]\nops.path = \"../ops\"\n";
        let text = findings(&[ops, ("crates/comm/Cargo.toml", &comm)]);
        assert!(text.contains("comm may not use ops"), "{text}");
    }

    #[test]
    fn a_use_of_the_benches() {
        let benches = manifest("benches");
        let ops = manifest("ops") + "[dependencies]\nbenches.path = \"../benches\"\n";
        let text = findings(&[
            ("crates/benches/Cargo.toml", &*benches),
            ("crates/benches/src/lib.rs", "//! B.\n"),
            ("crates/benches/README.md", "B\n"),
            ("README.md", "`comm` `ops` `benches`\n"),
            ("docs/architecture.md", "`comm` `ops` `benches`\n"),
            ("crates/ops/Cargo.toml", &*ops),
        ]);
        assert_eq!(text, "crates/ops/Cargo.toml: ops uses benches, which nothing may use");
    }

    #[test]
    fn a_crate_that_the_design_does_not_know() {
        let text = findings(&[
            ("crates/helpers/Cargo.toml", &*manifest("helpers")),
            ("crates/helpers/src/lib.rs", "//! H.\n"),
            ("README.md", "`comm` `ops` `helpers`\n"),
            ("docs/architecture.md", "`comm` `ops` `helpers`\n"),
        ]);
        assert!(text.contains("helpers is no crate of the design"), "{text}");
        assert!(text.contains("helpers has no README.md"), "{text}");
    }
}
