//! How many ranks share the cores that this process may use.

use std::ops::Range;
use std::path::Path;
use std::{env, fs, thread};

use comm::{CommError, CommunicatorExt as _, digest};

use crate::launcher::LaunchedProcess;
use crate::rank::Rank;

/// The place of a rank among those on the same cores of the same machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbours {
    /// How many of them have a lower rank.
    pub index: usize,
    /// How many there are, with this rank.
    pub count: usize,
}

impl Neighbours {
    /// Asks the other ranks; all ranks call this together.
    ///
    /// Ranks of one process and processes that are not bound share cores. Under a launcher that
    /// binds each process to cores of its own, each rank is alone.
    ///
    /// # Errors
    /// If a rank fails.
    pub fn find(rank: &Rank) -> Result<Self, CommError> {
        let mine = digest(place(Path::new("/proc")).bytes().map(u64::from));
        let all = rank.comm().all_gather_one(mine)?;
        let same = |places: &[u64]| places.iter().filter(|&&place| place == mine).count();
        Ok(Self { index: same(&all[..rank.comm().rank()]), count: same(&all) })
    }

    /// The number of threads of this rank: `requested`, or its share of the cores. Rank 0 warns on
    /// standard error if the launcher bound the ranks to few of the cores.
    pub fn threads(self, rank: &Rank, requested: Option<usize>) -> usize {
        if let Some(requested) = requested {
            return requested;
        }
        if let Some(warning) = binding_warning().filter(|_| rank.is_root()) {
            eprintln!("warning: {warning}");
        }
        (available_cores() / self.count).max(1)
    }
}

/// The number of cores that this process may use.
pub fn available_cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// The number of NUMA domains whose cores this process may use, at least 1. Under a launcher with
/// several processes it is 1, because each process is a rank.
pub fn numa_domains() -> usize {
    if LaunchedProcess::detect().is_some_and(|process| process.has_peers()) {
        return 1;
    }
    count_domains(Path::new("/proc"), Path::new("/sys/devices/system/node")).max(1)
}

fn count_domains(proc: &Path, nodes: &Path) -> usize {
    let status = fs::read_to_string(proc.join("self/status")).unwrap_or_default();
    let Some(allowed) = ranges(allowed_cores(&status)) else { return 1 };
    let shares_cores = |folder: &Path| {
        let list = fs::read_to_string(folder.join("cpulist")).unwrap_or_default();
        ranges(list.trim()).is_some_and(|cores| {
            cores.iter().any(|a| allowed.iter().any(|b| a.start < b.end && b.start < a.end))
        })
    };
    let folders = fs::read_dir(nodes).into_iter().flatten().flatten();
    folders.filter(|folder| shares_cores(&folder.path())).count()
}

/// A warning if Open MPI has bound the ranks of this machine to fewer cores than its launcher may
/// use: by default it binds each of two ranks to one core.
fn binding_warning() -> Option<String> {
    let local_ranks = env::var("OMPI_COMM_WORLD_LOCAL_SIZE").ok()?.parse().ok()?;
    let (bound, cores) = bound_cores(Path::new("/proc"), local_ranks)?;
    (bound < cores).then(|| {
        format!(
            "the ranks of this machine are bound to {bound} of the {cores} cores that they could \
             use; mpirun --bind-to none gives them all (--threads, if this is meant)"
        )
    })
}

/// Cores of all `local_ranks` ranks of this machine, if each has as many as this one, and cores of
/// the launcher.
fn bound_cores(proc: &Path, local_ranks: usize) -> Option<(usize, usize)> {
    let status = |process: &str| fs::read_to_string(proc.join(process).join("status")).ok();
    let own = status("self")?;
    let launcher = own.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim();
    Some((local_ranks * count(allowed_cores(&own))?, count(allowed_cores(&status(launcher)?))?))
}

/// The length of a list like `0-3,8`.
fn count(cores: &str) -> Option<usize> {
    Some(ranges(cores)?.into_iter().map(|range| range.len()).sum())
}

/// The ranges of a list like `0-3,8`; `None` if it is no such list.
fn ranges(cores: &str) -> Option<Vec<Range<usize>>> {
    let range = |range: &str| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, end) = (first.parse().ok()?, last.parse::<usize>().ok()? + 1);
        (first < end).then_some(first..end)
    };
    cores.split(',').map(range).collect()
}

/// The host, its boot id, and the cores of this process. `proc` is `/proc`, or a folder with such
/// files. The machines that the communicator counts do not help here: those of `COMM_NODES` or of
/// an emulated link share the cores of one.
///
/// What cannot be read counts as equal. Then the ranks share cores, which costs speed but never
/// starts more threads than cores.
fn place(proc: &Path) -> String {
    let read = |name: &str| fs::read_to_string(proc.join(name)).unwrap_or_default();
    // Hosts that were never given a name are all called localhost. The kernel makes up the boot id
    // when it starts.
    let host = read("sys/kernel/hostname") + &read("sys/kernel/random/boot_id");
    host + allowed_cores(&read("self/status"))
}

/// The process's cores as `/proc/self/status` lists them, for example `0-3,8`.
fn allowed_cores(status: &str) -> &str {
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
    list.unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::{JobOptions, run_in_threads};
    use std::sync::Mutex;

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
    fn domains_are_counted_that_have_cores_for_this_process() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let file = dir.path().join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        };
        write("self/status", "Cpus_allowed_list:\t0-3,8\n");
        // Its memory only: no cores.
        write("nodes/node3/cpulist", "\n");
        write("nodes/online", "0-3\n");
        let domains = || count_domains(dir.path(), &dir.path().join("nodes"));
        assert_eq!(domains(), 0);
        write("nodes/node0/cpulist", "0-1,4-5\n");
        write("nodes/node1/cpulist", "2-3,6-7\n");
        write("nodes/node2/cpulist", "9-11\n");
        assert_eq!(domains(), 2);
        write("nodes/node2/cpulist", "8-11\n");
        assert_eq!(domains(), 3);
        assert!(numa_domains() >= 1);
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
        let found = Mutex::new([None; 3]);
        let options = JobOptions { ranks: 3, ..JobOptions::default() };
        run_in_threads(&options, |rank| {
            found.lock().unwrap()[rank.comm().rank()] = Some(Neighbours::find(rank)?);
            Ok(())
        })
        .unwrap();
        let expected = [0, 1, 2].map(|index| Some(Neighbours { index, count: 3 }));
        assert_eq!(found.into_inner().unwrap(), expected);
    }
}
