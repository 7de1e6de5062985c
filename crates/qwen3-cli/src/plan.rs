//! `qwen3 plan`: what each way to split a model over ranks costs, and the choice of `--strategy
//! auto`.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use planner::{LinkFigures, Machine, PassCost, Plan, PlanInput, Prediction, Rate, Share, plan};
use qwen3_model::comm::WireFormat;
use qwen3_model::formats::WeightFormats;
use qwen3_model::names::open_weights;
use qwen3_model::options::{ExpertSplit, KvFormat, MlpSchedule, WeightFormat};
use qwen3_model::presets::Preset;
use qwen3_model::{Config, ModelError, ModelOptions, ParallelStrategy};
use qwen3_server::Expected;
use ranks::{Failure, Rank};
use serde_json::{Value, json};

use crate::calibration::{Calibration, Layout, count, place};
use crate::failure::CliError;
use crate::memory::available;
use crate::model_path::ModelPath;
use crate::options::{Auto, EngineOptions, above_zero, choice, from_zero, positive};

/// Predict memory, traffic and speed of each way to split a model over ranks, without loading it
#[derive(Args, Clone, Debug)]
#[command(group(ArgGroup::new("source").required(true).args(["model", "preset"])))]
pub struct PlanArgs {
    /// Folder of a checkpoint, of which config.json and the headers of *.safetensors are read, or a
    /// config.json alone
    #[arg(long, value_name = "PATH")]
    model: Option<ModelPath>,

    /// A published model instead of files
    #[arg(long, value_name = "NAME", value_parser = choice::<Preset>(Preset::ALL.map(Preset::name)))]
    preset: Option<Preset>,

    /// Ranks that would share the model
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    ranks: u16,

    /// Machines on which they would lie, in equal contiguous blocks
    #[arg(long, value_name = "M", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    nodes: u16,

    /// Microseconds of any message on the slowest link: that between machines, or between ranks
    /// where there is one machine
    #[arg(long, value_name = "A", requires = "beta_gb_s", allow_negative_numbers = true, value_parser = from_zero::<f64>)]
    alpha_us: Option<f64>,

    /// Bandwidth of that link in GB/s (10⁹ bytes)
    #[arg(long, value_name = "B", requires = "alpha_us", allow_negative_numbers = true, value_parser = above_zero::<f64>)]
    beta_gb_s: Option<f64>,

    /// Threads of each rank [default: as calibrated, otherwise 1]
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,

    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = positive)]
    prompt: usize,

    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256)]
    generate: usize,

    /// Format of the weights in memory; auto keeps what the checkpoint stores, or without one takes
    /// the config's dtype (bf16 if it has none)
    #[arg(long, default_value = "auto", value_parser = choice::<Auto<WeightFormat>>(&["auto", "f32", "bf16", "f16", "q8", "q4"]))]
    weights: Auto<WeightFormat>,

    /// Format of cached keys and values
    #[arg(long, default_value = "f16", value_parser = choice::<KvFormat>(&["f32", "f16", "q8"]))]
    kv: KvFormat,

    /// How sums travel between ranks; auto takes bf16 between machines and f32 within one
    #[arg(long, default_value = "auto", value_parser = choice::<Auto<WireFormat>>(&["auto", "f32", "bf16", "q8"]))]
    wire: Auto<WireFormat>,

    /// Only this feed-forward schedule
    #[arg(long, value_parser = choice::<MlpSchedule>(&["fused", "naive", "gathered", "local"]))]
    mlp: Option<MlpSchedule>,

    /// List the schedules that exchange more than they have to, too
    #[arg(long)]
    all: bool,

    /// The file of `qwen3 calibrate` [default: its own, where there is one]
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,

    /// Print one JSON object: {"model","ranks","nodes","figures","machine","ways","recommended"}
    #[arg(long)]
    json: bool,
}

/// Whether the path is a `config.json` instead of a model.
fn is_config(path: &Path) -> bool {
    path.is_file() && path.extension().is_some_and(|extension| extension == "json")
}

/// The config and the formats of a checkpoint's weights.
fn headers(
    model: &ModelPath,
    weights: Option<WeightFormat>,
) -> Result<(Config, WeightFormats), CliError> {
    let source = model.open()?;
    let config = Config::read(&source)?;
    let weights_of = open_weights::<ModelError>(&source, &config)?;
    let formats = WeightFormats::read(&config, weights_of, weights).map_err(ModelError::from)?;
    Ok((config, formats))
}

impl PlanArgs {
    /// The model's name, its config, and the formats of its weights.
    fn source(&self) -> Result<(String, Config, WeightFormats), CliError> {
        let (name, value) = match (&self.preset, &self.model) {
            (Some(preset), _) => (preset.name().to_owned(), preset.config(None)),
            (None, Some(model)) if is_config(model.path()) => {
                let path = model.path();
                let text = fs::read(path).map_err(|source| CliError::file(path, source))?;
                let value = serde_json::from_slice(&text).map_err(|error| {
                    CliError::option(
                        "--model",
                        format!("{}: {error}", path.display()),
                        "a config.json",
                    )
                })?;
                (path.display().to_string(), value)
            }
            (None, Some(model)) => {
                let (config, formats) = headers(model, self.weights.0)?;
                return Ok((model.display().to_string(), config, formats));
            }
            (None, None) => unreachable!("clap requires one of the two"),
        };
        let config = Config::from_json(Path::new(&name), &value).map_err(ModelError::from)?;
        let dtype = ["dtype", "torch_dtype"].iter().find_map(|field| value[field].as_str());
        let stored = match dtype {
            Some("float32") => WeightFormat::F32,
            Some("float16") => WeightFormat::F16,
            _ => WeightFormat::Bf16,
        };
        let formats = WeightFormats::uniform(&config, self.weights.0.unwrap_or(stored), stored);
        Ok((name, config, formats))
    }

    /// Runs the command on rank 0.
    pub fn run(&self, rank: &Rank) -> Result<(), CliError> {
        let (ranks, nodes) = (usize::from(self.ranks), usize::from(self.nodes));
        if nodes > ranks {
            return Err(CliError::option(
                "--nodes",
                nodes,
                format!("at most {ranks}, the number of ranks"),
            ));
        }
        let (name, config, weights) = self.source()?;
        let context = config.context_length();
        if self.prompt.saturating_add(self.generate) > context {
            let found = format!(
                "{} tokens with what is generated",
                self.prompt.saturating_add(self.generate)
            );
            return Err(CliError::option(
                "--prompt",
                found,
                format!("at most {context}, the model's context"),
            ));
        }
        let (machine, figures) = self.machine(ranks, nodes)?;
        let plan = plan(&PlanInput {
            kv: self.kv,
            wire: self.wire.on(nodes),
            prompt: self.prompt,
            generate: self.generate,
            schedule: self.mlp,
            all_schedules: self.all,
            ..PlanInput::new(&config, &weights, &machine)
        });
        Ok(rank.print(&if self.json {
            self.object(&name, &plan, &machine, &figures)
        } else {
            self.table(&plan, &machine, weights.main(), &figures)
        })?)
    }

    /// The machine to plan for, and where its figures come from.
    fn machine(&self, ranks: usize, nodes: usize) -> Result<(Machine, String), CliError> {
        let threads = self.threads.map(usize::from);
        let link = self
            .alpha_us
            .zip(self.beta_gb_s)
            .map(|(alpha_us, beta_gb_s)| LinkFigures { alpha_us, beta_gb_s });
        // Ranks on several machines are MPI processes. A file that the user names may have figures
        // of any ranks.
        let transport = (nodes > 1 && self.calibration.is_none()).then_some("mpi");
        let layout = Layout { transport, ranks, nodes, threads, link };
        let Some(path) = &self.calibration else { return Ok(Calibration::by_itself(&layout)) };
        let calibration = Calibration::read(path)?;
        let machine = calibration.machine(&layout).ok_or_else(|| {
            let each = threads
                .map_or(String::new(), |threads| format!(", {} each", count(threads, "thread")));
            let link =
                if nodes > 1 && link.is_none() { ", or --alpha-us and --beta-gb-s" } else { "" };
            let wanted = format!("{}{each}{link}", place(ranks, nodes));
            CliError::option(
                "--calibration",
                format!("{} with {}", path.display(), calibration.content()),
                wanted,
            )
        })?;
        let figures = format!("calibrated ({}, {})", machine.transport, path.display());
        Ok((machine, figures))
    }

    fn object(&self, name: &str, plan: &Plan, machine: &Machine, figures: &str) -> String {
        let ways: Vec<Value> = plan.ways.iter().map(|way| self.way(way)).collect();
        let best = &plan.ways[plan.best];
        let object = json!({
            "model": name,
            "ranks": self.ranks,
            "nodes": self.nodes,
            "figures": figures,
            "machine": machine,
            "ways": ways,
            "recommended": {
                "strategy": best.strategy.to_string(), "mlp": best.schedule.to_string(), "experts": best.experts.to_string(),
            },
        });
        format!("{object}\n")
    }

    fn way(&self, way: &Prediction) -> Value {
        let share = |share: &Share| {
            let Share { most, least, sum, total, .. } = *share;
            json!({ "most": most, "least": least, "sum": sum, "total": total, "imbalance": share.imbalance() })
        };
        let imbalance = &way.imbalance;
        let pass = |pass: &PassCost, tokens: usize| {
            json!({
                "calls": pass.calls, "bytes": pass.bytes, "work_ms": pass.work_seconds * 1e3,
                "collectives_ms": pass.collective_seconds * 1e3, "tokens_per_s": tokens as f64 / pass.seconds(),
            })
        };
        json!({
            "strategy": way.strategy.to_string(),
            "mlp": way.schedule.to_string(),
            "experts": way.experts.to_string(),
            "weight_bytes": way.weight_bytes,
            "kv_bytes": way.kv_bytes,
            "activation_bytes": way.activation_bytes,
            "imbalance": {
                "query_heads": share(&imbalance.query_heads), "kv_heads": share(&imbalance.kv_heads),
                "columns": share(&imbalance.columns), "vocabulary": share(&imbalance.vocabulary),
            },
            "prompt": pass(&way.prompt, self.prompt),
            "token": pass(&way.token, 1),
        })
    }

    fn table(&self, plan: &Plan, machine: &Machine, format: WeightFormat, figures: &str) -> String {
        let (ranks, nodes) = (usize::from(self.ranks), usize::from(self.nodes));
        let most = |bytes: &[usize]| bytes.iter().max().copied().unwrap_or(0) as f64 / 1e6;
        let mut text = format!(
            "{}; prompt {}, answer {} tokens\n",
            place(ranks, nodes),
            self.prompt,
            self.generate
        );
        text += &format!("figures: {figures}\n");
        // The links that these ranks have.
        let links = [
            ("inside a machine", machine.inside, ranks > nodes),
            ("between machines", machine.between, nodes > 1),
        ];
        for (name, LinkFigures { alpha_us, beta_gb_s }, _) in
            links.into_iter().filter(|(.., there)| *there)
        {
            text += &format!("  {name}: {alpha_us:.2} µs, {beta_gb_s:.3} GB/s\n");
        }
        let Rate { format, read_gb_s, gflops, .. } = machine.rate(format);
        text += &format!(
            "  a rank with {format} weights: {read_gb_s:.1} GB/s for one token, {gflops:.0} GFLOP/s for many\n\n"
        );
        text += "way                            MB weights  MB cache  MB activations  imbalance  calls/token  bytes/token  calls/prompt  MB/prompt  prompt tok/s  decode tok/s\n";
        for way in &plan.ways {
            let Prediction { prompt, token, imbalance, .. } = way;
            let uneven = [&imbalance.query_heads, &imbalance.columns, &imbalance.vocabulary];
            let uneven = uneven.iter().map(|share| share.imbalance()).fold(1.0, f64::max);
            text += &format!(
                "{:<29} {:>11.1} {:>9.1} {:>15.1} {:>10.2} {:>12} {:>12} {:>13} {:>10.2} {:>13.1} {:>13.1}\n",
                format!("{} {}{}", way.strategy, way.schedule, whole_experts(way)),
                most(&way.weight_bytes),
                most(&way.kv_bytes),
                most(&way.activation_bytes),
                uneven,
                token.calls,
                token.bytes,
                prompt.calls,
                prompt.bytes as f64 / 1e6,
                self.prompt as f64 / prompt.seconds(),
                1.0 / token.seconds(),
            );
        }
        let best = &plan.ways[plan.best];
        text + &format!(
            "\nrecommended: {} with feed-forward {}{}\n",
            best.strategy,
            best.schedule,
            whole_experts(best)
        )
    }
}

/// What a way's name says of experts.
fn whole_experts(way: &Prediction) -> &'static str {
    if way.experts == ExpertSplit::Ranks { " with whole experts" } else { "" }
}

/// What a command is going to do, as far as it is known before the model is loaded.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// The command's own cache format, or the one that the user names.
    pub kv: KvFormat,
    /// Tokens of a prompt.
    pub prompt: usize,
    /// Tokens to generate.
    pub generate: usize,
}

/// How long `way` takes next to `best` for the prompt and `generate` tokens, and whether it alone
/// of the two needs more bytes of a rank than there are: the plan passes over such a way however
/// fast it is.
fn beside(way: &Prediction, best: &Prediction, generate: usize, memory: Option<usize>) -> String {
    let share = way.seconds(generate) / best.seconds(generate);
    let lacks = memory.is_some_and(|most| (best.memory()..way.memory()).contains(&most));
    let lacks = if lacks { " in more memory than there is" } else { "" };
    format!("{}{} takes {share:.2} times as long{lacks}", way.strategy, whole_experts(way))
}

/// The strategy for `work` on ranks of `threads` threads, the place of experts, and why: rank 0
/// plans, all ranks get its choice. A checkpoint that cannot be read, or has no experts where they
/// are to be whole, is left to loading to report.
pub fn choose(
    rank: &Rank,
    engine: &EngineOptions,
    threads: usize,
    work: Workload,
) -> Result<(ParallelStrategy, ExpertSplit, String), Failure> {
    let comm = rank.comm();
    let (ranks, nodes) = (comm.size(), comm.machines());
    let (name, experts, reason) = rank.broadcast(|| {
        let whole = engine.experts.0 == Some(ExpertSplit::Ranks);
        let readable = headers(&engine.model, engine.weights.0).ok();
        let fused = engine.mlp.is_none_or(|schedule| schedule == MlpSchedule::Fused);
        let Some((config, weights)) =
            readable.filter(|(config, _)| !whole || fused && config.moe.is_some())
        else {
            let experts = engine.experts.0.unwrap_or_default();
            return Ok((ParallelStrategy::Heads.to_string(), experts.to_string(), String::new()));
        };
        let link = rank.emulated_link().map(LinkFigures::from);
        let layout = Layout {
            transport: Some(comm.transport()),
            ranks,
            nodes,
            threads: Some(threads),
            link,
        };
        let (machine, figures) = Calibration::by_itself(&layout);
        // Emulated machines have the memory of this one.
        let here = if rank.emulated_link().is_some() { ranks } else { ranks.div_ceil(nodes) };
        let prompt = work.prompt.clamp(1, config.context_length());
        let generate = work.generate.min(config.context_length() - prompt);
        let memory = available(Path::new("/")).map(|bytes| bytes / here);
        let plan = plan(&PlanInput {
            kv: work.kv,
            wire: comm.wire(),
            prompt,
            generate,
            chunk: engine.chunk,
            schedule: engine.mlp,
            experts: engine.experts.0,
            memory,
            ..PlanInput::new(&config, &weights, &machine)
        });
        let best = &plan.ways[plan.best];
        let others = plan.ways.iter().filter(|way| way.division() != best.division());
        let others: Vec<_> = others.map(|way| beside(way, best, generate, memory)).collect();
        let reason = format!(
            "{}{} for {prompt} and {generate} tokens with {}: {}; figures {figures}",
            best.strategy,
            whole_experts(best),
            place(ranks, nodes),
            others.join(", ")
        );
        Ok((best.strategy.to_string(), best.experts.to_string(), reason))
    })?;
    let experts = experts.parse().expect("a place's own name");
    Ok((name.parse().expect("a strategy's own name"), experts, reason))
}

/// What a step of one token takes on the ranks of a server, as they divide the model. `choose`
/// finds the machine's figures in the same way.
pub fn expected(rank: &Rank, engine: &EngineOptions, options: &ModelOptions) -> Expected {
    let comm = rank.comm();
    let (ranks, nodes) = (comm.size(), comm.machines());
    // A checkpoint whose headers do not describe its weights in memory has no figures.
    let Ok((config, weights)) = headers(&engine.model, engine.weights.0) else {
        return Expected::default();
    };
    let link = rank.emulated_link().map(LinkFigures::from);
    let threads = Some(options.threads);
    let layout = Layout { transport: Some(comm.transport()), ranks, nodes, threads, link };
    let (machine, _) = Calibration::by_itself(&layout);
    let prompt = 512.clamp(1, config.context_length());
    let plan = plan(&PlanInput {
        kv: options.kv,
        wire: comm.wire(),
        prompt,
        generate: 512.min(config.context_length() - prompt),
        chunk: engine.chunk,
        schedule: options.mlp,
        ..PlanInput::new(&config, &weights, &machine)
    });
    let here = |way: &&Prediction| {
        way.strategy == options.strategy && (ranks == 1 || way.experts == options.experts)
    };
    let Some(way) = plan.ways.iter().find(here) else { return Expected::default() };
    // Figures that were measured name the processor.
    let measured = machine.processor.is_some();
    Expected {
        bytes_per_token: Some(way.token.bytes),
        steps_per_second: measured.then(|| way.token.work_seconds.recip()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_without_the_memory_says_so_however_fast_it_is() {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/austen");
        let (config, weights) = headers(&std::ffi::OsString::from(model).into(), None).unwrap();
        let machine = Machine::typical(2, 1, 1);
        let base = PlanInput::new(&config, &weights, &machine);
        let ways = plan(&PlanInput { prompt: 16, generate: 4, ..base }).ways;
        let [heads, sequence] = &ways[..] else { panic!("two ways: {ways:?}") };
        let told = |memory| beside(sequence, heads, 4, memory);
        let lacks = " times as long in more memory than there is";
        assert!(
            told(Some(heads.memory())).ends_with(lacks)
                && told(Some(sequence.memory() - 1)).ends_with(lacks)
        );
        for memory in [None, Some(sequence.memory()), Some(heads.memory() - 1)] {
            assert!(told(memory).ends_with(" times as long"), "{memory:?}");
        }
    }
}
