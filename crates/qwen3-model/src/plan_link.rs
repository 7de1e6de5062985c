//! Measuring the links between ranks: sums that are waited for, and sums that travel while the
//! ranks compute.

use std::sync::Arc;
use std::time::Instant;

use comm::{Collective, CommError, Communicator, CommunicatorExt, Link, ReduceOp};
use ops::{Context, Input, Linear, Store, prepare};
use tensor::{Activations, WeightFormat};

use crate::plan_machine::{HiddenSums, LinkFigures};

/// Payloads of the sums that are timed, in f32: 256 B to 4 MiB.
const SIZES: [usize; 8] = [64, 256, 1024, 4096, 16_384, 65_536, 262_144, 1 << 20];
/// Payloads of the sums behind which work is timed: those of half a short prompt's tokens and of a
/// long one's, as f32.
const HIDDEN_SIZES: [usize; 2] = [1 << 15, 1 << 18];
/// Seconds of sums of each size.
const HIDDEN_TIME: f64 = 0.3;
/// The least part of a sum's time that it is taken to cost: less cannot be told from noise.
const NOISE: f64 = 0.02;
/// Rounds of work that are timed without them.
const ALONE: u32 = 100;
/// The work behind which they travel: rows of a product with a matrix of so many rows and columns,
/// a millisecond of a core.
const ROWS: usize = 32;
const WIDTH: usize = 1024;

/// Ranks of a cluster, and the links that [`measure_link`] found between them.
pub struct Groups {
    /// All ranks.
    pub all: Arc<dyn Communicator>,
    /// Those of this rank's machine.
    pub here: Arc<dyn Communicator>,
    /// The link between them, if they are several.
    pub inside: Option<Link>,
    /// One rank of each machine, on these ranks.
    pub leaders: Arc<dyn Communicator>,
    /// The link between them, if they are several; nothing on other ranks.
    pub between: Option<Link>,
}

/// Times Allreduces of several sizes and fits the link between the ranks of `comm`; `None` where
/// there is one rank. All ranks call it and get the same figures: the medians of the slowest rank.
///
/// # Errors
/// When a rank is lost.
pub fn measure_link(comm: &dyn Communicator) -> Result<Option<Link>, CommError> {
    if comm.size() < 2 {
        return Ok(None);
    }
    let mut measured = Vec::new();
    for len in SIZES {
        let mut buf = vec![0.0f32; len];
        let rounds = (1 << 21 >> len.ilog2()).clamp(7, 201);
        let seconds = median(comm, rounds, || comm.all_reduce(&mut buf, ReduceOp::Sum))?;
        measured.push((comm.wire().encoded_bytes(len) as f64, seconds));
    }
    Ok(Link::fit(comm.size(), &measured))
}

/// Times work while the ranks of `comm`, over `link`, add up in the background, as a prompt's
/// halves do. All its ranks call it and get the same figures.
pub(crate) fn measure_hidden(
    ctx: &Context,
    comm: &Arc<dyn Communicator>,
    link: Link,
) -> Result<HiddenSums, CommError> {
    let weights = Linear::sample(ctx, WeightFormat::Bf16, WIDTH, WIDTH);
    let (mut input, mut out) = (Input::default(), Activations::zeros((ROWS, WIDTH)));
    prepare(ctx, &weights, &Activations::ones((ROWS, WIDTH)), &mut input);
    let mut work = || weights.apply(ctx, &input, &mut out, Store::Set);
    let (mut busy, mut taken) = (Vec::new(), Vec::new());
    for len in HIDDEN_SIZES {
        let bytes = comm.wire().encoded_bytes(len) as f64;
        let calls = (HIDDEN_TIME / link.seconds(Collective::Allreduce, comm.size(), bytes))
            .clamp(3.0, 100.0) as usize;
        let alone = each(&**comm, ALONE, &mut work)?;
        // Whoever holds the other end is still adding up.
        let running = Arc::new(());
        let held = Arc::clone(&running);
        let (start, mut rounds) = (Instant::now(), 0);
        let sums = ctx.background.start(comm, move |comm| {
            let _held = held;
            let mut buf = vec![0.0f32; len];
            (0..calls).try_for_each(|_| comm.all_reduce(&mut buf, ReduceOp::Sum))
        });
        while Arc::strong_count(&running) > 1 {
            work();
            rounds += 1;
        }
        let elapsed = start.elapsed().as_secs_f64();
        sums.wait()?;
        let lost = (elapsed - f64::from(rounds) * alone).max(elapsed * NOISE);
        let elapsed = slowest(&**comm, elapsed)? / calls as f64;
        // Where ranks share a core, one has what another lost.
        let all = comm.all_gather_one(lost / calls as f64)?;
        busy.push((bytes, elapsed));
        taken.push((bytes, all.iter().sum::<f64>() / comm.size() as f64));
    }
    let fit = |measured: &[(f64, f64)]| {
        LinkFigures::from(Link::fit(comm.size(), measured).unwrap_or(link))
    };
    Ok(HiddenSums { link: fit(&busy), taken: fit(&taken) })
}

/// The mean time of a round of this rank's work while all ranks work. Not the median: ranks that
/// share a core take turns of several rounds each, so that most rounds take as long as if the core
/// were theirs alone.
fn each(comm: &dyn Communicator, rounds: u32, mut work: impl FnMut()) -> Result<f64, CommError> {
    work();
    comm.barrier()?;
    let start = Instant::now();
    (0..rounds).for_each(|_| work());
    Ok(start.elapsed().as_secs_f64() / f64::from(rounds))
}

/// The longest time of all ranks.
fn slowest(comm: &dyn Communicator, seconds: f64) -> Result<f64, CommError> {
    Ok(comm.all_gather_one(seconds)?.into_iter().fold(0.0, f64::max))
}

/// The median time of `rounds` rounds after one that does not count, that of the slowest rank.
pub(crate) fn median(
    comm: &dyn Communicator,
    rounds: usize,
    mut round: impl FnMut() -> Result<(), CommError>,
) -> Result<f64, CommError> {
    let mut times = Vec::with_capacity(rounds);
    round()?;
    comm.barrier()?;
    for _ in 0..rounds {
        let start = Instant::now();
        round()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    slowest(comm, times[rounds / 2])
}
