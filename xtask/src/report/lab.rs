//! Where the sections measure: the built program, the checkpoints it runs, and the commands that
//! were run.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::mpi::{Bind, Mpi, Parts};
use crate::process::{self, Finished};
use crate::{launch, workspace};

/// No single bench takes longer.
const DEADLINE: Duration = Duration::from_secs(3600);

/// Where the ranks of a run are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ranks {
    /// Threads of one process.
    Threads(usize),
    /// Processes of the MPI launcher.
    Mpi(usize),
}

impl Ranks {
    /// How many there are.
    pub fn count(self) -> usize {
        match self {
            Self::Threads(count) | Self::Mpi(count) => count,
        }
    }

    /// For a table.
    pub fn name(self) -> String {
        match self {
            Self::Threads(1) => "1 rank".to_owned(),
            Self::Threads(count) => format!("{count} ranks in one process"),
            Self::Mpi(count) => format!("{count} MPI ranks"),
        }
    }
}

/// What the sections share.
pub struct Lab {
    /// Whether to measure less, to see that all works.
    pub quick: bool,
    /// Cores that this process may use.
    pub cores: usize,
    program: PathBuf,
    /// The launcher of MPI and the program built with it, or without both; `None` before anyone
    /// asked.
    mpi: Option<Option<(Mpi, PathBuf)>>,
    cache: PathBuf,
    /// The commands since the last look, as a user would type them.
    commands: Vec<String>,
}

impl Lab {
    /// Builds the program (without MPI: the ranks of these sections are threads of one process).
    pub fn open(quick: bool) -> Result<Self> {
        let mut lab = Self::with(launch::build_program(None)?, quick)?;
        // Other builds of it take its place there.
        lab.program = lab.keep(&lab.program, "qwen3")?;
        Ok(lab)
    }

    /// The same with a program that was built before.
    pub fn with(program: PathBuf, quick: bool) -> Result<Self> {
        let release = program
            .parent()
            .and_then(Path::parent)
            .context("the program lies in no target folder")?;
        let cache = release.join("report");
        std::fs::create_dir_all(&cache)
            .with_context(|| format!("cannot make {}", cache.display()))?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { quick, cores, program, mpi: None, cache, commands: Vec::new() })
    }

    /// A copy of a program that was just built.
    fn keep(&self, program: &Path, name: &str) -> Result<PathBuf> {
        let copy = self.cache.join(name);
        std::fs::copy(program, &copy)
            .with_context(|| format!("cannot copy {}", program.display()))?;
        Ok(copy)
    }

    /// Whether there are MPI ranks; builds the program for them at the first call.
    pub fn has_mpi(&mut self) -> Result<bool> {
        if self.mpi.is_none() {
            let found = Mpi::from_parts(&Parts::find()).ok();
            let built = found.map(|mpi| {
                Ok::<_, anyhow::Error>((
                    self.keep(&launch::build_program(Some(&mpi))?, "qwen3-mpi")?,
                    mpi,
                ))
            });
            self.mpi = Some(built.transpose()?.map(|(program, mpi)| (mpi, program)));
        }
        Ok(matches!(self.mpi, Some(Some(_))))
    }

    /// `count` MPI ranks, or where there is no MPI as many threads.
    pub fn processes(&mut self, count: usize) -> Result<Ranks> {
        Ok(if self.has_mpi()? { Ranks::Mpi(count) } else { Ranks::Threads(count) })
    }

    /// A lab of its own, with the same checkpoints and a program that counts its allocations.
    pub fn counting(&mut self) -> Result<Lab> {
        self.variant(
            "qwen3-counting",
            &mut workspace::cargo(),
            &["--features", "count-allocations"],
        )
    }

    /// The same with a program that is compiled with the given `RUSTFLAGS`.
    pub fn compiled(&mut self, name: &str, flags: &str) -> Result<Lab> {
        let target = self.file(&format!("{name}-target"));
        self.variant(name, workspace::cargo().env("RUSTFLAGS", flags), &["--target-dir", &target])
    }

    fn variant(&mut self, name: &str, cargo: &mut Command, args: &[&str]) -> Result<Lab> {
        let mpi =
            if self.has_mpi()? { self.mpi.clone().flatten().map(|(mpi, _)| mpi) } else { None };
        let program = self.keep(&launch::build_with(mpi.as_ref(), cargo, args)?, name)?;
        let mpi = Some(mpi.map(|mpi| (mpi, program.clone())));
        Ok(Lab { program, mpi, cache: self.cache.clone(), commands: Vec::new(), ..*self })
    }

    /// Where the lab has its files.
    pub fn folder(&self) -> &Path {
        &self.cache
    }

    /// A file of the lab.
    pub fn file(&self, name: &str) -> String {
        self.cache.join(name).to_string_lossy().into_owned()
    }

    /// A random checkpoint of a published shape, made at the first call and kept under the target
    /// folder.
    pub fn synth(&mut self, preset: &str, layers: Option<usize>) -> Result<PathBuf> {
        let name = layers.map_or(preset.to_owned(), |layers| format!("{preset}-{layers}-layers"));
        let folder = self.cache.join(&name);
        let layers = layers.map(|layers| layers.to_string());
        let mut args = vec!["synth", "--preset", preset];
        args.extend(layers.iter().flat_map(|layers| ["--layers", layers]));
        let path = folder.to_string_lossy().into_owned();
        args.push(&path);
        if folder.is_dir() {
            self.note(&args);
            return Ok(folder);
        }
        // Written under another name first: an interrupted run leaves no half checkpoint under the
        // right one.
        let unfinished = self.cache.join(format!("{name}.unfinished"));
        if unfinished.exists() {
            std::fs::remove_dir_all(&unfinished)
                .with_context(|| format!("cannot remove {}", unfinished.display()))?;
        }
        let mut real = args.clone();
        let unfinished_path = unfinished.to_string_lossy().into_owned();
        *real.last_mut().expect("the folder is the last argument") = &unfinished_path;
        self.run(&real)?;
        std::fs::rename(&unfinished, &folder)
            .with_context(|| format!("cannot rename {}", unfinished.display()))?;
        self.note(&args);
        Ok(folder)
    }

    /// Runs `qwen3 bench` (or another command with `--json`) and reads its answer.
    pub fn json(&mut self, args: &[&str]) -> Result<Value> {
        self.note(args);
        parse(&self.run(args)?, args)
    }

    /// The same on several ranks.
    pub fn json_on(&mut self, ranks: Ranks, args: &[&str]) -> Result<Value> {
        let count = ranks.count().to_string();
        let Ranks::Mpi(processes) = ranks else {
            return self.json(&[args, &["--ranks", &count]].concat());
        };
        let Some(Some((mpi, program))) = self.mpi.clone() else { bail!("there is no MPI here") };
        self.note(args);
        if let Some(command) = self.commands.last_mut() {
            *command = format!("mpirun -n {count} {command}");
        }
        let name = format!("mpirun -n {count} qwen3 {}", args.join(" "));
        let mut command = mpi.launcher(processes, None, Bind::None, program.as_os_str());
        parse(&self.answer(command.args(args), &name)?.stdout, args)
    }

    /// Runs the program once to warm up and then `times` times: wall-clock seconds of each whole
    /// process, and what it printed.
    pub fn timed(&mut self, args: &[&str], times: usize) -> Result<Vec<(f64, String)>> {
        self.note(args);
        self.run(args)?;
        let name = format!("qwen3 {}", args.join(" "));
        let run = |_| {
            let finished = self.answer(Command::new(&self.program).args(args), &name)?;
            Ok((finished.closed.as_secs_f64(), finished.stdout))
        };
        (0..times).map(run).collect()
    }

    /// Builds an example of a crate, with MPI where there is one.
    pub fn example(&mut self, package: &str, name: &str) -> Result<PathBuf> {
        let mpi =
            if self.has_mpi()? { self.mpi.clone().flatten().map(|(mpi, _)| mpi) } else { None };
        let features = if mpi.is_some() { " --features mpi" } else { "" };
        self.commands
            .push(format!("cargo build --release --package {package} --example {name}{features}"));
        launch::build_example(mpi.as_ref(), package, name)
    }

    /// What an example prints that takes the number of its threads, or runs on MPI ranks, each on a
    /// core of its own.
    pub fn example_on(&mut self, ranks: Ranks, example: &Path) -> Result<String> {
        let count = ranks.count().to_string();
        let shown = format!(
            "target/release/examples/{}",
            example.file_name().unwrap_or_default().to_string_lossy()
        );
        let (mut command, line) = match (ranks, &self.mpi) {
            (Ranks::Threads(_), _) => (Command::new(example), format!("{shown} {count}")),
            (Ranks::Mpi(processes), Some(Some((mpi, _)))) => (
                mpi.launcher(processes, None, Bind::Core, example.as_os_str()),
                format!("mpirun --bind-to core -n {count} {shown}"),
            ),
            _ => bail!("there is no MPI here"),
        };
        if let Ranks::Threads(_) = ranks {
            command.arg(&count);
        }
        let answer = self.answer(&mut command, &line)?.stdout;
        self.commands.push(line);
        Ok(answer)
    }

    /// The commands since the last call, for the end of a section.
    pub fn take_commands(&mut self) -> String {
        listing(std::mem::take(&mut self.commands))
    }

    fn note(&mut self, args: &[&str]) {
        let root = workspace::root();
        let cache = self.cache.strip_prefix(&root).unwrap_or(Path::new("target/report"));
        let line = args.join(" ").replace(&*self.cache.to_string_lossy(), &cache.to_string_lossy());
        let line = line.replace(&format!("{}/", root.display()), "");
        self.commands.push(format!("qwen3 {line}"));
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        let name = format!("qwen3 {}", args.join(" "));
        Ok(self.answer(Command::new(&self.program).args(args), &name)?.stdout)
    }

    fn answer(&self, command: &mut Command, name: &str) -> Result<Finished> {
        eprintln!("report: {name}");
        process::answer(command, name, &self.cache, DEADLINE)
    }
}

fn parse(answer: &str, args: &[&str]) -> Result<Value> {
    serde_json::from_str(answer)
        .with_context(|| format!("qwen3 {} printed no JSON", args.join(" ")))
}

/// One result of a bench.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// Tokens a second.
    pub speed: f64,
    /// The share of the limit.
    pub share: f64,
    /// That limit, as it was seen around the same repetitions: GFLOP/s of a prompt, GB/s of
    /// decoding.
    pub limit: f64,
}

impl Measured {
    /// Finds the result of `phase` with so many tokens (prefill) or after so many (decode).
    pub fn find(bench: &Value, phase: &str, length: usize) -> Option<Self> {
        let key = if phase == "prefill" { "tokens" } else { "depth" };
        let wanted = |result: &&Value| {
            result["phase"] == phase && result[key].as_u64() == Some(length as u64)
        };
        let result = bench["results"].as_array()?.iter().find(wanted)?;
        let number = |name: &str| result[name].as_f64();
        let share = number("limit_share")?;
        let reached = number(if phase == "prefill" { "gflops" } else { "gb_per_s" })?;
        Some(Self { speed: number("tokens_per_s")?, share, limit: reached / share })
    }

    /// The speed at the limit itself.
    pub fn at_limit(self) -> f64 {
        self.speed / self.share
    }
}

/// `"123 (0.87 of 210)"`: tokens a second, the share of the limit and that limit, or a dash.
pub fn cell(measured: Option<Measured>) -> String {
    let short =
        |value: f64| if value < 100.0 { format!("{value:.1}") } else { format!("{value:.0}") };
    measured.map_or("–".to_owned(), |Measured { speed, share, limit }| {
        format!("{} ({share:.2} of {})", short(speed), short(limit))
    })
}

/// How a section explains its cells.
pub const CELLS: &str = "tokens a second, and in brackets the share of the limit and that limit, measured around the same repetitions: \
                         GFLOP/s of prompts, GB/s of decoding";

/// The middle value, or the mean of the two in the middle; there has to be one.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// A block of commands, those that were run again once.
fn listing(mut commands: Vec<String>) -> String {
    let mut said = HashSet::new();
    commands.retain(|command| said.insert(command.clone()));
    format!("\n```sh\n{}\n```\n", commands.join("\n"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn results_are_found_by_phase_and_length() {
        let bench = json!({"results": [
            {"phase": "prefill", "tokens": 32, "tokens_per_s": 150.5, "gflops": 150.0, "gb_per_s": 1.0, "limit_share": 0.75, "depth": 0},
            {"phase": "decode", "tokens": 32, "tokens_per_s": 25.0, "gflops": 1.0, "gb_per_s": 15.0, "limit_share": 0.5, "depth": 128},
        ]});
        let prefill = Measured::find(&bench, "prefill", 32).unwrap();
        assert_eq!(prefill, Measured { speed: 150.5, share: 0.75, limit: 200.0 });
        let decode = Measured::find(&bench, "decode", 128).unwrap();
        assert_eq!(decode.at_limit(), 50.0);
        assert_eq!(Measured::find(&bench, "decode", 32), None);
        let cells = [Some(prefill), Some(decode), None].map(cell);
        assert_eq!(cells, ["150 (0.75 of 200)", "25.0 (0.50 of 30.0)", "–"]);
    }

    #[test]
    fn commands_that_take_turns_are_listed_once() {
        let commands = ["a", "b", "c", "b", "c"].map(str::to_owned).to_vec();
        assert_eq!(listing(commands), "\n```sh\na\nb\nc\n```\n");
    }

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!((median(&[5.0, 1.0, 9.0]), median(&[8.0, 1.0, 9.0, 2.0])), (5.0, 5.0));
    }
}
