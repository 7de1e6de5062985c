//! What ranks can do: how fast they read and multiply weights, and the links between them, measured or typical.

use comm::{Cluster, Link};
use ops::KvFormat;
use serde::{Deserialize, Serialize};
use tensor::WeightFormat;

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

/// How fast a rank's kernels work with weights, or with cached keys and values, of one format while all ranks are at work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// The format's name.
    pub format: String,
    /// Microseconds of a layer of weights, or of a KV head of a layer, however little there is of it.
    pub start_us: f64,
    /// GB/s of a pass of one token, which has to read all there is.
    pub read_gb_s: f64,
    /// GFLOP/s of a pass of many tokens.
    pub gflops: f64,
}

/// The slowest rank of a group, and the links of the group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The communicator's: `threads`, `mpi`, `solo`.
    pub transport: String,
    /// Ranks of the group.
    pub ranks: usize,
    /// Machines on which they lie.
    pub nodes: usize,
    /// Threads of a rank.
    pub threads: usize,
    /// The link between ranks of one machine.
    pub inside: LinkFigures,
    /// The link between machines; that inside where there is one machine only.
    pub between: LinkFigures,
    /// Of products with weights, by their format, at least one.
    pub rates: Vec<Rate>,
    /// Of attention, by the format of the cache, at least one.
    pub attention: Vec<Rate>,
}

/// Between processes of one machine that share memory.
const SHARED_MEMORY: LinkFigures = LinkFigures { alpha_us: 0.5, beta_gb_s: 8.0 };
/// 10 Gbit/s Ethernet.
const ETHERNET: LinkFigures = LinkFigures { alpha_us: 15.0, beta_gb_s: 1.15 };
/// GB/s and GFLOP/s that the kernels reach on a core of an ordinary server.
const CORE_READ: f64 = 10.0;
const CORE_GFLOPS: f64 = 60.0;
/// The part of the rate of products that attention reaches: its tiles are small and its exponentials count for nothing.
const ATTENTION_SHARE: f64 = 0.6;

impl Machine {
    /// Round figures for machines that nobody measured: shared memory of 0.5 µs and 8 GB/s within a machine, 10 Gbit/s Ethernet of 15 µs and
    /// 1.15 GB/s between machines, 10 GB/s and 60 GFLOP/s for each thread.
    pub fn typical(ranks: usize, nodes: usize, threads: usize) -> Self {
        let cores = threads as f64;
        let rate = |format: &str, start_us, share| Rate {
            format: format.to_owned(),
            start_us,
            read_gb_s: CORE_READ * cores,
            gflops: CORE_GFLOPS * share * cores,
        };
        Self {
            transport: "typical".to_owned(),
            ranks,
            nodes,
            threads,
            inside: SHARED_MEMORY,
            between: if nodes > 1 { ETHERNET } else { SHARED_MEMORY },
            rates: vec![rate(WeightFormat::Bf16.name(), 10.0, 1.0)],
            attention: vec![rate(&KvFormat::F16.to_string(), 1.0, ATTENTION_SHARE)],
        }
    }

    /// The links.
    pub fn cluster(&self) -> Cluster {
        Cluster { inside: self.inside.link(), between: self.between.link() }
    }

    /// The rate of a weight format: its own, or that of the first one measured.
    pub fn rate(&self, format: WeightFormat) -> &Rate {
        named(&self.rates, format.name())
    }

    /// The rate of attention with a cache of this format.
    pub fn attention_rate(&self, format: KvFormat) -> &Rate {
        named(&self.attention, &format.to_string())
    }

    /// Whether all figures are positive numbers and there are rates, as [`plan`](crate::plan) needs.
    pub fn is_sound(&self) -> bool {
        let links = [self.inside, self.between];
        let (sound, latency) = (|x: f64| x.is_finite() && x > 0.0, |x: f64| x.is_finite() && x >= 0.0);
        let mut rates = self.rates.iter().chain(&self.attention);
        ![&self.rates, &self.attention].iter().any(|rates| rates.is_empty())
            && rates.all(|rate| sound(rate.read_gb_s) && sound(rate.gflops) && latency(rate.start_us))
            && links.iter().all(|link| latency(link.alpha_us) && sound(link.beta_gb_s))
            && [self.ranks, self.nodes, self.threads].iter().all(|count| (1..=1 << 20).contains(count))
    }
}

fn named<'a>(rates: &'a [Rate], format: &str) -> &'a Rate {
    rates.iter().find(|rate| rate.format == format).unwrap_or_else(|| &rates[0])
}
