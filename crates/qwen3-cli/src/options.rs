//! The options that commands share: how many ranks, how each computes, how tokens are chosen.

use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use qwen3_model::comm::{Link, WireFormat};
use qwen3_model::options::{
    ActivationFormat, AttentionAlgorithm, ExpertSplit, KvFormat, MlpSchedule, WeightFormat,
};
use qwen3_model::{Isa, ParallelStrategy, SamplingParams};
use ranks::{Emulation, JobOptions, default_wire, numa_domains};

use crate::failure::CliError;
use crate::model_path::ModelPath;

/// A value that is one of `names`, which the help lists; `T` reads them.
pub fn choice<T>(names: impl Into<PossibleValuesParser>) -> impl TypedValueParser<Value = T>
where
    T: FromStr + Clone + Send + Sync + 'static,
    T::Err: ToString,
{
    PossibleValuesParser::new(names)
        .try_map(|name| name.parse::<T>().map_err(|error| error.to_string()))
}

/// Which ranks there are.
#[derive(Args, Clone, Debug)]
pub struct LaunchOptions {
    /// Ranks inside this process, each with its own threads and its share of the weights. Under
    /// mpirun or srun the ranks are the processes, and this option has to stay 1; auto starts one
    /// for each NUMA domain
    #[arg(long, env = "QWEN3_RANKS", value_name = "R", default_value = "1", value_parser = rank_count, help_heading = "Ranks")]
    pub ranks: Auto<u16>,

    /// How many seconds a rank waits in a collective for a late one before the job fails
    #[arg(long, env = "QWEN3_COMM_TIMEOUT", value_name = "S", default_value_t = 60.0, allow_negative_numbers = true, value_parser = seconds, help_heading = "Ranks")]
    pub comm_timeout: f64,

    /// How sums travel between ranks: f32 is exact, bf16 halves the bytes, q8 quarters them; auto
    /// takes bf16 between machines and f32 within one (and for logits and perplexity)
    #[arg(long, env = "QWEN3_WIRE", default_value = "auto", value_parser = choice::<Auto<WireFormat>>(&["auto", "f32", "bf16", "q8"]), help_heading = "Ranks")]
    pub wire: Auto<WireFormat>,

    /// Make calls between emulated nodes take as long as on a link of so many microseconds and
    /// GB/s: 40,0.117 is 1 GbE
    #[arg(
        long,
        value_name = "ALPHA_US,BETA_GB_S",
        allow_hyphen_values = true,
        help_heading = "Ranks"
    )]
    pub emulate_link: Option<Link>,

    /// With --emulate-link: the nodes into which the ranks are divided, in contiguous blocks
    #[arg(long, value_name = "M", requires = "emulate_link", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Ranks")]
    pub emulate_nodes: u16,
}

impl LaunchOptions {
    /// For commands that only read and write files: one rank in this process. Under a launcher rank
    /// 0 does the work, which may take any time, while the others wait.
    pub fn alone() -> Self {
        Self {
            ranks: Auto(Some(1)),
            comm_timeout: f64::from(u32::MAX),
            wire: Auto(None),
            emulate_link: None,
            emulate_nodes: 2,
        }
    }

    /// The same ranks for a command whose figures are exact unless the user chooses a wire format.
    pub fn exact(&self) -> Self {
        Self { wire: Auto(self.wire.0.or(Some(WireFormat::F32))), ..self.clone() }
    }

    /// The job of ranks, of the build `program`.
    pub fn job(&self, program: String) -> JobOptions {
        let nodes = usize::from(self.emulate_nodes);
        JobOptions {
            ranks: self.ranks.0.map_or_else(numa_domains, usize::from),
            timeout: Duration::from_secs_f64(self.comm_timeout),
            wire: self.wire.0,
            emulation: self.emulate_link.map(|link| Emulation { link, nodes }),
            program,
        }
    }
}

/// Which model, and how a rank computes.
#[derive(Args, Clone, Debug)]
pub struct EngineOptions {
    /// The model: a folder as published on Hugging Face, a GGUF file, or the name of a model in the
    /// local cache
    #[arg(long, short = 'm', env = "QWEN3_MODEL", value_name = "MODEL")]
    pub model: ModelPath,

    /// Threads of each rank [default: the cores this process may use, shared among the ranks that
    /// use them]
    #[arg(long, short = 't', env = "QWEN3_THREADS", value_name = "T", value_parser = clap::value_parser!(u16).range(1..=1024), help_heading = "Computing")]
    pub threads: Option<u16>,

    /// What is split over the ranks: the weights (heads), the positions of the text (sequence), or
    /// what the plan for this command recommends (auto; see qwen3 plan)
    #[arg(long, env = "QWEN3_STRATEGY", default_value = "auto", value_parser = choice::<Auto<ParallelStrategy>>(&["auto", "heads", "sequence"]), help_heading = "Computing")]
    pub strategy: Auto<ParallelStrategy>,

    /// Split both: A ranks share the weights, B such groups share the positions; A times B is the
    /// number of ranks
    #[arg(long, value_name = "tp=A,sp=B", conflicts_with = "strategy", value_parser = grid, help_heading = "Computing")]
    pub grid: Option<ParallelStrategy>,

    /// Attention in blocks with a running softmax, or with all scores in memory (the reference)
    #[arg(long, env = "QWEN3_ATTENTION", default_value = "streaming", value_parser = choice::<AttentionAlgorithm>(&["streaming", "materialized"]), help_heading = "Computing")]
    pub attention: AttentionAlgorithm,

    /// How the feed-forward block is split and what it exchanges [default: fused with --strategy
    /// heads, local with --strategy sequence]
    #[arg(long, env = "QWEN3_MLP", value_parser = choice::<MlpSchedule>(&["fused", "naive", "gathered", "local"]), help_heading = "Computing")]
    pub mlp: Option<MlpSchedule>,

    /// Of a mixture of experts, what each rank has: a part of every expert (inside), whole experts
    /// (ranks, with --mlp fused), or what the plan recommends (auto; inside where --strategy is
    /// given)
    #[arg(long, env = "QWEN3_EXPERTS", default_value = "auto", value_parser = choice::<Auto<ExpertSplit>>(&["auto", "inside", "ranks"]), help_heading = "Computing")]
    pub experts: Auto<ExpertSplit>,

    /// Instruction set; auto takes the best one of this CPU (or what SIMD_KERNELS_ISA says)
    #[arg(long, env = "QWEN3_ISA", default_value = "auto", value_parser = choice::<Auto<Isa>>(&["auto", "scalar", "portable", "avx2", "avx2-vnni", "avx512"]), help_heading = "Computing")]
    pub isa: Auto<Isa>,

    /// Format of the weights in memory; auto keeps what the checkpoint stores, q8 and q4 quantize
    /// at load
    #[arg(long, env = "QWEN3_WEIGHTS", default_value = "auto", value_parser = choice::<Auto<WeightFormat>>(&["auto", "f32", "bf16", "f16", "q8", "q4"]), help_heading = "Computing")]
    pub weights: Auto<WeightFormat>,

    /// Format of cached keys and values [default: f16; f32 for logits and perplexity]
    #[arg(long, env = "QWEN3_KV", value_parser = choice::<KvFormat>(&["f32", "f16", "q8"]), help_heading = "Computing")]
    pub kv: Option<KvFormat>,

    /// Activations of products with bf16 weights: bf16 is faster on CPUs with AVX512-BF16, which
    /// all ranks must have, and rounds them to 8 bits of precision
    #[arg(long, default_value = "f32", value_parser = choice::<ActivationFormat>(&["f32", "bf16"]), help_heading = "Computing")]
    pub activations: ActivationFormat,

    /// Prompt tokens that one pass takes at most, for each rank of those that split positions:
    /// fewer need less memory, more are faster
    #[arg(long, env = "QWEN3_CHUNK", value_name = "N", default_value_t = 512, value_parser = positive, help_heading = "Computing")]
    pub chunk: usize,
}

/// An option that may be left to the program: `None` for `auto`.
#[derive(Clone, Copy, Debug)]
pub struct Auto<T>(pub Option<T>);

impl<T: FromStr<Err: ToString>> FromStr for Auto<T> {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        if name == "auto" {
            return Ok(Self(None));
        }
        name.parse().map(|value| Self(Some(value))).map_err(|error: T::Err| error.to_string())
    }
}

impl Auto<WireFormat> {
    /// The format between ranks on so many machines.
    pub fn on(self, machines: usize) -> WireFormat {
        self.0.unwrap_or_else(|| default_wire(machines))
    }
}

/// How the next token is chosen; what is not given is the command's own default.
#[derive(Args, Clone, Debug)]
pub struct SamplingOptions {
    /// 0 takes the likeliest token each time; higher is more varied
    #[arg(long, env = "QWEN3_TEMPERATURE", value_name = "X", allow_negative_numbers = true, value_parser = from_zero::<f32>, help_heading = "Choosing tokens")]
    pub temperature: Option<f32>,

    /// Choose among the K likeliest tokens; 0 for all
    #[arg(long, env = "QWEN3_TOP_K", value_name = "K", help_heading = "Choosing tokens")]
    pub top_k: Option<usize>,

    /// Choose among the likeliest tokens that together have this probability
    #[arg(long, env = "QWEN3_TOP_P", value_name = "P", allow_negative_numbers = true, value_parser = mass, help_heading = "Choosing tokens")]
    pub top_p: Option<f32>,

    /// Drop tokens less likely than this share of the likeliest one
    #[arg(long, env = "QWEN3_MIN_P", value_name = "P", allow_negative_numbers = true, value_parser = probability, help_heading = "Choosing tokens")]
    pub min_p: Option<f32>,

    /// Divide the logits of tokens that were already there by this (multiply negative ones); 1 does
    /// nothing
    #[arg(long, env = "QWEN3_REPETITION_PENALTY", value_name = "X", allow_negative_numbers = true, value_parser = above_zero::<f32>, help_heading = "Choosing tokens")]
    pub repetition_penalty: Option<f32>,

    /// Seed of the random choice: the same seed gives the same tokens on any number of ranks
    /// [default: 0; the time in chat]
    #[arg(long, env = "QWEN3_SEED", value_name = "N", help_heading = "Choosing tokens")]
    pub seed: Option<u64>,
}

impl SamplingOptions {
    /// The first option given that is of no use unless tokens are drawn.
    fn of_draws(&self) -> Option<&'static str> {
        let given = [
            ("--top-k", self.top_k.is_some()),
            ("--top-p", self.top_p.is_some()),
            ("--min-p", self.min_p.is_some()),
            ("--seed", self.seed.is_some()),
        ];
        given.into_iter().find_map(|(option, given)| given.then_some(option))
    }

    /// `base` with what the user chose. Who asks for temperature 0 may know that then nothing is
    /// drawn; who asks for nothing may not.
    pub fn over(&self, base: SamplingParams) -> Result<SamplingParams, CliError> {
        if self.temperature.is_none()
            && base.temperature == 0.0
            && let Some(option) = self.of_draws()
        {
            let found = "given, while the likeliest token is taken each time";
            return Err(CliError::option(option, found, "a --temperature above 0 with it"));
        }
        Ok(SamplingParams {
            temperature: self.temperature.unwrap_or(base.temperature),
            top_k: self.top_k.unwrap_or(base.top_k),
            top_p: self.top_p.unwrap_or(base.top_p),
            min_p: self.min_p.unwrap_or(base.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(base.repetition_penalty),
            seed: self.seed.unwrap_or(base.seed),
            ..base
        })
    }
}

/// A number within bounds, or a message with both.
fn number<T: FromStr + PartialOrd + Copy>(
    text: &str,
    expected: &str,
    fits: impl Fn(T) -> bool,
) -> Result<T, String> {
    match text.parse::<T>() {
        Ok(value) if fits(value) => Ok(value),
        _ => Err(format!("expected {expected}")),
    }
}

fn grid(text: &str) -> Result<ParallelStrategy, String> {
    let strategy =
        text.parse().ok().filter(|strategy| matches!(strategy, ParallelStrategy::Grid { .. }));
    strategy.ok_or_else(|| "expected tp=A,sp=B with numbers above 0".to_owned())
}

/// At least 1.
pub fn positive(text: &str) -> Result<usize, String> {
    number(text, "a whole number, at least 1", |value: usize| value >= 1)
}

fn rank_count(text: &str) -> Result<Auto<u16>, String> {
    if text == "auto" {
        return Ok(Auto(None));
    }
    let count = number(text, "a whole number from 1 to 1024, or auto", |count: u16| {
        (1..=1024).contains(&count)
    })?;
    Ok(Auto(Some(count)))
}

fn seconds(text: &str) -> Result<f64, String> {
    number(text, "seconds above 0, at most 1e6", |value: f64| value > 0.0 && value <= 1e6)
}

/// A latency or a temperature.
pub fn from_zero<T: FromStr + PartialOrd + Copy + From<f32>>(text: &str) -> Result<T, String> {
    number(text, "a number from 0 to 1e6", |value: T| {
        value >= T::from(0.0) && value <= T::from(1e6)
    })
}

/// A bandwidth or a penalty.
pub fn above_zero<T: FromStr + PartialOrd + Copy + From<f32>>(text: &str) -> Result<T, String> {
    number(text, "a number above 0, at most 1e6", |value: T| {
        value > T::from(0.0) && value <= T::from(1e6)
    })
}

fn probability(text: &str) -> Result<f32, String> {
    number(text, "a number from 0 to 1", |value: f32| (0.0..=1.0).contains(&value))
}

fn mass(text: &str) -> Result<f32, String> {
    number(text, "a number above 0, at most 1", |value: f32| value > 0.0 && value <= 1.0)
}
