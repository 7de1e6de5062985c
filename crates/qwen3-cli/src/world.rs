//! Who started this process: an MPI launcher leaves the number of processes and this one's rank in
//! the environment.

/// What a launcher says about this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    /// The launcher's family, for messages.
    pub launcher: &'static str,
    /// This process, from 0.
    pub rank: usize,
    /// How many processes were started, where the launcher says so.
    pub size: Option<usize>,
}

/// `(launcher, variable with the rank, variable with the size)`; the first whose rank is there
/// counts.
///
/// `SLURM_PROCID` alone proves nothing, a batch script has it too; `SLURM_STEP_NUM_TASKS` is there
/// only under `srun`.
const LAUNCHERS: [(&str, &str, &str); 5] = [
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("PMI", "PMI_RANK", "PMI_SIZE"),
    ("PMIx", "PMIX_RANK", "SLURM_STEP_NUM_TASKS"),
    ("SLURM", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
];

impl World {
    /// What the environment says; `None` where no launcher started this process.
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

    /// Whether there may be other processes.
    pub fn is_many(&self) -> bool {
        self.size != Some(1)
    }
}

#[cfg(test)]
mod tests {
    use super::World;

    fn world(variables: &[(&str, &str)]) -> Option<World> {
        World::from_variables(|name| {
            variables.iter().find(|(found, _)| *found == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn each_launcher_is_known_by_its_variables() {
        let open = world(&[("OMPI_COMM_WORLD_RANK", "1"), ("OMPI_COMM_WORLD_SIZE", "2")]).unwrap();
        assert_eq!((open.launcher, open.rank, open.size), ("Open MPI", 1, Some(2)));
        let mpich = world(&[("PMI_RANK", "0"), ("PMI_SIZE", "3")]).unwrap();
        assert_eq!((mpich.launcher, mpich.rank, mpich.size), ("PMI", 0, Some(3)));
        let pmix = world(&[("PMIX_RANK", "4")]).unwrap();
        assert_eq!((pmix.launcher, pmix.rank, pmix.size), ("PMIx", 4, None));
        assert!(pmix.is_many());
        let srun = world(&[("SLURM_PROCID", "1"), ("SLURM_STEP_NUM_TASKS", "2")]).unwrap();
        assert_eq!((srun.launcher, srun.rank, srun.size), ("SLURM", 1, Some(2)));
    }

    #[test]
    fn a_plain_process_and_a_batch_script_have_no_world() {
        assert_eq!(world(&[]), None);
        assert_eq!(world(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]), None);
        assert_eq!(world(&[("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1")]), None);
        let alone = world(&[("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "1")]).unwrap();
        assert!(!alone.is_many());
    }
}
