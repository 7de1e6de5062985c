//! What was measured on the ranks of earlier runs: where it is kept, and which of it fits a plan.

use std::fs;
use std::path::{Path, PathBuf};

use qwen3_model::Machine;
use serde::{Deserialize, Serialize};

use crate::failure::CliError;
use crate::options::misfit;

/// The file's content.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Calibration {
    /// One for each transport and number of ranks, machines and threads.
    pub machines: Vec<Machine>,
}

/// `qwen3/calibration.json` in `$XDG_CONFIG_HOME` or `~/.config`; nothing where there is no home either.
pub fn default_path() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let config = set("XDG_CONFIG_HOME").or_else(|| set("HOME").map(|home| home.join(".config")))?;
    Some(config.join("qwen3/calibration.json"))
}

impl Calibration {
    /// Reads a file that has to be there and to be sound.
    pub fn read(path: &Path) -> Result<Self, CliError> {
        let text = fs::read_to_string(path).map_err(|source| CliError::file(path, source))?;
        let found: Self = serde_json::from_str(&text).map_err(|error| {
            misfit("--calibration", format!("{}: {error}", path.display()), "a file of qwen3 calibrate")
        })?;
        if found.machines.iter().all(Machine::is_sound) {
            return Ok(found);
        }
        let found = format!("{}: a rate or a link that is not positive", path.display());
        Err(misfit("--calibration", found, "a file of qwen3 calibrate"))
    }

    /// Adds a measurement in place of an older one of the same kind.
    pub fn insert(&mut self, machine: Machine) {
        let key = |m: &Machine| (m.transport.clone(), m.ranks, m.nodes, m.threads);
        self.machines.retain(|other| key(other) != key(&machine));
        self.machines.push(machine);
    }

    /// Writes the file as a whole: a reader sees the old one or the new one.
    pub fn write(&self, path: &Path) -> Result<(), CliError> {
        let write = || {
            if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
                fs::create_dir_all(folder)?;
            }
            let part = path.with_extension("part");
            let text = serde_json::to_string_pretty(self).expect("figures are finite and keys are strings");
            fs::write(&part, text + "\n")?;
            fs::rename(part, path)
        };
        write().map_err(|source| CliError::file(path, source))
    }

    /// The measurement for so many ranks and machines; of several the one with that transport and those threads.
    pub fn find(
        &self,
        transport: Option<&str>,
        ranks: usize,
        nodes: usize,
        threads: Option<usize>,
    ) -> Option<&Machine> {
        let fits = self.machines.iter().filter(|m| m.ranks == ranks && m.nodes == nodes);
        let fits = fits.filter(|m| threads.is_none_or(|threads| m.threads == threads));
        fits.max_by_key(|m| transport == Some(&*m.transport))
    }
}
