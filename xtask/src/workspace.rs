//! The workspace as cargo sees it: its root, its packages, and what a build made.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The repository's root folder.
pub fn root() -> PathBuf {
    // Cargo sets the variable at run time too; the compiled-in path serves a program started by
    // hand.
    let here = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    here.parent().map_or(here.clone(), Path::to_path_buf)
}

/// A cargo command in the repository's root.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// One package of the workspace.
#[derive(Debug)]
pub struct Package {
    /// Name, as in its manifest.
    pub name: String,
    /// Folder of its manifest.
    pub folder: PathBuf,
    /// What it depends on, by package name.
    pub dependencies: Vec<Dependency>,
    /// Names of its features.
    pub features: Vec<String>,
}

/// One line of a manifest's dependencies.
#[derive(Debug)]
pub struct Dependency {
    /// The package depended on.
    pub name: String,
    /// Only for tests, examples and benches.
    pub dev: bool,
}

/// The packages of the workspace in `root`, sorted by name.
pub fn packages(root: &Path) -> Result<Vec<Package>> {
    let mut command = cargo();
    command.current_dir(root).args(["metadata", "--no-deps", "--format-version", "1"]);
    let output = command.stderr(Stdio::piped()).output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!(
            "cargo metadata in {}: {}",
            root.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let metadata: Value =
        serde_json::from_slice(&output.stdout).context("cargo metadata printed no JSON")?;
    let mut packages: Vec<Package> =
        array(&metadata["packages"]).map(package).collect::<Result<_>>()?;
    packages.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(packages)
}

fn package(value: &Value) -> Result<Package> {
    let manifest = PathBuf::from(text(&value["manifest_path"])?);
    let dependencies = array(&value["dependencies"])
        .map(|d| Ok(Dependency { name: text(&d["name"])?.to_owned(), dev: d["kind"] == "dev" }))
        .collect::<Result<_>>()?;
    Ok(Package {
        name: text(&value["name"])?.to_owned(),
        folder: manifest.parent().map(Path::to_path_buf).unwrap_or_default(),
        dependencies,
        features: value["features"]
            .as_object()
            .map(|f| f.keys().cloned().collect())
            .unwrap_or_default(),
    })
}

/// The arguments that build every package that has one with its feature `mpi`.
pub fn mpi_features(packages: &[Package]) -> Option<String> {
    let names: Vec<String> = packages
        .iter()
        .filter(|p| p.features.iter().any(|f| f == "mpi"))
        .map(|p| format!("{}/mpi", p.name))
        .collect();
    (!names.is_empty()).then(|| names.join(","))
}

/// One executable that a build made.
pub struct Executable {
    /// Folder of the package it belongs to.
    pub package: PathBuf,
    /// Name of the cargo target: the program's or the test's.
    pub target: String,
    /// The file.
    pub path: PathBuf,
}

/// Runs a cargo build command (its progress and errors are shown) and returns the executables it
/// made or found fresh.
pub fn build(command: &mut Command) -> Result<Vec<Executable>> {
    let output = command
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start cargo")?;
    if !output.status.success() {
        bail!("the build failed ({})", output.status);
    }
    let mut executables = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        if let (Some(path), Some(manifest)) =
            (message["executable"].as_str(), message["manifest_path"].as_str())
        {
            executables.push(Executable {
                package: Path::new(manifest).parent().map(Path::to_path_buf).unwrap_or_default(),
                target: text(&message["target"]["name"])?.to_owned(),
                path: path.into(),
            });
        }
    }
    Ok(executables)
}

fn array(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> Result<&str> {
    value.as_str().with_context(|| format!("cargo's JSON has {value} where a string should be"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_workspace_is_read() {
        let packages = packages(&root()).unwrap();
        let xtask = packages.iter().find(|p| p.name == "xtask").unwrap();
        assert_eq!(xtask.folder, root().join("xtask"));
        assert!(xtask.dependencies.iter().any(|d| d.name == "clap" && !d.dev));
        let checkpoint = packages.iter().find(|p| p.name == "checkpoint").unwrap();
        assert!(checkpoint.dependencies.iter().any(|d| d.name == "tempfile" && d.dev));
        let comm = packages.iter().find(|p| p.name == "comm").unwrap();
        assert!(comm.features.iter().any(|f| f == "mpi"));
        assert!(mpi_features(&packages).unwrap().contains("comm/mpi"));
    }
}
