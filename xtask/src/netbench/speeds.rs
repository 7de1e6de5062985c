//! The speed of the model on emulated clusters, run by run beside what the plan predicts.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::NetbenchArgs;
use super::cluster::{self, Cluster, Net};
use super::launcher;
use super::results::{Network, Run};
use crate::mpi::Mpi;
use crate::process;

/// No single run of the program takes longer.
const DEADLINE: Duration = Duration::from_secs(180);
/// What is compared. Positions in place of weights are split with whole feed-forward blocks, and a
/// prompt of one pass has no earlier keys, so that no sum travels and the wire's format changes
/// nothing: once is enough.
const RUNS: [(&str, &str); 4] =
    [("heads", "f32"), ("heads", "bf16"), ("heads", "q8"), ("sequence", "f32")];

/// Prompt, where none is asked for, generated tokens and repetitions of a bench.
fn extent(quick: bool) -> [&'static str; 3] {
    if quick { ["64", "8", "1"] } else { ["256", "32", "3"] }
}

/// Measures every network and shows and writes what came of it, after each.
pub fn measure(
    args: &NetbenchArgs,
    mpi: &Mpi,
    program: &Path,
    model: &Path,
    files: &Path,
) -> Result<()> {
    let cores = cluster::cores();
    let delay_us = cluster::can_delay().then_some(args.delay_us);
    if delay_us.is_none() {
        println!(
            "netbench: this kernel has no netem: links have their speed and no delay of their own"
        );
    }
    let [prompt, generated, reps] = extent(args.quick);
    let prompt = &args.prompt.map_or(prompt.to_owned(), |prompt| prompt.to_string());
    let model_path = model.to_string_lossy();
    let rank = ["--json", "--model", &model_path, "--threads", "1"];
    let extent = ["--prompt-len", prompt, "--gen-len", generated, "--reps", reps];
    let bench = [&["bench"], &rank[..], &extent].concat();
    let mut all = json!({
        "mpi": mpi.version, "cores": cores.len(), "quick": args.quick, "delay_us": delay_us,
        "model": model.file_name().map(|name| name.to_string_lossy()), "prompt": prompt, "generated": generated, "reps": reps,
    });
    if args.json.is_some() {
        all["one_rank"] = answer(&mut Command::new(program), &bench, files)?["results"].take();
    }
    let mut networks = Vec::new();
    for &ranks in &args.ranks {
        for &gbit in &args.gbit {
            let cluster = Cluster::build(
                usize::from(ranks),
                &cores,
                Net { gbit, delay_us },
                files.to_path_buf(),
            )?;
            let calibration = files.join("calibration.json");
            std::fs::remove_file(&calibration).ok();
            let file = calibration.to_string_lossy();
            let on_cluster = |args: &[&str]| -> Result<Value> {
                let before = cluster.traffic()?;
                let value = answer(&mut launcher::command(mpi, &cluster, program), args, files)?;
                Ok(json!({ "answer": value, "network_bytes": cluster.traffic()? - before }))
            };
            let calibrated = on_cluster(&[
                "calibrate",
                "--json",
                "--force",
                "--threads",
                "1",
                "--output",
                &file,
            ])?;
            let mut network =
                Network::of(&calibrated["answer"]["machine"], gbit, usize::from(ranks))?;
            let count = ranks.to_string();
            let layout = ["--ranks", &count, "--nodes", &count, "--calibration", &file];
            let plan =
                [&["plan"], &rank[..], &layout, &["--prompt", prompt, "--generate", generated]]
                    .concat();
            for (strategy, wire) in RUNS {
                let planned = answer(
                    &mut Command::new(program),
                    &[&plan[..], &["--wire", wire]].concat(),
                    files,
                )?;
                let measured =
                    on_cluster(&[&bench[..], &["--strategy", strategy, "--wire", wire]].concat())?;
                network.runs.push(Run::of(&measured, &planned, strategy, wire)?);
            }
            println!("{}", network.table());
            networks.push(network.json());
            if let Some(file) = &args.json {
                // After each: a network that fails takes none of the others with it.
                all["networks"] = json!(networks);
                std::fs::write(file, format!("{all:#}\n"))
                    .with_context(|| format!("cannot write {}", file.display()))?;
            }
        }
    }
    Ok(())
}

/// The JSON that a run of the program prints.
fn answer(command: &mut Command, args: &[&str], files: &Path) -> Result<Value> {
    let name = format!("qwen3 {}", args.join(" "));
    let finished = process::answer(command.args(args), &name, files, DEADLINE)?;
    serde_json::from_str(&finished.stdout).with_context(|| format!("{name} printed no JSON"))
}
