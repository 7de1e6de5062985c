//! What ranks can do: how fast they read and multiply weights, and the links between them, measured or typical.

use comm::{Cluster, Link};
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

/// How fast a rank works with weights of one format, all ranks working at the same time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// The format's name.
    pub format: String,
    /// GB/s that its threads read from memory.
    pub read_gb_s: f64,
    /// GFLOP/s of multiply-adds in registers.
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
    /// By format, at least one.
    pub rates: Vec<Rate>,
}

/// Between processes of one machine that share memory.
const SHARED_MEMORY: LinkFigures = LinkFigures { alpha_us: 0.5, beta_gb_s: 8.0 };
/// 10 Gbit/s Ethernet.
const ETHERNET: LinkFigures = LinkFigures { alpha_us: 15.0, beta_gb_s: 1.15 };
/// GB/s and GFLOP/s of a core of an ordinary server.
const CORE_READ: f64 = 10.0;
const CORE_GFLOPS: f64 = 60.0;

impl Machine {
    /// Round figures for machines that nobody measured: shared memory of 0.5 µs and 8 GB/s within a machine, 10 Gbit/s Ethernet of 15 µs and
    /// 1.15 GB/s between machines, 10 GB/s and 60 GFLOP/s for each thread.
    pub fn typical(ranks: usize, nodes: usize, threads: usize) -> Self {
        let rate = Rate {
            format: WeightFormat::Bf16.name().to_owned(),
            read_gb_s: CORE_READ * threads as f64,
            gflops: CORE_GFLOPS * threads as f64,
        };
        Self {
            transport: "typical".to_owned(),
            ranks,
            nodes,
            threads,
            inside: SHARED_MEMORY,
            between: if nodes > 1 { ETHERNET } else { SHARED_MEMORY },
            rates: vec![rate],
        }
    }

    /// The links.
    pub fn cluster(&self) -> Cluster {
        Cluster { inside: self.inside.link(), between: self.between.link() }
    }

    /// The rate of a format: its own, or that of the first one measured.
    pub fn rate(&self, format: WeightFormat) -> &Rate {
        let own = self.rates.iter().find(|rate| rate.format == format.name());
        own.or(self.rates.first()).expect("a machine has at least one rate")
    }

    /// Whether all figures are positive numbers and there is a rate, as [`plan`](crate::plan) needs.
    pub fn is_sound(&self) -> bool {
        let links = [self.inside, self.between];
        let sound = |x: f64| x.is_finite() && x > 0.0;
        !self.rates.is_empty()
            && self.rates.iter().all(|rate| sound(rate.read_gb_s) && sound(rate.gflops))
            && links.iter().all(|link| link.alpha_us.is_finite() && link.alpha_us >= 0.0 && sound(link.beta_gb_s))
            && [self.ranks, self.nodes, self.threads].iter().all(|count| (1..=1 << 20).contains(count))
    }
}
