//! What ranks can do: how fast they read and multiply, and the links between them, measured or
//! typical.

use qwen3_model::comm::{Cluster, Link};
use qwen3_model::ops::cost::Work;
use qwen3_model::options::KvFormat;
use qwen3_model::tensor::WeightFormat;
use serde::{Deserialize, Serialize};

/// A link in the units in which people state it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinkFigures {
    /// Microseconds of any message.
    pub alpha_us: f64,
    /// GB/s (10⁹ bytes).
    pub beta_gb_s: f64,
}

impl LinkFigures {
    /// The link itself.
    pub fn link(&self) -> Link {
        Link::from_us_gb_s(self.alpha_us, self.beta_gb_s)
    }
}

impl From<Link> for LinkFigures {
    fn from(link: Link) -> Self {
        Self { alpha_us: link.latency * 1e6, beta_gb_s: link.bandwidth * 1e-9 }
    }
}

/// How fast a rank reads and multiplies operands of one format while all ranks are at work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// The format's name.
    pub format: String,
    /// Microseconds of a layer (weights), or of a KV head of a layer (cache), besides reading and
    /// multiplying.
    pub start_us: f64,
    /// GB/s of a pass of one token.
    pub read_gb_s: f64,
    /// GFLOP/s of a pass of many tokens.
    pub gflops: f64,
}

impl Rate {
    /// Seconds of `work`: the longer of reading and multiplying.
    pub fn seconds(&self, work: Work) -> f64 {
        (work.bytes / self.read_gb_s).max(work.flops / self.gflops) * 1e-9
    }

    /// The figures with their names.
    fn figures(&self) -> [(&'static str, f64); 3] {
        [("start_us", self.start_us), ("read_gb_s", self.read_gb_s), ("gflops", self.gflops)]
    }
}

/// The slowest rank of a group, and the links of the group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// What carries the data, as the communicator names it: `threads`, `mpi`, `solo`.
    pub transport: String,
    /// The processor of rank 0 during the measurement; `None` where the system does not tell, or
    /// nothing was measured.
    pub processor: Option<String>,
    /// Ranks of the group.
    pub ranks: usize,
    /// Machines on which they lie.
    pub nodes: usize,
    /// Threads of a rank.
    pub threads: usize,
    /// The link between ranks of one machine.
    pub inside: LinkFigures,
    /// The link between machines; the same as `inside` for one machine.
    pub between: LinkFigures,
    /// Products with weights, by weight format; at least one.
    pub rates: Vec<Rate>,
    /// Attention, by cache format; at least one.
    pub attention: Vec<Rate>,
}

/// Between processes of one machine that share memory.
const SHARED_MEMORY: LinkFigures = LinkFigures { alpha_us: 0.5, beta_gb_s: 8.0 };
/// 10 Gbit/s Ethernet.
const ETHERNET: LinkFigures = LinkFigures { alpha_us: 15.0, beta_gb_s: 1.15 };
/// GB/s and GFLOP/s that the kernels reach on a core of an ordinary server.
const CORE_READ_GB_S: f64 = 10.0;
const CORE_GFLOPS: f64 = 60.0;
/// The part of the arithmetic rate of products that attention reaches: its tiles are small and its
/// exponentials count for nothing.
const ATTENTION_SHARE: f64 = 0.6;

impl Machine {
    /// Round figures for machines that nobody measured: shared memory of 0.5 µs and 8 GB/s within a
    /// machine, 10 Gbit/s Ethernet of 15 µs and 1.15 GB/s between machines, 10 GB/s and 60 GFLOP/s
    /// for each thread.
    pub fn typical(ranks: usize, nodes: usize, threads: usize) -> Self {
        let cores = threads as f64;
        let rate = |format: String, start_us, share| Rate {
            format,
            start_us,
            read_gb_s: CORE_READ_GB_S * cores,
            gflops: CORE_GFLOPS * cores * share,
        };
        Self {
            transport: "typical".to_owned(),
            processor: None,
            ranks,
            nodes,
            threads,
            inside: SHARED_MEMORY,
            between: if nodes > 1 { ETHERNET } else { SHARED_MEMORY },
            rates: vec![rate(WeightFormat::Bf16.name().to_owned(), 10.0, 1.0)],
            attention: vec![rate(KvFormat::F16.to_string(), 1.0, ATTENTION_SHARE)],
        }
    }

    /// The links.
    pub fn cluster(&self) -> Cluster {
        Cluster { inside: self.inside.link(), between: self.between.link() }
    }

    /// The rate of a weight format: its own, or that of the first one measured.
    pub fn rate(&self, format: WeightFormat) -> &Rate {
        self.rates.iter().find(|rate| rate.format == format.name()).unwrap_or(&self.rates[0])
    }

    /// The rate of attention with a cache of this format: its own, or the first one measured.
    pub fn attention_rate(&self, format: KvFormat) -> &Rate {
        let name = format.to_string();
        self.attention.iter().find(|rate| rate.format == name).unwrap_or(&self.attention[0])
    }

    /// The first figure that is no positive number (a latency may be zero), with its name, or what
    /// is missing: [`plan`](crate::plan()) needs all of them, and JSON cannot hold infinite ones.
    pub fn flaw(&self) -> Option<String> {
        let links = [("inside", self.inside), ("between", self.between)];
        let links = links.iter().flat_map(|(of, LinkFigures { alpha_us, beta_gb_s })| {
            [(*of, "alpha_us", *alpha_us), (*of, "beta_gb_s", *beta_gb_s)]
        });
        let rates =
            self.rates.iter().chain(&self.attention).flat_map(|rate| {
                rate.figures().map(|(name, figure)| (&*rate.format, name, figure))
            });
        let sound = |name: &str, figure: f64| {
            figure.is_finite()
                && (figure > 0.0 || figure == 0.0 && matches!(name, "alpha_us" | "start_us"))
        };
        let lists = [("rates", self.rates.len()), ("attention", self.attention.len())];
        let counts = [("ranks", self.ranks), ("nodes", self.nodes), ("threads", self.threads)];
        let flaw = links.chain(rates).find(|(_, name, figure)| !sound(name, *figure));
        let flaw = flaw.map(|(of, name, figure)| format!("{name} of {of} is {figure}"));
        let missing =
            || lists.iter().find(|(_, len)| *len == 0).map(|(name, _)| format!("no {name}"));
        let count = || counts.iter().find(|(_, count)| !(1..=1 << 20).contains(count));
        flaw.or_else(missing).or_else(|| count().map(|(name, count)| format!("{name} is {count}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_takes_as_long_as_reading_or_as_multiplying() {
        let rate = Rate { format: String::new(), start_us: 0.0, read_gb_s: 10.0, gflops: 50.0 };
        let seconds = |flops, bytes| rate.seconds(Work { flops, bytes });
        assert_eq!([seconds(20e9, 20e9), seconds(200e9, 20e9)], [2.0, 4.0]);
    }

    #[test]
    fn a_figure_that_no_plan_can_use_is_named() {
        let flaw = |change: fn(&mut Machine)| {
            let mut machine = Machine::typical(2, 1, 1);
            change(&mut machine);
            machine.flaw()
        };
        assert_eq!(flaw(|_| ()), None);
        assert_eq!(
            flaw(|m| (m.inside.alpha_us, m.rates[0].start_us, m.attention[0].start_us) =
                (0.0, 0.0, 0.0)),
            None
        );
        let named = |change, words: &str| assert_eq!(flaw(change), Some(words.to_owned()));
        named(|m| m.rates[0].read_gb_s = f64::INFINITY, "read_gb_s of bf16 is inf");
        named(|m| m.rates[0].gflops = f64::NAN, "gflops of bf16 is NaN");
        named(|m| m.rates[0].start_us = -1.0, "start_us of bf16 is -1");
        named(|m| m.attention[0].read_gb_s = -3.5, "read_gb_s of f16 is -3.5");
        named(|m| m.between.beta_gb_s = 0.0, "beta_gb_s of between is 0");
        named(|m| m.rates.clear(), "no rates");
        named(|m| m.attention.clear(), "no attention");
        named(|m| m.threads = 0, "threads is 0");
    }
}
