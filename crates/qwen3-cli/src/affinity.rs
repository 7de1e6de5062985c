//! How many ranks share the cores that this process may use.

use std::path::Path;
use std::{env, fs, thread};

use qwen3_model::comm::{CommunicatorExt as _, digest};

use crate::failure::CliError;
use crate::rank::Rank;

/// This rank among those on the same cores of the same machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbours {
    /// How many of them come before this one.
    pub index: usize,
    /// How many there are, this one included.
    pub count: usize,
}

impl Neighbours {
    /// Asks the other ranks; all call this together.
    ///
    /// A launcher that binds each process to cores of its own leaves one; in-process ranks and
    /// unbound processes share.
    pub fn find(rank: &Rank) -> Result<Self, CliError> {
        let mine = digest(place(Path::new("/proc")).bytes().map(u64::from));
        let all = rank.comm().all_gather_one(mine)?;
        let same = |places: &[u64]| places.iter().filter(|&&place| place == mine).count();
        Ok(Self { index: same(&all[..rank.comm().rank()]), count: same(&all) })
    }

    /// The threads of this rank: those asked for, or its share of the cores. Rank 0 says so where
    /// these are suspiciously few.
    pub fn threads(self, rank: &Rank, asked: Option<u16>) -> usize {
        if let Some(asked) = asked {
            return usize::from(asked);
        }
        if let Some(warning) = bound_short().filter(|_| rank.speaks()) {
            eprintln!("warning: {warning}");
        }
        let cores = thread::available_parallelism().map_or(1, usize::from);
        (cores / self.count).max(1)
    }
}

/// What the user may not know where Open MPI has bound the ranks of this machine to fewer cores
/// than its launcher may use: by default it binds each of two to one core.
fn bound_short() -> Option<String> {
    let local_ranks = env::var("OMPI_COMM_WORLD_LOCAL_SIZE").ok()?.parse().ok()?;
    let (bound, cores) = bound_cores(Path::new("/proc"), local_ranks)?;
    (bound < cores).then(|| {
        format!(
            "the ranks of this machine are bound to {bound} of the {cores} cores that they could use; mpirun --bind-to none gives them all \
             (--threads, if this is meant)"
        )
    })
}

/// Cores of all `local_ranks` ranks of this machine, if each has as many as this one, and those of
/// the launcher.
fn bound_cores(proc: &Path, local_ranks: usize) -> Option<(usize, usize)> {
    let status = |process: &str| fs::read_to_string(proc.join(process).join("status")).ok();
    let own = status("self")?;
    let launcher = own.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim();
    Some((local_ranks * count(allowed_cores(&own))?, count(allowed_cores(&status(launcher)?))?))
}

/// The length of a list like `0-3,8`.
fn count(cores: &str) -> Option<usize> {
    let range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        (last.parse::<usize>().ok()? + 1).checked_sub(first.parse().ok()?)
    };
    cores.split(',').map(range).sum()
}

/// The host, what tells it from others of the same name, and the cores; `proc` is `/proc`, or a
/// folder with such files. Not the machines that the communicator counts: those of `COMM_NODES` or
/// of an emulated link share the cores of one.
///
/// What cannot be read counts as equal: then the ranks share, which costs speed but never more
/// threads than cores.
fn place(proc: &Path) -> String {
    let read = |name: &str| fs::read_to_string(proc.join(name)).unwrap_or_default();
    // Hosts that were never given a name are all called localhost. The kernel makes up the other
    // one when it starts.
    let host = read("sys/kernel/hostname") + &read("sys/kernel/random/boot_id");
    host + allowed_cores(&read("self/status"))
}

/// The process's cores as `/proc/self/status` lists them, for example `0-3,8`.
fn allowed_cores(status: &str) -> &str {
    status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
        .unwrap_or_default()
        .trim()
}

#[cfg(test)]
mod tests {
    use super::*;
    use qwen3_model::comm::ThreadComm;
    use std::sync::Arc;

    #[test]
    fn the_list_of_cores_is_found() {
        let status =
            "Name:\tqwen3\nCpus_allowed:\tff\nCpus_allowed_list:\t0-3,8\nMems_allowed:\t1\n";
        assert_eq!(allowed_cores(status), "0-3,8");
        assert_eq!(allowed_cores("Name:\tqwen3\n"), "");
        assert_eq!(
            [count("0-3,8"), count("5"), count(""), count("3-1")],
            [Some(5), Some(1), None, None]
        );
    }

    #[test]
    fn cores_are_compared_with_those_of_the_launcher() {
        let proc = tempfile::tempdir().unwrap();
        for (process, status) in
            [("self", "PPid:\t7\nCpus_allowed_list:\t3\n"), ("7", "Cpus_allowed_list:\t0-15\n")]
        {
            fs::create_dir(proc.path().join(process)).unwrap();
            fs::write(proc.path().join(process).join("status"), status).unwrap();
        }
        assert_eq!(bound_cores(proc.path(), 2), Some((2, 16)));
        fs::remove_dir_all(proc.path().join("7")).unwrap();
        assert_eq!(bound_cores(proc.path(), 2), None);
    }

    #[test]
    fn hosts_of_one_name_are_told_apart_and_so_are_cores() {
        let place = |host: &str, boot: Option<&str>, cores: &str| {
            let proc = tempfile::tempdir().unwrap();
            let write = |name: &str, text: &str| {
                fs::create_dir_all(proc.path().join(name).parent().unwrap()).unwrap();
                fs::write(proc.path().join(name), text).unwrap();
            };
            write("sys/kernel/hostname", host);
            write("self/status", &format!("Cpus_allowed_list:\t{cores}\n"));
            boot.into_iter().for_each(|boot| write("sys/kernel/random/boot_id", boot));
            super::place(proc.path())
        };
        let here = place("localhost\n", Some("ba40\n"), "0-3");
        assert_eq!(here, place("localhost\n", Some("ba40\n"), "0-3"));
        assert_ne!(here, place("localhost\n", Some("77c1\n"), "0-3"));
        assert_ne!(here, place("other\n", Some("ba40\n"), "0-3"));
        assert_ne!(here, place("localhost\n", Some("ba40\n"), "4-7"));
        assert_eq!(place("localhost\n", None, "0-3"), place("localhost\n", None, "0-3"));
    }

    #[test]
    fn ranks_of_one_process_share_its_cores() {
        let found = std::thread::scope(|scope| {
            let ranks: Vec<_> = ThreadComm::group(3)
                .into_iter()
                .map(|comm| {
                    scope.spawn(|| Neighbours::find(&Rank::new(Arc::new(comm), None)).unwrap())
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
        });
        let expected = [0, 1, 2].map(|index| Neighbours { index, count: 3 });
        assert_eq!(found, expected);
    }
}
