//! `qwen3 calibrate`: how fast these ranks read, multiply and add up, kept for `plan` and
//! `--strategy auto`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use planner::{
    Effort, LinkFigures, Machine, Rate, measure_attention, measure_link, measure_products,
};
use qwen3_model::comm::{CommError, Communicator, CommunicatorExt, SoloComm};
use qwen3_model::ops::Context;
use qwen3_model::options::{KvFormat, Placement, WeightFormat};
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

    /// Save the figures even if other programs use the processor meanwhile
    #[arg(long)]
    force: bool,

    /// Print one JSON object: {"file","machine"}
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    pub launch: LaunchOptions,
}

/// The share of the processor that other programs may use during a measurement.
const BUSY: f64 = 0.15;
/// How long the ranks sleep to see what other programs do.
const LOOK: Duration = Duration::from_millis(300);

/// The share of the processor that other programs use while all ranks sleep, on the busiest
/// machine; 0 where the system does not tell.
fn busy_share(comm: &dyn Communicator) -> Result<f64, CommError> {
    comm.barrier()?;
    let before = ticks();
    std::thread::sleep(LOOK);
    let share = before.zip(ticks()).map_or(0.0, |((work, all), (work_now, all_now))| {
        (work_now - work) / (all_now - all).max(1.0)
    });
    Ok(comm.all_gather_one(share)?.into_iter().fold(0.0, f64::max))
}

/// Clock ticks of all cores so far: those at work, and all.
fn ticks() -> Option<(f64, f64)> {
    let text = std::fs::read_to_string("/proc/stat").ok()?;
    let fields = text.lines().next()?.strip_prefix("cpu ")?.split_whitespace();
    // user, nice, system, idle, iowait, irq, softirq, steal; guests are part of the first two.
    let fields: Vec<f64> = fields.take(8).map_while(|field| field.parse().ok()).collect();
    let all: f64 = fields.iter().sum();
    Some((all - fields.get(3)? - fields.get(4)?, all))
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
        let busy = busy_share(&**comm)?;
        // The machines of the runs that look the figures up: real ones, emulated ones, or those of
        // COMM_NODES.
        let here: Arc<dyn Communicator> = comm.split(comm.machine(), comm.rank())?.into();
        let inside = measure_link(&*here)?;
        let leaders = comm.split(usize::from(here.rank() > 0), comm.rank())?;
        let between = if here.rank() == 0 { measure_link(&*leaders)? } else { None };
        let effort = if self.quick { Effort::Quick } else { Effort::Thorough };
        // A rank's operations run alone, but all ranks are at work at the same time.
        let ctx = Context::new(isa, Arc::new(SoloComm::new()), 1, threads, placement)?;
        let (all, share) = (&**comm, here.size());
        let rates = [
            WeightFormat::Bf16,
            WeightFormat::F32,
            WeightFormat::F16,
            WeightFormat::Q8,
            WeightFormat::Q4,
        ];
        let rates = rates.map(|format| measure_products(all, &ctx, share, format, effort));
        let attention = [KvFormat::F16, KvFormat::F32, KvFormat::Q8];
        let attention = attention.map(|format| measure_attention(all, &ctx, share, format, effort));
        let busy = busy.max(busy_share(all)?);
        let typical = Machine::typical(comm.size(), comm.machines(), threads);
        let machine = Machine {
            transport: comm.transport().to_owned(),
            processor: processor(),
            inside: inside.map_or(typical.inside, LinkFigures::from),
            between: between.or(inside).map_or(typical.between, LinkFigures::from),
            rates: rates.into_iter().collect::<Result<_, _>>()?,
            attention: attention.into_iter().collect::<Result<_, _>>()?,
            ..typical
        };
        rank.agree_after(|| {
            let Some((path, mut calibration)) = file else { return Ok(()) };
            // The figures are printed first, whether or not the file can be written, and the file
            // is written whether or not the figures can be printed.
            let printed = self.print(rank, &path, &machine);
            if busy > BUSY && !self.force {
                eprintln!(
                    "warning: other programs use {:.0} % of the processor: the figures are noise, nothing was saved (--force saves them)",
                    busy * 100.0
                );
                return Ok(printed?);
            }
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
        let Machine { transport, ranks, nodes, threads, inside, between, .. } = machine;
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
        }
        for (what, rates) in [("weights", &machine.rates), ("cache", &machine.attention)] {
            for Rate { format, start_us, read_gb_s, gflops } in rates {
                text += &format!(
                    "{what:<8}{format:<5}{start_us:.1} µs, {read_gb_s:.1} GB/s one token, {gflops:.0} GFLOP/s many\n"
                );
            }
        }
        rank.print(&text)
    }
}
