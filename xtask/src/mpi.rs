//! The MPI of this machine: where its parts are, whose implementation it is, how its launcher is
//! called.
//!
//! Behaviour is asked for by environment variables rather than flags, since each implementation
//! ignores the other's variables but stops at the other's flags. A variable that the user has set
//! is left as it is.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::process::{self, Output};

/// Whose `mpirun` it is; flags differ.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Implementation {
    /// Open MPI, and what is derived from it.
    OpenMpi,
    /// MPICH and its descendants with the Hydra launcher (MVAPICH, Intel MPI).
    Hydra,
    /// A launcher that says neither; only `-n` is assumed.
    Other,
}

/// Whether the launcher ties ranks to cores.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Bind {
    /// Every rank may use every core (the program places its threads itself)
    None,
    /// One core per rank, for one thread per rank
    Core,
}

/// What a build and a launch with MPI need, each part where it was found.
#[derive(Clone, Debug, Default)]
pub struct Parts {
    /// The MPI compiler wrapper.
    pub mpicc: Option<PathBuf>,
    /// The launcher.
    pub mpirun: Option<PathBuf>,
    /// The library with which `bindgen` reads MPI's header.
    pub libclang: Option<PathBuf>,
    /// A C compiler, for the few lines of C between Rust and MPI's macros.
    pub cc: Option<PathBuf>,
}

impl Parts {
    /// Looks for every part, in `PATH` and in the places where distributions put them. `MPICC` and
    /// `MPIRUN` (paths of files, or names of programs) choose among several MPIs; what one of them
    /// names and is not there is missing, and said so.
    pub fn find() -> Parts {
        let cc = ["cc", "gcc", "clang"].iter().find_map(|name| process::find_program(name, &[]));
        let named = |variable: &str, usual: &str| {
            let find = |name: &str| process::find_program(name, &wrapper_folders());
            let chosen = std::env::var_os(variable).filter(|chosen| !chosen.is_empty());
            let Some(chosen) = chosen.map(PathBuf::from) else { return find(usual) };
            if chosen.is_file() {
                return Some(chosen);
            }
            let found = chosen.to_str().and_then(find);
            if found.is_none() {
                let shown = chosen.display();
                eprintln!(
                    "{variable} is '{shown}', expected the path of a file or the name of a program"
                );
            }
            found
        };
        Parts {
            mpicc: named("MPICC", "mpicc"),
            mpirun: named("MPIRUN", "mpirun"),
            libclang: find_libclang(),
            cc: std::env::var_os("CC").map(PathBuf::from).filter(|path| path.is_file()).or(cc),
        }
    }

    /// The parts with their names, in the order in which they are reported.
    pub fn named(&self) -> [(&'static str, Option<&Path>); 4] {
        [
            ("mpicc", self.mpicc.as_deref()),
            ("mpirun", self.mpirun.as_deref()),
            ("libclang", self.libclang.as_deref()),
            ("C compiler", self.cc.as_deref()),
        ]
    }
}

/// A usable MPI.
#[derive(Clone, Debug)]
pub struct Mpi {
    /// The compiler wrapper.
    pub mpicc: PathBuf,
    /// The launcher.
    pub mpirun: PathBuf,
    /// Whose launcher it is.
    pub implementation: Implementation,
    /// Name and version as the launcher gives them.
    pub version: String,
}

impl Mpi {
    /// The MPI made of these parts; an error if one is missing or the launcher does not start.
    pub fn from_parts(parts: &Parts) -> Result<Mpi> {
        let (Some(mpicc), Some(mpirun), Some(_), Some(_)) =
            (&parts.mpicc, &parts.mpirun, &parts.libclang, &parts.cc)
        else {
            bail!("MPI is not complete on this machine");
        };
        let mut command = Command::new(mpirun);
        let asked =
            process::run(command.arg("--version"), Duration::from_secs(20), Output::Silent)?;
        if asked.status.is_none() {
            bail!("{} --version {}", mpirun.display(), asked.reason());
        }
        let (implementation, version) = recognize(&asked.stdout);
        Ok(Mpi { mpicc: mpicc.clone(), mpirun: mpirun.clone(), implementation, version })
    }

    /// Gives a build or a launch the environment it needs: the wrapper's folder on `PATH`, and the
    /// launcher's settings.
    pub fn prepare(&self, command: &mut Command, bind: Bind, oversubscribe: bool) {
        for (name, value) in environment(bind, oversubscribe) {
            if std::env::var_os(name).is_none() {
                command.env(name, value);
            }
        }
        command.env("MPICC", &self.mpicc).env("MPIRUN", &self.mpirun);
        // Ranks and build scripts find the rest of the installation (mpiexec, orted,
        // hydra_pmi_proxy) beside it.
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
        for folder in [self.mpirun.parent(), self.mpicc.parent()].into_iter().flatten() {
            if !folders.iter().any(|known| known == folder) {
                folders.push(folder.to_path_buf());
            }
        }
        if let Ok(path) = std::env::join_paths(folders) {
            command.env("PATH", path);
        }
    }

    /// `mpirun -n ranks program`, to which the program's arguments can be added.
    pub fn launcher(
        &self,
        ranks: usize,
        hostfile: Option<&Path>,
        bind: Bind,
        program: &OsStr,
    ) -> Command {
        let mut command = Command::new(&self.mpirun);
        command.args(flags(self.implementation, bind)).arg("-n").arg(ranks.to_string());
        if let Some(file) = hostfile {
            command
                .arg(if self.implementation == Implementation::Hydra { "-f" } else { "--hostfile" })
                .arg(file);
        }
        // With a hostfile its slots say how many ranks a host takes; without one, more ranks than
        // cores are meant.
        self.prepare(&mut command, bind, hostfile.is_none());
        command.arg(program);
        command
    }
}

fn recognize(answer: &str) -> (Implementation, String) {
    let first = answer.lines().next().unwrap_or_default();
    if let Some((_, version)) = first.split_once("(Open MPI)") {
        (Implementation::OpenMpi, format!("Open MPI {}", version.trim()))
    } else if first.contains("Open MPI") || first.contains("OpenRTE") || first.contains("PRRTE") {
        (Implementation::OpenMpi, first.trim().to_owned())
    } else if first.contains("Intel(R) MPI") {
        (Implementation::Hydra, first.trim().to_owned())
    } else if first.contains("HYDRA") {
        let version = answer
            .lines()
            .find_map(|line| line.trim().strip_prefix("Version:"))
            .unwrap_or_default();
        (Implementation::Hydra, format!("MPICH {}", version.trim()).trim().to_owned())
    } else {
        (
            Implementation::Other,
            if first.is_empty() { "MPI".to_owned() } else { first.trim().to_owned() },
        )
    }
}

/// What no environment variable asks for in every version.
fn flags(implementation: Implementation, bind: Bind) -> &'static [&'static str] {
    match (implementation, bind) {
        // The program prints its own one message; the launcher's twenty lines about it help nobody.
        (Implementation::OpenMpi, _) => &["--quiet"],
        (Implementation::Hydra, Bind::Core) => &["-bind-to", "core"],
        _ => &[],
    }
}

fn environment(bind: Bind, oversubscribe: bool) -> Vec<(&'static str, &'static str)> {
    let mut variables = vec![
        // Containers run as root; there is nothing of another user to protect there.
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("PRTE_ALLOW_RUN_AS_ROOT", "1"),
        ("PRTE_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        // No warning about network cards that are present and not used.
        ("OMPI_MCA_btl_base_warn_component_unused", "0"),
    ];
    let policy = if bind == Bind::None { "none" } else { "core" };
    // Open MPI 4 reads the first of each pair, Open MPI 5 (PRRTE) the second.
    variables.push(("OMPI_MCA_hwloc_base_binding_policy", policy));
    variables.push(("PRTE_MCA_hwloc_default_binding_policy", policy));
    if oversubscribe {
        variables.push(("OMPI_MCA_rmaps_base_oversubscribe", "1"));
        variables.push(("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"));
    }
    variables
}

/// Folders outside `PATH` where distributions keep an MPI that their `module load` would put there.
fn wrapper_folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = [
        "/usr/lib64/openmpi/bin",
        "/usr/lib64/mpich/bin",
        "/usr/lib/openmpi/bin",
        "/usr/local/bin",
        "/opt/homebrew/bin",
    ]
    .iter()
    .map(PathBuf::from)
    .collect();
    folders.extend(children("/usr/lib64/mpi/gcc").into_iter().map(|folder| folder.join("bin")));
    folders
}

/// Where `bindgen` will look, in the same order: `LIBCLANG_PATH`, then the library folders and two
/// levels below them.
fn find_libclang() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("LIBCLANG_PATH").map(PathBuf::from) {
        return if path.is_file() { Some(path) } else { library_in(&path) };
    }
    let mut level: Vec<PathBuf> = [
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/lib64",
        "/usr/local/lib",
        "/opt/homebrew/opt/llvm/lib",
    ]
    .iter()
    .map(PathBuf::from)
    .collect();
    for _ in 0..3 {
        if let Some(found) = level.iter().find_map(|folder| library_in(folder)) {
            return Some(found);
        }
        level = level.iter().flat_map(children).filter(|path| path.is_dir()).collect();
    }
    None
}

fn library_in(folder: &Path) -> Option<PathBuf> {
    children(folder).into_iter().find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        is_libclang(&name)
    })
}

fn is_libclang(name: &str) -> bool {
    let versioned = name.strip_prefix("libclang").is_some_and(|rest| rest.starts_with(['.', '-']));
    versioned && !name.contains("-cpp") && (name.contains(".so") || name.ends_with(".dylib"))
}

fn children(folder: impl AsRef<Path>) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launchers_are_told_apart_by_their_version_texts() {
        let open =
            "mpirun (Open MPI) 4.1.4\n\nReport bugs to http://www.open-mpi.org/community/help/\n";
        assert_eq!(recognize(open), (Implementation::OpenMpi, "Open MPI 4.1.4".to_owned()));
        let hydra = "HYDRA build details:\n    Version:                                 4.0.2\n    Release Date: x\n";
        assert_eq!(recognize(hydra), (Implementation::Hydra, "MPICH 4.0.2".to_owned()));
        let intel = "Intel(R) MPI Library for Linux* OS, Version 2021.11 Build 20231005\n";
        assert_eq!(recognize(intel).0, Implementation::Hydra);
        assert_eq!(recognize("").0, Implementation::Other);
    }

    #[test]
    fn only_the_c_interface_of_clang_counts() {
        for name in ["libclang.so", "libclang.so.1", "libclang-14.so.14.0.6", "libclang.dylib"] {
            assert!(is_libclang(name), "{name}");
        }
        for name in ["libclang-cpp.so.14", "libclangAST.a", "libclang.a", "libclangd.so", "libc.so"]
        {
            assert!(!is_libclang(name), "{name}");
        }
    }

    #[test]
    fn each_launcher_gets_flags_it_knows() {
        let mpi = |implementation| Mpi {
            mpicc: "/opt/x/bin/mpicc".into(),
            mpirun: "/opt/x/bin/mpirun".into(),
            implementation,
            version: String::new(),
        };
        let line = |implementation, bind| {
            let command =
                mpi(implementation).launcher(3, Some(Path::new("hosts")), bind, OsStr::new("prog"));
            command
                .get_args()
                .map(|a| a.to_string_lossy().into_owned())
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(line(Implementation::OpenMpi, Bind::Core), "--quiet -n 3 --hostfile hosts prog");
        assert_eq!(line(Implementation::Hydra, Bind::Core), "-bind-to core -n 3 -f hosts prog");
        assert_eq!(line(Implementation::Hydra, Bind::None), "-n 3 -f hosts prog");
    }

    #[test]
    fn slots_of_a_hostfile_are_respected() {
        let has =
            |variables: &[(&str, &str)]| variables.iter().any(|(name, _)| name.contains("rmaps"));
        assert!(has(&environment(Bind::None, true)));
        assert!(!has(&environment(Bind::None, false)));
    }
}
