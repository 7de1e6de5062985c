//! The system's package managers: which one is here, what it calls MPI's parts, how it installs
//! them.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, bail};

use crate::mpi::Parts;
use crate::process::{self, Output};

/// How long an installation may take; a mirror that does not answer must not stop a test run for
/// ever.
const DEADLINE: Duration = Duration::from_secs(900);

/// One package manager.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Manager {
    /// Debian, Ubuntu.
    Apt,
    /// Fedora, Red Hat and its rebuilds.
    Dnf,
    /// openSUSE, SLES.
    Zypper,
    /// Arch.
    Pacman,
    /// Alpine.
    Apk,
}

impl Manager {
    const ALL: [Manager; 5] =
        [Manager::Apt, Manager::Dnf, Manager::Zypper, Manager::Pacman, Manager::Apk];

    /// The one this machine has.
    pub fn detect() -> Option<Manager> {
        Manager::ALL
            .into_iter()
            .find(|manager| process::find_program(manager.program(), &[]).is_some())
    }

    fn program(self) -> &'static str {
        match self {
            Manager::Apt => "apt-get",
            Manager::Dnf => "dnf",
            Manager::Zypper => "zypper",
            Manager::Pacman => "pacman",
            Manager::Apk => "apk",
        }
    }

    /// The packages that bring the missing parts.
    pub fn packages(self, parts: &Parts) -> Vec<&'static str> {
        let mpi: &[&str] = match self {
            Manager::Apt => &["libopenmpi-dev", "openmpi-bin"],
            Manager::Dnf => &["openmpi", "openmpi-devel"],
            Manager::Zypper => &["openmpi4", "openmpi4-devel"],
            Manager::Pacman => &["openmpi"],
            Manager::Apk => &["openmpi", "openmpi-dev"],
        };
        let clang: &[&str] = match self {
            Manager::Apt => &["libclang-dev"],
            Manager::Dnf | Manager::Zypper => &["clang-devel"],
            Manager::Pacman => &["clang"],
            Manager::Apk => &["clang-dev"],
        };
        let cc: &[&str] = match self {
            Manager::Apt => &["gcc", "libc6-dev"],
            Manager::Apk => &["gcc", "musl-dev"],
            _ => &["gcc"],
        };
        let mut packages = Vec::new();
        if parts.mpicc.is_none() || parts.mpirun.is_none() {
            packages.extend(mpi);
        }
        if parts.libclang.is_none() {
            packages.extend(clang);
        }
        if parts.cc.is_none() {
            packages.extend(cc);
        }
        packages
    }

    /// The commands that install `packages`, the refresh of the package lists first where they are
    /// missing.
    pub fn commands(self, packages: &[&str], lists_missing: bool) -> Vec<Vec<String>> {
        let install: &[&str] = match self {
            Manager::Apt => &["apt-get", "install", "-y", "--no-install-recommends"],
            Manager::Dnf => &["dnf", "install", "-y"],
            Manager::Zypper => &["zypper", "--non-interactive", "install"],
            Manager::Pacman => &["pacman", "-S", "--needed", "--noconfirm"],
            Manager::Apk => &["apk", "add"],
        };
        let update: &[&str] = match self {
            Manager::Apt => &["apt-get", "update"],
            Manager::Dnf => &["dnf", "makecache"],
            Manager::Zypper => &["zypper", "--non-interactive", "refresh"],
            Manager::Pacman => &["pacman", "-Sy"],
            Manager::Apk => &["apk", "update"],
        };
        let owned = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let mut commands = Vec::new();
        if lists_missing {
            commands.push(owned(update));
        }
        commands.push(owned(&[install, packages].concat()));
        commands
    }

    /// Whether this machine has never fetched the manager's package lists (as in most container
    /// images).
    pub fn lists_missing(self) -> bool {
        let (folder, suffix) = match self {
            Manager::Apt => ("/var/lib/apt/lists", "_Packages"),
            Manager::Pacman => ("/var/lib/pacman/sync", ".db"),
            Manager::Apk => ("/var/cache/apk", ".tar.gz"),
            // These two refresh by themselves.
            Manager::Dnf | Manager::Zypper => return false,
        };
        // Apt's lists may be stored compressed: InRelease_Packages.lz4.
        let present = |name: &str| name.contains(suffix);
        !std::fs::read_dir(folder).is_ok_and(|mut entries| {
            entries.any(|entry| entry.is_ok_and(|e| present(&e.file_name().to_string_lossy())))
        })
    }
}

/// What lets this user install packages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Right {
    /// It is root.
    Root,
    /// `sudo` asks for no password.
    Sudo,
    /// Nothing; a person has to run the command.
    Missing,
}

impl Right {
    /// Finds out, without ever asking for a password.
    pub fn detect() -> Right {
        if rustix::process::geteuid().is_root() {
            return Right::Root;
        }
        let sudo = Command::new("sudo")
            .args(["-n", "true"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if sudo.is_ok_and(|status| status.success()) { Right::Sudo } else { Right::Missing }
    }
}

/// One shell line for a person to run.
pub fn shell_line(commands: &[Vec<String>], right: Right) -> String {
    let prefix = if right == Right::Root { "" } else { "sudo " };
    commands
        .iter()
        .map(|words| format!("{prefix}{}", words.join(" ")))
        .collect::<Vec<_>>()
        .join(" && ")
}

/// Runs the commands one after the other, showing them and what they print.
pub fn install(commands: &[Vec<String>], right: Right) -> Result<()> {
    for words in commands {
        let mut words = words.clone();
        if right == Right::Sudo {
            // Variables of this process do not pass sudo; env on its far side sets them.
            words.splice(
                0..0,
                ["sudo", "-n", "env", "DEBIAN_FRONTEND=noninteractive"].map(str::to_owned),
            );
        }
        eprintln!("setup: running {}", words.join(" "));
        let mut command = Command::new(&words[0]);
        command
            .args(&words[1..])
            .env("DEBIAN_FRONTEND", "noninteractive")
            .current_dir(Path::new("/"));
        let finished = process::run(&mut command, DEADLINE, Output::Shown)?;
        if !finished.status.is_some_and(|status| status.success()) {
            bail!("{}: {}", words.join(" "), finished.reason());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_missing_is_installed() {
        let mut parts = Parts { cc: Some("/usr/bin/cc".into()), ..Parts::default() };
        assert_eq!(
            Manager::Apt.packages(&parts),
            ["libopenmpi-dev", "openmpi-bin", "libclang-dev"]
        );
        parts.mpicc = Some("/usr/bin/mpicc".into());
        parts.mpirun = Some("/usr/bin/mpirun".into());
        assert_eq!(Manager::Dnf.packages(&parts), ["clang-devel"]);
        parts.libclang = Some("/usr/lib/libclang.so".into());
        for manager in Manager::ALL {
            assert!(manager.packages(&parts).is_empty(), "{manager:?}");
        }
    }

    #[test]
    fn lists_are_fetched_first_where_they_are_missing() {
        let commands = Manager::Apt.commands(&["libclang-dev"], true);
        assert_eq!(
            shell_line(&commands, Right::Missing),
            "sudo apt-get update && sudo apt-get install -y --no-install-recommends libclang-dev"
        );
        let commands = Manager::Pacman.commands(&["clang"], false);
        assert_eq!(shell_line(&commands, Right::Root), "pacman -S --needed --noconfirm clang");
    }

    #[test]
    fn a_failing_package_manager_is_an_error() {
        let failing = vec![vec!["false".to_owned()], vec!["true".to_owned()]];
        let error = install(&failing, Right::Root).unwrap_err().to_string();
        assert!(error.starts_with("false: exit status: 1"), "{error}");
        install(&failing[1..], Right::Root).unwrap();
    }
}
