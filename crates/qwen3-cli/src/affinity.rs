//! How many ranks share the cores that this process may use.

use std::fs;
use std::thread;

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
    /// A launcher that binds each process to cores of its own leaves one; in-process ranks and unbound processes share.
    pub fn find(rank: &Rank) -> Result<Self, CliError> {
        let place = read("/proc/sys/kernel/hostname") + allowed_cores(&read("/proc/self/status"));
        let mine = digest(place.bytes().map(u64::from));
        let mut all = vec![0_u64; rank.comm().size()];
        rank.comm().all_gather(&[mine], &mut all)?;
        let same = |places: &[u64]| places.iter().filter(|&&place| place == mine).count();
        Ok(Self { index: same(&all[..rank.comm().rank()]), count: same(&all) })
    }

    /// The threads of this rank: those asked for, or its share of the cores.
    pub fn threads(self, asked: Option<u16>) -> usize {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        asked.map_or((cores / self.count).max(1), usize::from)
    }
}

/// What cannot be read counts as equal: then the ranks share, which costs speed but never more threads than cores.
fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The process's cores as `/proc/self/status` lists them, for example `0-3,8`.
fn allowed_cores(status: &str) -> &str {
    status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::*;
    use qwen3_model::comm::ThreadComm;
    use std::sync::Arc;

    #[test]
    fn the_list_of_cores_is_found() {
        let status = "Name:\tqwen3\nCpus_allowed:\tff\nCpus_allowed_list:\t0-3,8\nMems_allowed:\t1\n";
        assert_eq!(allowed_cores(status), "0-3,8");
        assert_eq!(allowed_cores("Name:\tqwen3\n"), "");
    }

    #[test]
    fn ranks_of_one_process_share_its_cores() {
        let found = std::thread::scope(|scope| {
            let ranks: Vec<_> = ThreadComm::group(3)
                .into_iter()
                .map(|comm| scope.spawn(|| Neighbours::find(&Rank::new(Arc::new(comm), None)).unwrap()))
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
        });
        let expected = [0, 1, 2].map(|index| Neighbours { index, count: 3 });
        assert_eq!(found, expected);
    }
}
