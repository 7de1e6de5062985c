//! What a collective costs on a link: the α–β model, α seconds a message and β bytes a second.
//!
//! For n members and m bytes of payload (as the [`Ledger`](crate::Ledger) counts it), with s =
//! ⌈log₂ n⌉:
//!
//! | collective | seconds |
//! |---|---|
//! | Allreduce | the less of s·(α + m/β) (recursive doubling) and 2·s·α + 2·(n−1)/n·m/β (reduce-scatter, then all-gather) |
//! | Allgather, Allgatherv, Reduce-scatter | s·α + (n−1)/n·m/β |
//! | Broadcast | the less of s·(α + m/β) and (s + n − 1)·α + 2·(n−1)/n·m/β (scatter, then all-gather) |
//! | Send, Recv | α + m/β |
//! | Barrier, Split | s·α |
//!
//! The formulas are those of Thakur, Rabenseifner and Gropp (2005) and of Chan et al. (2007),
//! without the time of the additions.

use std::fmt;
use std::str::FromStr;

use crate::ledger::Collective;

/// A link between ranks or machines.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Link {
    /// α: seconds that any message takes.
    pub latency: f64,
    /// β: bytes a second.
    pub bandwidth: f64,
}

impl Link {
    /// A link from microseconds and GB/s (10⁹ bytes a second), as people state them.
    pub fn from_us_gb_s(latency: f64, bandwidth: f64) -> Link {
        Link { latency: latency * 1e-6, bandwidth: bandwidth * 1e9 }
    }

    /// How `collective` over `members` with `bytes` of payload depends on the link: seconds = `.0`
    /// · α + `.1` / β. Of two algorithms it is the one that is faster on this link.
    pub fn terms(&self, collective: Collective, members: usize, bytes: f64) -> (f64, f64) {
        if members < 2 {
            return (0.0, 0.0);
        }
        let steps = f64::from(members.next_power_of_two().trailing_zeros());
        let share = bytes * (members - 1) as f64 / members as f64;
        let faster = |a: (f64, f64), b: (f64, f64)| if self.of(a) <= self.of(b) { a } else { b };
        match collective {
            Collective::Allreduce => faster((steps, steps * bytes), (2.0 * steps, 2.0 * share)),
            Collective::Allgather | Collective::Allgatherv | Collective::ReduceScatter => {
                (steps, share)
            }
            Collective::Broadcast => {
                faster((steps, steps * bytes), (steps + (members - 1) as f64, 2.0 * share))
            }
            Collective::Send | Collective::Recv => (1.0, bytes),
            Collective::Barrier | Collective::Split => (steps, 0.0),
        }
    }

    /// Seconds that `collective` over `members` with `bytes` of payload takes.
    pub fn seconds(&self, collective: Collective, members: usize, bytes: f64) -> f64 {
        self.of(self.terms(collective, members, bytes))
    }

    /// The link that explains measured Allreduces over `members` best: pairs of payload in bytes
    /// and seconds. Relative errors are squared and added, so that small messages, which show α,
    /// weigh as much as large ones, which show β.
    ///
    /// `None` with fewer than two different sizes.
    pub fn fit(members: usize, measured: &[(f64, f64)]) -> Option<Link> {
        let mut link = Link::from_us_gb_s(1.0, 10.0);
        // Which algorithm a size takes depends on the link, and the link on the algorithms: a few
        // rounds settle both.
        for _ in 0..8 {
            let (mut aa, mut ab, mut bb, mut at, mut bt) = (0.0, 0.0, 0.0, 0.0, 0.0);
            for &(bytes, seconds) in measured {
                let (a, b) = link.terms(Collective::Allreduce, members, bytes);
                let (a, b) = (a / seconds, b / seconds);
                (aa, ab, bb) = (aa + a * a, ab + a * b, bb + b * b);
                (at, bt) = (at + a, bt + b);
            }
            let determinant = aa * bb - ab * ab;
            if determinant.is_nan() || determinant <= 1e-12 * aa * bb {
                return None;
            }
            let latency = (at * bb - bt * ab) / determinant;
            let inverse = (bt * aa - at * ab) / determinant;
            // Noise may ask for less than nothing; the formulas cannot.
            link = Link { latency: latency.max(1e-9), bandwidth: 1.0 / inverse.max(1e-13) };
        }
        Some(link)
    }

    fn of(&self, (messages, bytes): (f64, f64)) -> f64 {
        messages * self.latency + bytes / self.bandwidth
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} µs, {:.3} GB/s", self.latency * 1e6, self.bandwidth * 1e-9)
    }
}

/// A text that is no link.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "found {found:?}, expected microseconds from 0 to 1e6 and GB/s from 1e-9 to 1e6, for example 40,0.117"
)]
pub struct InvalidLink {
    /// The text.
    pub found: String,
}

/// A link is written as `ALPHA_US,BETA_GB_S`: microseconds and GB/s.
impl FromStr for Link {
    type Err = InvalidLink;

    fn from_str(text: &str) -> Result<Self, InvalidLink> {
        let parse = || {
            let (latency, bandwidth) = text.split_once(',')?;
            let (latency, bandwidth) =
                (latency.trim().parse().ok()?, bandwidth.trim().parse().ok()?);
            let fits = (0.0..=1e6).contains(&latency) && (1e-9..=1e6).contains(&bandwidth);
            fits.then(|| Link::from_us_gb_s(latency, bandwidth))
        };
        parse().ok_or_else(|| InvalidLink { found: text.to_owned() })
    }
}

/// Ranks on machines: one link inside each, another between them.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Cluster {
    /// Between the ranks of a machine.
    pub inside: Link,
    /// Between machines.
    pub between: Link,
}

impl Cluster {
    /// Seconds of a collective whose members are on the machines `nodes` (one entry a member):
    /// first within the machines, the fullest of which counts, then between them, one member of
    /// each.
    pub fn seconds(&self, collective: Collective, nodes: &[usize], bytes: f64) -> f64 {
        let Crowd { machines, fullest } = Crowd::of(nodes);
        self.inside.seconds(collective, fullest, bytes)
            + self.between.seconds(collective, machines, bytes)
    }
}

/// How the members of a group lie on machines.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Crowd {
    /// Machines with at least one.
    pub machines: usize,
    /// Members on the machine that has most.
    pub fullest: usize,
}

impl Crowd {
    pub fn of(nodes: &[usize]) -> Crowd {
        let mut sorted = nodes.to_vec();
        sorted.sort_unstable();
        let sizes = sorted.chunk_by(|a, b| a == b).map(<[usize]>::len);
        Crowd { machines: sizes.clone().count(), fullest: sizes.max().unwrap_or(0) }
    }
}

/// The machine of `rank` where `ranks` ranks lie on `nodes` machines in equal contiguous blocks,
/// the first ones one longer.
pub fn node_of(rank: usize, ranks: usize, nodes: usize) -> usize {
    let (each, longer) = (ranks / nodes, ranks % nodes);
    if rank < longer * (each + 1) {
        rank / (each + 1)
    } else {
        longer + (rank - longer * (each + 1)) / each.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_sums_cost_rounds_and_large_ones_bytes() {
        let link: Link = "40,0.125".parse().unwrap();
        let us = |collective, members, bytes| {
            (link.seconds(collective, members, bytes) * 1e6 * 1e3).round() / 1e3
        };
        assert_eq!(us(Collective::Allreduce, 1, 1e9), 0.0);
        assert_eq!(us(Collective::Allreduce, 2, 4096.0), 40.0 + 32.768);
        assert_eq!(us(Collective::Allreduce, 4, 4096.0), 2.0 * (40.0 + 32.768));
        // 2 * 2 * 40 + 2 * 3/4 * 8000, below 2 * (40 + 8000).
        assert_eq!(us(Collective::Allreduce, 4, 1e6), 160.0 + 12_000.0);
        assert_eq!(us(Collective::Allgather, 5, 1e6), 3.0 * 40.0 + 6400.0);
        assert_eq!(us(Collective::Broadcast, 2, 125.0), 41.0);
        assert_eq!(us(Collective::Barrier, 8, 0.0), 120.0);
        assert_eq!(us(Collective::Recv, 8, 125.0), 41.0);
    }

    #[test]
    fn a_fit_finds_the_link_that_made_the_times() {
        for members in [2, 3, 4, 7, 16] {
            let link = Link::from_us_gb_s(13.0, 1.15);
            let sizes = [64.0, 4096.0, 65_536.0, 1e6, 8e6];
            let times: Vec<_> =
                sizes.map(|m| (m, link.seconds(Collective::Allreduce, members, m))).to_vec();
            let found = Link::fit(members, &times).unwrap();
            assert!((found.latency / link.latency - 1.0).abs() < 1e-6, "{members}: {found}");
            assert!((found.bandwidth / link.bandwidth - 1.0).abs() < 1e-6, "{members}: {found}");
            assert_eq!(Link::fit(members, &times[..1]), None);
        }
        assert_eq!(Link::fit(1, &[(1.0, 1.0), (2.0, 2.0)]), None);
    }

    #[test]
    fn texts_that_are_no_link() {
        for text in [
            "", "40", "40;1", "x,1", "1,0", "-1,1", "1,-1", "1,1e-10", "nan,1", "1,inf", "1,2,3",
            "2e6,1",
        ] {
            assert!(text.parse::<Link>().unwrap_err().to_string().contains(text), "{text}");
        }
    }

    #[test]
    fn ranks_lie_in_contiguous_blocks() {
        let on =
            |ranks, nodes| (0..ranks).map(|rank| node_of(rank, ranks, nodes)).collect::<Vec<_>>();
        assert_eq!(on(4, 2), [0, 0, 1, 1]);
        assert_eq!(on(5, 2), [0, 0, 0, 1, 1]);
        assert_eq!(on(7, 3), [0, 0, 0, 1, 1, 2, 2]);
        assert_eq!(on(2, 2), [0, 1]);
        assert_eq!(Crowd::of(&on(7, 3)), Crowd { machines: 3, fullest: 3 });
        let cluster = Cluster {
            inside: Link::from_us_gb_s(1.0, 1.0),
            between: Link::from_us_gb_s(10.0, 0.1),
        };
        let us = cluster.seconds(Collective::Allreduce, &on(4, 2), 1000.0) * 1e6;
        assert!((us - (1.0 + 1.0 + 10.0 + 10.0)).abs() < 1e-9, "{us}");
    }
}
