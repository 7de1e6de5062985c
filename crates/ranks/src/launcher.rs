//! Which launcher started this process: an MPI launcher leaves the number of processes and the
//! rank of this one in the environment.

/// What a launcher says about this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchedProcess {
    /// The launcher's family, for messages.
    pub launcher: &'static str,
    /// The number of this process, from 0.
    pub rank: usize,
    /// How many processes were started, where the launcher says so.
    pub size: Option<usize>,
}

/// `(launcher, variable with the rank, variable with the size)`; the first whose rank is set
/// counts.
///
/// `SLURM_PROCID` alone proves nothing: a batch script has it, too. `SLURM_STEP_NUM_TASKS` is set
/// only under `srun`.
const LAUNCHERS: [(&str, &str, &str); 5] = [
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("PMI", "PMI_RANK", "PMI_SIZE"),
    ("PMIx", "PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
    ("SLURM", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
];

impl LaunchedProcess {
    /// What the environment says; `None` if no launcher started this process.
    pub fn detect() -> Option<Self> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(get: impl Fn(&str) -> Option<String>) -> Option<Self> {
        LAUNCHERS.iter().find_map(|&(launcher, rank, size)| {
            let rank = get(rank)?.trim().parse().ok()?;
            let size: Option<usize> = get(size).and_then(|size| size.trim().parse().ok());
            // Under srun without an MPI plugin a single task is a plain process.
            if launcher == "SLURM" && size.is_none_or(|size| size < 2) {
                return None;
            }
            Some(Self { launcher, rank, size })
        })
    }

    /// True if there may be other processes.
    pub fn has_peers(&self) -> bool {
        self.size != Some(1)
    }
}

#[cfg(test)]
mod tests {
    use super::LaunchedProcess;

    fn process(variables: &[(&str, &str)]) -> Option<LaunchedProcess> {
        LaunchedProcess::from_variables(|name| {
            variables.iter().find(|(found, _)| *found == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn each_launcher_is_known_by_its_variables() {
        let cases = [
            (
                &[("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")][..],
                ("Open MPI", 1, Some(2)),
            ),
            (&[("PMI_RANK", "0"), ("PMI_SIZE", "3")], ("PMI", 0, Some(3))),
            (&[("PMIX_RANK", "4")], ("PMIx", 4, None)),
            (&[("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "2")], ("SLURM", 1, Some(2))),
        ];
        for (variables, expected) in cases {
            let found = process(variables).unwrap();
            assert_eq!((found.launcher, found.rank, found.size), expected);
            assert!(found.has_peers());
        }
    }

    #[test]
    fn a_plain_process_and_a_batch_script_have_no_launcher() {
        assert_eq!(process(&[]), None);
        assert_eq!(process(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]), None);
        assert_eq!(process(&[("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1")]), None);
        let alone =
            process(&[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")]).unwrap();
        assert!(!alone.has_peers());
    }
}
