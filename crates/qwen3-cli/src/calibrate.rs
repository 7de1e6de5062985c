//! `qwen3 calibrate`: how fast these ranks read, multiply and add up, kept for `plan` and
//! `--strategy auto`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use qwen3_model::comm::Communicator;
use qwen3_model::{
    AttentionRate, Effort, Groups, HiddenSums, LinkFigures, Machine, Placement, Rate, measure_link,
    measure_speeds,
};
use ranks::{Failure, Neighbours, Rank, RankError};
use serde_json::json;

use crate::calibration::{Calibration, count, default_path, place, processor};
use crate::failure::CliError;
use crate::options::{Auto, LaunchOptions};
use crate::session::isa;

/// Measure these ranks for plan and --strategy auto: latency and bandwidth of sums, memory
/// bandwidth, arithmetic
#[derive(Args, Clone, Debug)]
pub struct CalibrateArgs {
    /// The file to add the figures to [default: qwen3/calibration.json in $XDG_CONFIG_HOME or
    /// ~/.config]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Threads of each rank [default: the cores this process may use, shared among the ranks that
    /// use them]
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Go through an eighth of the memory only: sooner done, but what a large cache holds of it
    /// looks faster than it is in a model
    #[arg(long)]
    quick: bool,

    /// Print one JSON object: {"file","machine"}
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    pub launch: LaunchOptions,
}

impl CalibrateArgs {
    /// Runs the command on this rank.
    pub fn run(&self, rank: &Rank) -> Result<(), Failure> {
        let comm = rank.comm();
        // A file that cannot be read is found before the measurements, not after.
        let file = rank.on_root(|| Ok(self.file()?))?;
        let isa = isa(rank, Auto(None))?;
        let neighbours = Neighbours::find(rank)?;
        let threads = neighbours.threads(rank, self.threads.map(usize::from));
        let placement = Placement::for_rank(neighbours.index, neighbours.count, threads);
        // The machines of the runs that look the figures up: real ones, emulated ones, or those of
        // COMM_NODES.
        let here: Arc<dyn Communicator> = comm.split(comm.machine(), comm.rank())?.into();
        let inside = measure_link(&*here)?;
        let leaders: Arc<dyn Communicator> =
            comm.split(usize::from(here.rank() > 0), comm.rank())?.into();
        let between = if here.rank() == 0 { measure_link(&*leaders)? } else { None };
        let effort = if self.quick { Effort::Quick } else { Effort::Thorough };
        let groups = Groups { all: Arc::clone(comm), here, inside, leaders, between };
        let speeds = measure_speeds(&groups, isa, threads, placement, effort)?;
        rank.agree(Ok::<(), CliError>(()))?;
        let typical = Machine::typical(comm.size(), comm.machines(), threads);
        let machine = Machine {
            transport: comm.transport().to_owned(),
            processor: processor(),
            inside: inside.map_or(typical.inside, LinkFigures::from),
            between: between.or(inside).map_or(typical.between, LinkFigures::from),
            hidden: speeds.hidden.unwrap_or(typical.hidden),
            rates: speeds.rates,
            attention: speeds.attention,
            ..typical
        };
        rank.agree_after(|| {
            let Some((path, mut calibration)) = file else { return Ok(()) };
            // The figures are printed first, whether or not the file can be written, and the file
            // is written whether or not the figures can be printed.
            let printed = self.print(rank, &path, &machine);
            calibration.save(&path, machine)?;
            printed?;
            if !self.json {
                rank.print(&format!("saved in {}\n", path.display()))?;
            }
            Ok(())
        })
    }

    /// The file to add to, and what it has.
    fn file(&self) -> Result<(PathBuf, Calibration), CliError> {
        let path = match self.output.clone().or_else(default_path) {
            Some(path) => path,
            None => return Err(CliError::option("--output", "nothing, and no HOME", "a file")),
        };
        // A device has nothing to add to, and a pipe would be waited for.
        let calibration = if path.is_file() || path.is_dir() {
            Calibration::read(&path)?
        } else {
            Calibration::default()
        };
        Ok((path, calibration))
    }

    /// Prints what was measured.
    fn print(&self, rank: &Rank, path: &Path, machine: &Machine) -> Result<(), RankError> {
        if self.json {
            return rank.print(&format!(
                "{}\n",
                json!({ "file": path.display().to_string(), "machine": machine })
            ));
        }
        let Machine { transport, ranks, nodes, threads, inside, between, hidden, .. } = machine;
        let mut text = format!(
            "{} ({transport}), {} each\n",
            place(*ranks, *nodes),
            count(*threads, "thread")
        );
        let link = |name: &str, link: &LinkFigures| {
            format!("{name:<13}{:.2} µs, {:.2} GB/s\n", link.alpha_us, link.beta_gb_s)
        };
        if ranks > nodes {
            text += &link("inside", inside);
        }
        if *nodes > 1 {
            text += &link("between", between);
            let HiddenSums { link, taken } = hidden;
            text += &format!(
                "behind work  {:.2} µs, {:.2} GB/s; takes {:.2} µs, {:.2} GB/s of it\n",
                link.alpha_us, link.beta_gb_s, taken.alpha_us, taken.beta_gb_s
            );
        }
        for Rate { format, start_us, read_gb_s, few_gb_s, gflops } in &machine.rates {
            text += &format!(
                "weights {format:<5}{start_us:.1} µs, {read_gb_s:.1} GB/s one token, {few_gb_s:.1} GB/s eight, {gflops:.0} GFLOP/s many\n"
            );
        }
        for AttentionRate { format, start_us, read_gb_s, gflops } in &machine.attention {
            text += &format!(
                "cache   {format:<5}{start_us:.1} µs, {read_gb_s:.1} GB/s one token, {gflops:.0} GFLOP/s many\n"
            );
        }
        rank.print(&text)
    }
}
