//! What a way of carrying data offers to the endpoint above it, which has checked all arguments.

use std::cell::RefCell;
use std::sync::atomic::Ordering::Relaxed;

use crate::call::{Call, Site};
use crate::communicator::ReduceOp;
use crate::error::CommError;
use crate::wire::WireFormat;

/// An Allreduce: of `output` in place, or of `input` with the result added to `output`.
pub(crate) struct Reduction<'a> {
    pub input: Option<&'a [f32]>,
    pub output: &'a mut [f32],
    pub op: ReduceOp,
    /// F32 unless `op` is a sum.
    pub wire: WireFormat,
}

impl Reduction<'_> {
    pub(crate) fn len(&self) -> usize {
        self.output.len()
    }

    /// What this rank contributes.
    pub(crate) fn own(&self) -> &[f32] {
        self.input.unwrap_or(self.output)
    }
}

/// Bytes per rank of a gathered result.
#[derive(Clone, Copy)]
pub(crate) enum Counts<'a> {
    Equal(usize),
    Each(&'a [usize]),
}

impl Counts<'_> {
    pub(crate) fn of(&self, rank: usize) -> usize {
        match self {
            Counts::Equal(count) => *count,
            Counts::Each(counts) => counts[rank],
        }
    }

    /// Where the block of `rank` begins.
    pub(crate) fn start(&self, rank: usize) -> usize {
        match self {
            Counts::Equal(count) => count * rank,
            Counts::Each(counts) => counts[..rank].iter().sum(),
        }
    }

    pub(crate) fn largest(&self) -> usize {
        match self {
            Counts::Equal(count) => *count,
            Counts::Each(counts) => counts.iter().copied().max().unwrap_or(0),
        }
    }
}

/// How far a message got when it was last moved on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Step {
    pub moved: bool,
    pub done: bool,
}

/// Moves messages on, each named with the other rank, until all are done: `advance` moves one on
/// without waiting. The deadline is for peers that do nothing: it starts again whenever something
/// moved. All messages are looked at in turn, so that all ranks that have not come are known.
pub(crate) fn carry<M>(
    call: &mut Call<'_>,
    messages: Vec<(usize, M)>,
    mut advance: impl FnMut(Site<'_>, &mut M) -> Result<Step, CommError>,
) -> Result<(), CommError> {
    let (site, progress) = (call.site, call.progress);
    let open = RefCell::new(messages);
    while !open.borrow().is_empty() {
        call.wait(
            || {
                let (mut moved, mut result) = (false, Ok(()));
                open.borrow_mut().retain_mut(|(_, message)| {
                    if result.is_err() {
                        return true;
                    }
                    match advance(site, message) {
                        Ok(step) => {
                            moved |= step.moved || step.done;
                            !step.done
                        }
                        Err(error) => {
                            result = Err(error);
                            true
                        }
                    }
                });
                if moved && let Some(progress) = progress {
                    progress.fetch_add(1, Relaxed);
                }
                result.map(|()| moved)
            },
            || {
                let mut peers: Vec<usize> = open.borrow().iter().map(|message| message.0).collect();
                peers.sort_unstable();
                peers.dedup();
                peers
            },
            || 0,
        )?;
    }
    Ok(())
}

/// The collectives of a group of at least two ranks, numbered as in the communicator.
pub(crate) trait Collectives: Send {
    fn all_reduce(&mut self, call: &mut Call<'_>, data: Reduction<'_>) -> Result<(), CommError>;

    fn reduce_scatter(
        &mut self,
        call: &mut Call<'_>,
        send: &[f32],
        counts: &[usize],
        recv: &mut [f32],
        wire: WireFormat,
    ) -> Result<(), CommError>;

    fn all_gather(
        &mut self,
        call: &mut Call<'_>,
        send: &[u8],
        counts: Counts<'_>,
        recv: &mut [u8],
    ) -> Result<(), CommError>;

    fn broadcast(
        &mut self,
        call: &mut Call<'_>,
        root: usize,
        buf: &mut [u8],
    ) -> Result<(), CommError>;

    fn barrier(&mut self, call: &mut Call<'_>) -> Result<(), CommError>;

    /// Sends to and receives from other ranks at the same time.
    fn send_recv(
        &mut self,
        call: &mut Call<'_>,
        send: Option<(usize, &[u8])>,
        recv: Option<(usize, &mut [u8])>,
    ) -> Result<(), CommError>;
}

/// A group, and those that split from it.
pub(crate) trait Transport: Send {
    fn group(&mut self) -> &mut dyn Collectives;

    /// Forms all groups of a split, every rank being in one; returns that of this rank,
    /// `groups[mine]`, or nothing where it has one member only.
    fn split(
        &mut self,
        call: &mut Call<'_>,
        groups: &[Vec<usize>],
        mine: usize,
    ) -> Result<Option<Box<dyn Transport>>, CommError>;
}
