//! How much memory this process can still take: what its machine has, or what its control groups
//! leave where that is less.

use std::fs;
use std::path::Path;

use crate::failure::CliError;

/// A control group's files of one version of the interface.
struct Files {
    limit: &'static str,
    usage: &'static str,
    /// The fields of `memory.stat` with the bytes of files in memory, of the group and those below
    /// it.
    files: [&'static str; 2],
}

const VERSION_1: Files = Files {
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    files: ["total_inactive_file", "total_active_file"],
};
const VERSION_2: Files =
    Files { limit: "memory.max", usage: "memory.current", files: ["inactive_file", "active_file"] };

/// What one rank needs, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needed {
    /// Packed weights.
    pub weights: usize,
    /// Keys, values and recurrent states.
    pub cache: usize,
    /// Activations of the largest pass.
    pub activations: usize,
}

impl Needed {
    fn total(self) -> usize {
        self.weights.saturating_add(self.cache).saturating_add(self.activations)
    }
}

/// Whether there is memory for `ranks` ranks of this machine, each of which needs as much as this
/// one. A model that does not fit would otherwise end the program, or others, while it loads.
///
/// # Errors
/// [`CliError::Memory`] when there is not, as far as the system tells.
pub fn check(needed: Needed, ranks: usize) -> Result<(), CliError> {
    let refused = |ranks: usize, free: usize, of: &'static str| {
        Err(CliError::Memory {
            needed,
            ranks,
            total: needed.total().saturating_mul(ranks),
            free,
            of,
        })
    };
    if let Some(free) = address_space()
        && needed.total() > free
    {
        return refused(1, free, "address space (ulimit -v)");
    }
    let free = available(Path::new("/")).map(|free| free.saturating_add(swap(Path::new("/"))));
    match free {
        Some(free) if needed.total().saturating_mul(ranks) > free => refused(ranks, free, "memory"),
        _ => Ok(()),
    }
}

/// Bytes that this process may still map under its limit; `None` without a limit.
fn address_space() -> Option<usize> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::As).current?;
    let pages: usize =
        fs::read_to_string("/proc/self/statm").ok()?.split(' ').next()?.parse().ok()?;
    Some((limit as usize).saturating_sub(pages * rustix::param::page_size()))
}

/// Bytes of swap that are free.
fn swap(root: &Path) -> usize {
    let text = fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    field(&text, "SwapFree:").map_or(0, |kib| kib.saturating_mul(1024))
}

/// Bytes that this process can still take, where the system tells. `root` is `/`, or a folder with
/// such files.
pub fn available(root: &Path) -> Option<usize> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let machine = field(&text, "MemAvailable:")?.checked_mul(1024)?;
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let left =
        groups.lines().filter_map(|line| of_hierarchy(&root.join("sys/fs/cgroup"), line)).min();
    Some(left.map_or(machine, |left| left.min(machine)))
}

/// What the groups of a line of `/proc/self/cgroup` (`4:memory:/a/b`, or `0::/a/b` of version 2)
/// leave, if one of them has a limit. The limit of a group holds for those below it, too.
fn of_hierarchy(mounts: &Path, line: &str) -> Option<usize> {
    let (controllers, group) = line.split_once(':')?.1.split_once(':')?;
    let (mount, files) = match controllers {
        "" => (mounts.to_owned(), VERSION_2),
        _ if controllers.split(',').any(|name| name == "memory") => {
            (mounts.join("memory"), VERSION_1)
        }
        _ => return None,
    };
    // A container may see its own group as the top of the tree and still have the path that the
    // host knows, or one that leads out of what it sees: folders that are not there have no limit,
    // and the top is always looked at.
    let group =
        if group.split('/').any(|part| part == "..") { "" } else { group.trim_start_matches('/') };
    let folder = mount.join(group);
    folder
        .ancestors()
        .take_while(|folder| folder.starts_with(&mount))
        .filter_map(|folder| left(folder, &files))
        .min()
}

/// What a group leaves of its limit. Files in memory count as used, but make room for whoever needs
/// it.
fn left(folder: &Path, files: &Files) -> Option<usize> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<usize>().ok();
    // `max` is no limit.
    let limit = number(files.limit)?;
    let stat = read("memory.stat").unwrap_or_default();
    let reclaimable = files.files.iter().filter_map(|name| field(&stat, name)).sum();
    Some(limit.saturating_sub(number(files.usage).unwrap_or(0).saturating_sub(reclaimable)))
}

/// The number behind `name` in lines of names and numbers.
fn field(text: &str, name: &str) -> Option<usize> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(name)).then(|| words.next()?.parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is available where these files are all there is.
    fn of(files: &[(&str, &str)]) -> Option<usize> {
        let root = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        available(root.path())
    }

    const MACHINE: (&str, &str) =
        ("proc/meminfo", "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:   8000 kB\n");
    const ALL: Option<usize> = Some(8000 * 1024);

    #[test]
    fn without_a_limit_it_is_the_machines() {
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[MACHINE]), ALL);
        let unlimited = ("sys/fs/cgroup/a/memory.max", "max\n");
        assert_eq!(of(&[MACHINE, ("proc/self/cgroup", "0::/a\n"), unlimited]), ALL);
        let large = ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(of(&[MACHINE, ("proc/self/cgroup", "4:memory:/a\n0::/\n"), large]), ALL);
        // The limit of a group that this process is not in, and of a hierarchy that does not
        // control memory.
        let other = ("sys/fs/cgroup/b/memory.max", "1000\n");
        assert_eq!(of(&[MACHINE, ("proc/self/cgroup", "0::/a\n"), other]), ALL);
        let pids = ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "1000\n");
        assert_eq!(of(&[MACHINE, ("proc/self/cgroup", "8:pids:/a\n"), pids]), ALL);
    }

    #[test]
    fn the_narrowest_group_counts_without_the_files_that_it_can_drop() {
        let group = ("proc/self/cgroup", "0::/pod/container\n");
        let own = [
            ("sys/fs/cgroup/pod/container/memory.max", "5000000\n"),
            ("sys/fs/cgroup/pod/container/memory.current", "3000000\n"),
            (
                "sys/fs/cgroup/pod/container/memory.stat",
                "anon 2000000\ninactive_file 400000\nactive_file 600000\n",
            ),
        ];
        let files = [&[MACHINE, group][..], &own].concat();
        assert_eq!(of(&files), Some(3_000_000));
        let pod = [
            ("sys/fs/cgroup/pod/memory.max", "6000000"),
            ("sys/fs/cgroup/pod/memory.current", "4000000"),
        ];
        assert_eq!(of(&[&files[..], &pod].concat()), Some(2_000_000));
        // More than all is in use where a limit was lowered.
        assert_eq!(
            of(&[&files[..], &[("sys/fs/cgroup/pod/memory.max", "10"), pod[1]]].concat()),
            Some(0)
        );
    }

    #[test]
    fn the_first_version_has_other_names() {
        let group = ("proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/job\n0::/\n");
        let own = [
            ("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "5000000\n"),
            ("sys/fs/cgroup/memory/job/memory.usage_in_bytes", "3000000\n"),
            (
                "sys/fs/cgroup/memory/job/memory.stat",
                "active_file 7\ninactive_file 1\ntotal_inactive_file 100000\ntotal_active_file 50000\n",
            ),
        ];
        assert_eq!(of(&[&[MACHINE, group][..], &own].concat()), Some(2_150_000));
    }

    #[test]
    fn a_container_sees_its_own_group_at_the_top() {
        for path in ["0::/", "0::/host/knows/this", "0::/../../sibling"] {
            let top = [
                ("sys/fs/cgroup/memory.max", "1000000"),
                ("sys/fs/cgroup/memory.current", "300000"),
            ];
            assert_eq!(
                of(&[&[MACHINE, ("proc/self/cgroup", path)][..], &top].concat()),
                Some(700_000),
                "{path}"
            );
        }
    }
}
