//! What was measured on the ranks of earlier runs: where it is kept, and which of it fits a plan.

use std::fs;
use std::path::{Path, PathBuf};

use planner::{LinkFigures, Machine};
use ranks::one_line;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::failure::CliError;
use crate::output_file::OutputFile;

/// The file's content.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Calibration {
    /// One for each processor, transport and number of ranks, machines and threads.
    machines: Vec<Entry>,
}

/// A measurement as it was written; fields of other versions are kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
struct Entry {
    written: Value,
    machine: Machine,
}

impl TryFrom<Value> for Entry {
    type Error = serde_json::Error;

    fn try_from(written: Value) -> Result<Self, Self::Error> {
        let machine = Machine::deserialize(&written)?;
        Ok(Self { written, machine })
    }
}

impl From<Entry> for Value {
    fn from(entry: Entry) -> Self {
        entry.written
    }
}

/// `qwen3/calibration.json` in `$XDG_CONFIG_HOME` or `~/.config`; nothing where there is no home
/// either.
pub fn default_path() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let config = set("XDG_CONFIG_HOME").or_else(|| set("HOME").map(|home| home.join(".config")))?;
    Some(config.join("qwen3/calibration.json"))
}

impl Calibration {
    /// Reads a file that has to be there and to be sound.
    pub fn read(path: &Path) -> Result<Self, CliError> {
        let text = fs::read_to_string(path).map_err(|source| CliError::file(path, source))?;
        let broken = |found: String| {
            CliError::option(
                "calibration",
                format!("{}: {found}", path.display()),
                "a file that this version of qwen3 calibrate wrote (without it, calibrate writes a new one)",
            )
        };
        let found: Self = serde_json::from_str(&text).map_err(|error| broken(error.to_string()))?;
        let flaw = found.machines().find_map(Machine::flaw);
        match flaw {
            None => Ok(found),
            Some(flaw) => Err(broken(format!("{flaw}, which no measurement gives"))),
        }
    }

    fn machines(&self) -> impl Iterator<Item = &Machine> {
        self.machines.iter().map(|entry| &entry.machine)
    }

    /// What it has measurements of.
    pub fn content(&self) -> String {
        let each = |m: &Machine| {
            format!(
                "{}, {} each ({})",
                place(m.ranks, m.nodes),
                count(m.threads, "thread"),
                m.transport
            )
        };
        let all: Vec<_> = self.machines().map(each).collect();
        if all.is_empty() { "nothing".to_owned() } else { all.join("; ") }
    }

    /// Adds a measurement and writes the file. One that could not be read again is refused, and the
    /// file stays what it was.
    pub fn save(&mut self, path: &Path, machine: Machine) -> Result<(), CliError> {
        if let Some(flaw) = machine.flaw() {
            let expected = "a positive number; nothing was saved, measure again while the machine is less busy";
            return Err(CliError::option("calibration", format!("measured {flaw}"), expected));
        }
        self.insert(machine);
        self.write(path)
    }

    /// Adds a measurement in place of an older one of the same kind.
    fn insert(&mut self, machine: Machine) {
        let key =
            |m: &Machine| (m.processor.clone(), m.transport.clone(), m.ranks, m.nodes, m.threads);
        self.machines.retain(|other| key(&other.machine) != key(&machine));
        let written = serde_json::to_value(&machine).expect("keys are strings");
        self.machines.push(Entry { written, machine });
    }

    /// Writes the file as a whole: a reader sees the old one or the new one.
    fn write(&self, path: &Path) -> Result<(), CliError> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            fs::create_dir_all(folder).map_err(|source| CliError::file(path, source))?;
        }
        let text = serde_json::to_string_pretty(self)
            .expect("figures are finite and keys are strings")
            + "\n";
        let mut file = OutputFile::create(path)?;
        file.write_all(text.as_bytes())?;
        file.finish()
    }

    /// The measurement for these ranks and their transport, with the layout's own link; of several
    /// the one on this processor. With a given link between machines, a measurement on one machine
    /// is enough.
    pub fn machine(&self, layout: &Layout<'_>) -> Option<Machine> {
        let Layout { transport, ranks, nodes, threads, link } = *layout;
        let fits = |m: &&Machine| {
            m.ranks == ranks
                && threads.is_none_or(|threads| m.threads == threads)
                && transport.is_none_or(|transport| m.transport == transport)
        };
        let here = processor();
        let on = |nodes| {
            let fits = self.machines().filter(fits).filter(|m| m.nodes == nodes);
            fits.max_by_key(|m| m.processor == here)
        };
        // Emulated machines share one: what was measured on it, all ranks at work, is nearest.
        let found = if link.is_some() { on(1).or_else(|| on(nodes)) } else { on(nodes) };
        found.map(|found| layout.connect(found.clone()))
    }

    /// The machine of the calibration that nobody named, or a typical one, and where its figures
    /// come from: there need not be a calibration, or it may have come with a home folder from
    /// elsewhere.
    pub fn by_itself(layout: &Layout<'_>) -> (Machine, String) {
        let typical = || {
            layout.connect(Machine::typical(
                layout.ranks,
                layout.nodes,
                layout.threads.unwrap_or(1),
            ))
        };
        let Some(path) = default_path().filter(|path| path.exists()) else {
            return (typical(), "typical, not measured (qwen3 calibrate measures them)".to_owned());
        };
        match Self::read(&path) {
            Err(error) => (typical(), format!("typical, since {}", one_line(&error.to_string()))),
            Ok(calibration) => match calibration.machine(layout) {
                Some(Machine { processor: Some(other), .. })
                    if Some(&other) != processor().as_ref() =>
                {
                    let here = processor().unwrap_or_else(|| "another".to_owned());
                    (
                        typical(),
                        format!(
                            "typical, since {} was measured on {other}, and this is {here}",
                            path.display()
                        ),
                    )
                }
                Some(machine) => {
                    let figures = format!("calibrated ({}, {})", machine.transport, path.display());
                    (machine, figures)
                }
                None => (
                    typical(),
                    format!("typical, since {} has only {}", path.display(), calibration.content()),
                ),
            },
        }
    }
}

/// The processor of this machine and how many logical cores it has, where the system tells.
pub fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let fields = || {
        text.lines()
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.trim(), value.trim()))
    };
    let field = |wanted: &str| fields().find(|(name, _)| *name == wanted).map(|(_, value)| value);
    let cores = fields().filter(|(name, _)| *name == "processor").count();
    let (name, family, model) = (field("model name")?, field("cpu family")?, field("model")?);
    Some(format!("{name}, family {family}, model {model}, {}", count(cores, "logical core")))
}

/// So many of something, in words.
pub fn count(count: usize, one: &str) -> String {
    format!("{count} {one}{}", if count == 1 { "" } else { "s" })
}

/// The ranks and where they lie.
pub fn place(ranks: usize, nodes: usize) -> String {
    format!("{} on {}", count(ranks, "rank"), count(nodes, "machine"))
}

/// What a measurement is wanted for.
#[derive(Clone, Copy, Debug)]
pub struct Layout<'a> {
    /// What carries the data; any if not given.
    pub transport: Option<&'a str>,
    /// Ranks, and the machines on which they lie.
    pub ranks: usize,
    pub nodes: usize,
    /// Threads of a rank; any if not given.
    pub threads: Option<usize>,
    /// The link between machines, or between ranks where there is one machine, if it is not the
    /// measured one.
    pub link: Option<LinkFigures>,
}

impl Layout<'_> {
    /// `machine` with these machines and this link.
    fn connect(&self, mut machine: Machine) -> Machine {
        machine.nodes = self.nodes;
        if let Some(link) = self.link {
            machine.between = link;
            if self.nodes == 1 {
                machine.inside = link;
            }
        }
        machine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_read_again_is_not_saved() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("calibration.json");
        let machine = Machine::typical(2, 1, 1);
        Calibration::default().save(&path, machine.clone()).unwrap();
        let old = fs::read_to_string(&path).unwrap();
        for (bad, word) in [(f64::INFINITY, "inf"), (f64::NAN, "NaN"), (0.0, "0"), (-3.0, "-3")] {
            let mut noisy = machine.clone();
            noisy.rates[0].read_gb_s = bad;
            let error =
                Calibration::read(&path).unwrap().save(&path, noisy).unwrap_err().to_string();
            let expected = format!(
                "calibration: measured read_gb_s of bf16 is {word}; expected a positive number; "
            );
            assert!(error.starts_with(&expected), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), old, "the file was touched for {bad}");
        }
        assert!(Calibration::read(&path).unwrap().machines().eq([&machine]));
    }

    #[test]
    fn figures_of_thread_ranks_are_not_those_of_mpi_ranks() {
        let mut calibration = Calibration::default();
        let machine = |transport: &str| Machine {
            transport: transport.to_owned(),
            ..Machine::typical(2, 1, 1)
        };
        let link = Some(LinkFigures { alpha_us: 1.0, beta_gb_s: 1.0 });
        let base =
            Layout { transport: Some("mpi"), ranks: 2, nodes: 1, threads: Some(1), link: None };
        let layouts = [base, Layout { nodes: 2, link, ..base }];
        calibration.insert(machine("threads"));
        for layout in layouts {
            assert_eq!(calibration.machine(&layout), None);
            let any = Layout { transport: None, ..layout };
            assert_eq!(calibration.machine(&any).map(|m| m.transport).as_deref(), Some("threads"));
        }
        calibration.insert(machine("mpi"));
        for layout in layouts {
            let found = calibration.machine(&layout).map(|machine| machine.transport);
            assert_eq!(found.as_deref(), Some("mpi"));
        }
    }
}
