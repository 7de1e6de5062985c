//! What ranks can do: how fast they read and multiply weights, and the links between them, measured
//! or typical.

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

/// Sums between machines that travel in the background while the ranks compute.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct HiddenSums {
    /// The link as it is then: a rank that computes looks after its messages late.
    pub link: LinkFigures,
    /// What a sum takes from the work, as if that were a link: cores that compute move the packets,
    /// too.
    pub taken: LinkFigures,
}

/// Rows of a product that count as few: what an expert of a mixture sees of a short prompt.
/// Arithmetic on so many is slower for each than on those that follow.
pub(crate) const FEW: usize = 8;

/// How fast a rank's kernels multiply weights of one format while all ranks are at work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// The format's name.
    pub format: String,
    /// Microseconds of a layer, however little there is of it.
    pub start_us: f64,
    /// GB/s of a pass of one token, which has to read all there is.
    pub read_gb_s: f64,
    /// GB/s of the feed-forward block for eight tokens: what an expert does.
    pub few_gb_s: f64,
    /// GFLOP/s of each token more.
    pub gflops: f64,
}

impl Rate {
    /// Seconds of products of `rows` rows with `elements` weights that take `bytes`: all of them
    /// are read, and rows are multiplied meanwhile.
    pub(crate) fn seconds(&self, bytes: f64, elements: f64, rows: f64) -> f64 {
        let (one, few) = (bytes / self.read_gb_s, bytes / self.few_gb_s);
        let rows_of_few = rows / FEW as f64;
        let more = 2.0 * elements * (rows - FEW as f64).max(0.0) / self.gflops;
        (one.max(few * rows_of_few.min(1.0)) + more) * 1e-9
    }
}

/// How fast a rank attends to keys and values of one format while all ranks are at work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionRate {
    /// The format's name.
    pub format: String,
    /// Microseconds of a KV head of a layer, however few tokens it has.
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
    /// The processor it was measured on, that of rank 0; nothing where the system does not tell, or
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
    /// The link between machines; that inside where there is one machine only.
    pub between: LinkFigures,
    /// Sums behind the work of several machines.
    pub hidden: HiddenSums,
    /// Of products with weights, by their format, at least one.
    pub rates: Vec<Rate>,
    /// Of attention, by the format of the cache, at least one.
    pub attention: Vec<AttentionRate>,
}

/// Between processes of one machine that share memory.
const SHARED_MEMORY: LinkFigures = LinkFigures { alpha_us: 0.5, beta_gb_s: 8.0 };
/// 10 Gbit/s Ethernet.
const ETHERNET: LinkFigures = LinkFigures { alpha_us: 15.0, beta_gb_s: 1.15 };
/// What sums over TCP take from the work of a core.
const PACKETS: LinkFigures = LinkFigures { alpha_us: 50.0, beta_gb_s: 1.0 };
/// GB/s, with one token and with eight, and GFLOP/s that the kernels reach on a core of an ordinary
/// server.
const CORE_READ: f64 = 10.0;
const CORE_FEW: f64 = 6.0;
const CORE_GFLOPS: f64 = 60.0;
/// The part of the rate of products that attention reaches: its tiles are small and its
/// exponentials count for nothing.
const ATTENTION_SHARE: f64 = 0.6;

impl Machine {
    /// Round figures for machines that nobody measured: shared memory of 0.5 µs and 8 GB/s within a
    /// machine, 10 Gbit/s Ethernet of 15 µs and 1.15 GB/s between machines, 10 GB/s and 60 GFLOP/s
    /// for each thread.
    pub fn typical(ranks: usize, nodes: usize, threads: usize) -> Self {
        let cores = threads as f64;
        let (read_gb_s, gflops) = (CORE_READ * cores, CORE_GFLOPS * cores);
        let weights = WeightFormat::Bf16.name().to_owned();
        let cache = KvFormat::F16.to_string();
        Self {
            transport: "typical".to_owned(),
            processor: None,
            ranks,
            nodes,
            threads,
            inside: SHARED_MEMORY,
            between: if nodes > 1 { ETHERNET } else { SHARED_MEMORY },
            hidden: HiddenSums { link: ETHERNET, taken: PACKETS },
            rates: vec![Rate {
                format: weights,
                start_us: 10.0,
                read_gb_s,
                few_gb_s: CORE_FEW * cores,
                gflops,
            }],
            attention: vec![AttentionRate {
                format: cache,
                start_us: 1.0,
                read_gb_s,
                gflops: gflops * ATTENTION_SHARE,
            }],
        }
    }

    /// The links.
    pub fn cluster(&self) -> Cluster {
        Cluster { inside: self.inside.link(), between: self.between.link() }
    }

    /// The links while sums travel behind work, and what they take from it.
    pub(crate) fn hidden(&self) -> [Cluster; 2] {
        let HiddenSums { link, taken } = self.hidden;
        [link, taken].map(|between| Cluster { inside: self.inside.link(), between: between.link() })
    }

    /// The rate of a weight format: its own, or that of the first one measured.
    pub fn rate(&self, format: WeightFormat) -> &Rate {
        self.rates.iter().find(|rate| rate.format == format.name()).unwrap_or(&self.rates[0])
    }

    /// The rate of attention with a cache of this format.
    pub fn attention_rate(&self, format: KvFormat) -> &AttentionRate {
        let name = format.to_string();
        self.attention.iter().find(|rate| rate.format == name).unwrap_or(&self.attention[0])
    }

    /// The first figure that is no positive number (a latency may be zero), with its name, or what
    /// is missing: [`plan`](crate::plan) needs all of them, and JSON cannot hold infinite ones.
    pub fn flaw(&self) -> Option<String> {
        let links = [
            ("inside", self.inside),
            ("between", self.between),
            ("hidden link", self.hidden.link),
            ("hidden taken", self.hidden.taken),
        ];
        let links = links.iter().flat_map(|(of, LinkFigures { alpha_us, beta_gb_s })| {
            [(*of, "alpha_us", *alpha_us), (*of, "beta_gb_s", *beta_gb_s)]
        });
        let products =
            self.rates.iter().flat_map(|Rate { format, start_us, read_gb_s, few_gb_s, gflops }| {
                let figures = [
                    ("start_us", start_us),
                    ("read_gb_s", read_gb_s),
                    ("few_gb_s", few_gb_s),
                    ("gflops", gflops),
                ];
                figures.map(|(name, figure)| (&**format, name, *figure))
            });
        let attends = self.attention.iter().flat_map(
            |AttentionRate { format, start_us, read_gb_s, gflops }| {
                let figures =
                    [("start_us", start_us), ("read_gb_s", read_gb_s), ("gflops", gflops)];
                figures.map(|(name, figure)| (&**format, name, *figure))
            },
        );
        let sound = |name: &str, figure: f64| {
            figure.is_finite()
                && (figure > 0.0 || figure == 0.0 && matches!(name, "alpha_us" | "start_us"))
        };
        let lists = [("rates", self.rates.len()), ("attention", self.attention.len())];
        let counts = [("ranks", self.ranks), ("nodes", self.nodes), ("threads", self.threads)];
        let mut figures = links.chain(products).chain(attends);
        let flaw = figures.find(|(_, name, figure)| !sound(name, *figure));
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
    fn products_read_everything_once_and_multiply_each_row() {
        let rate = Rate {
            format: String::new(),
            start_us: 0.0,
            read_gb_s: 10.0,
            few_gb_s: 4.0,
            gflops: 50.0,
        };
        // 20 GB of 10 G elements: 2 s to read, 5 s for eight rows, 0.4 s for each further one.
        let seconds = |rows| (rate.seconds(20e9, 10e9, rows) * 1e6).round() / 1e6;
        assert_eq!(
            [0.0, 1.0, 3.2, 4.0, 8.0, 9.0, 108.0].map(seconds),
            [2.0, 2.0, 2.0, 2.5, 5.0, 5.4, 45.0]
        );
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
        named(|m| m.rates[0].few_gb_s = 0.0, "few_gb_s of bf16 is 0");
        named(|m| m.rates[0].gflops = f64::NAN, "gflops of bf16 is NaN");
        named(|m| m.rates[0].start_us = -1.0, "start_us of bf16 is -1");
        named(|m| m.attention[0].read_gb_s = -3.5, "read_gb_s of f16 is -3.5");
        named(|m| m.between.beta_gb_s = 0.0, "beta_gb_s of between is 0");
        named(|m| m.hidden.taken.alpha_us = f64::INFINITY, "alpha_us of hidden taken is inf");
        named(|m| m.rates.clear(), "no rates");
        named(|m| m.attention.clear(), "no attention");
        named(|m| m.threads = 0, "threads is 0");
    }
}
