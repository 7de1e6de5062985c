//! The interface: what a rank can ask of the others.

use std::time::Duration;

use bytemuck::Pod;

use crate::error::CommError;
use crate::ledger::Ledger;
use crate::wire::WireFormat;

/// How an Allreduce combines elements.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum ReduceOp {
    /// The sum, added in rank order wherever one memory holds all inputs.
    Sum,
    /// The largest; NaN only where all are NaN.
    Max,
    /// The sum, sent as f32 whatever [`wire`](Communicator::wire) says: for what others are divided
    /// by.
    ExactSum,
}

impl ReduceOp {
    /// What is computed, and how it travels where sums travel in `wire`.
    pub(crate) fn on(self, wire: WireFormat) -> (ReduceOp, WireFormat) {
        match self {
            ReduceOp::Sum => (ReduceOp::Sum, wire),
            ReduceOp::ExactSum => (ReduceOp::Sum, WireFormat::F32),
            ReduceOp::Max => (ReduceOp::Max, WireFormat::F32),
        }
    }
}

/// One rank's end of a group of ranks.
///
/// All ranks of the group make the same calls in the same order. Calls of several threads on one
/// end are taken one after the other. Every call fails, rather than hangs, when a peer fails or
/// stays away longer than [`timeout`](Communicator::timeout); after a failure every further call of
/// the group fails. All methods may return any [`CommError`].
pub trait Communicator: Send + Sync {
    /// This rank, `0..size()`.
    fn rank(&self) -> usize;

    /// The number of ranks, at least 1.
    fn size(&self) -> usize;

    /// What carries the data: `"solo"`, `"threads"` or `"mpi"`.
    fn transport(&self) -> &'static str;

    /// The number of machines on which the ranks lie, at least 1: real ones, or those that options
    /// or an emulated link make of the ranks.
    fn machines(&self) -> usize;

    /// The machine of this rank, of those that [`machines`](Communicator::machines) counts: a
    /// number that all ranks of the group on this machine have, and no others. The color with which
    /// a split forms a group for each machine.
    fn machine(&self) -> usize;

    /// What this rank has communicated; shared with the communicators split from this one.
    fn ledger(&self) -> &Ledger;

    /// The deadline of a call: how long it waits for a late peer. 60 s unless set.
    fn timeout(&self) -> Duration;

    /// Sets the deadline; [`Duration::MAX`] waits for ever (for a person at a keyboard, say). Ranks
    /// may differ. Time in which this rank was stopped does not count. Failed, departed and killed
    /// peers are noticed all the same. Communicators split later inherit it.
    fn set_timeout(&self, timeout: Duration);

    /// How f32 sums travel.
    fn wire(&self) -> WireFormat;

    /// Sets how f32 sums travel (Allreduce with [`ReduceOp::Sum`], `all_reduce_add`,
    /// Reduce-scatter); the same on all ranks. Communicators split later inherit it.
    fn set_wire(&self, wire: WireFormat);

    /// `buf` becomes the elementwise sum or maximum over the ranks, the same bits on each of them
    /// (NaN is NaN, of any bits).
    fn all_reduce(&self, buf: &mut [f32], op: ReduceOp) -> Result<(), CommError>;

    /// `residual += sum over the ranks of partial`, in one pass over the data; counted as
    /// Allreduce. With equal residuals the results are the same bits on every rank.
    fn all_reduce_add(&self, partial: &[f32], residual: &mut [f32]) -> Result<(), CommError>;

    /// Adds `send` over the ranks; rank r gets the r-th block of the sum, of `counts[r]` elements.
    /// `send` has as many elements as all counts together, `recv` as many as this rank's count.
    fn reduce_scatter(
        &self,
        send: &[f32],
        counts: &[usize],
        recv: &mut [f32],
    ) -> Result<(), CommError>;

    /// Gathers equal blocks of bytes, in rank order: `recv.len() == size * send.len()`.
    fn all_gather_bytes(&self, send: &[u8], recv: &mut [u8]) -> Result<(), CommError>;

    /// Gathers blocks of `counts[r]` bytes (zero allowed), in rank order.
    fn all_gather_v_bytes(
        &self,
        send: &[u8],
        counts: &[usize],
        recv: &mut [u8],
    ) -> Result<(), CommError>;

    /// `buf` becomes what it is on rank `root`.
    fn broadcast_bytes(&self, root: usize, buf: &mut [u8]) -> Result<(), CommError>;

    /// Sends a message of any size. Messages between two ranks keep their order. May wait until the
    /// receiver takes it: in a ring, use [`send_recv_bytes`](Communicator::send_recv_bytes).
    fn send_bytes(&self, to: usize, buf: &[u8]) -> Result<(), CommError>;

    /// Receives the next message of rank `from`, which has to be of `buf.len()` bytes.
    fn recv_bytes(&self, from: usize, buf: &mut [u8]) -> Result<(), CommError>;

    /// Sends to one rank while receiving from another (or the same): all ranks may do so at once.
    fn send_recv_bytes(
        &self,
        to: usize,
        send: &[u8],
        from: usize,
        recv: &mut [u8],
    ) -> Result<(), CommError>;

    /// Returns when all ranks have called it.
    fn barrier(&self) -> Result<(), CommError>;

    /// Returns the failure of the job, if a rank has failed, died or left, without a call of the
    /// other ranks. For a rank that makes no calls for a while.
    fn check(&self) -> Result<(), CommError>;

    /// Forms one group per `color`; within it ranks are ordered by `key`, then by rank here.
    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Communicator>, CommError>;

    /// Fails the job: the pending or next call of every rank returns [`CommError::PeerFailed`] with
    /// this rank and reason. The first reason counts. May be called while another thread is in a
    /// call.
    fn abort(&self, reason: &str);
}

/// The byte calls of [`Communicator`] for slices of plain values.
pub trait CommunicatorExt: Communicator {
    /// Gathers equal blocks in rank order: `recv.len() == size * send.len()`.
    fn all_gather<T: Pod>(&self, send: &[T], recv: &mut [T]) -> Result<(), CommError> {
        self.all_gather_bytes(bytemuck::cast_slice(send), bytemuck::cast_slice_mut(recv))
    }

    /// Every rank's `value`, in rank order: an [`all_gather`](Self::all_gather) of one element.
    fn all_gather_one<T: Pod>(&self, value: T) -> Result<Vec<T>, CommError> {
        let mut all = vec![bytemuck::Zeroable::zeroed(); self.size()];
        self.all_gather(&[value], &mut all)?;
        Ok(all)
    }

    /// Gathers blocks of `counts[r]` elements (zero allowed) in rank order.
    fn all_gather_v<T: Pod>(
        &self,
        send: &[T],
        counts: &[usize],
        recv: &mut [T],
    ) -> Result<(), CommError> {
        let counts: Vec<usize> = counts.iter().map(|count| count * size_of::<T>()).collect();
        self.all_gather_v_bytes(bytemuck::cast_slice(send), &counts, bytemuck::cast_slice_mut(recv))
    }

    /// `buf` becomes what it is on rank `root`.
    fn broadcast<T: Pod>(&self, root: usize, buf: &mut [T]) -> Result<(), CommError> {
        self.broadcast_bytes(root, bytemuck::cast_slice_mut(buf))
    }

    /// Sends a message; see [`Communicator::send_bytes`].
    fn send<T: Pod>(&self, to: usize, buf: &[T]) -> Result<(), CommError> {
        self.send_bytes(to, bytemuck::cast_slice(buf))
    }

    /// Receives the next message of rank `from`, which has to be of `buf.len()` elements.
    fn recv<T: Pod>(&self, from: usize, buf: &mut [T]) -> Result<(), CommError> {
        self.recv_bytes(from, bytemuck::cast_slice_mut(buf))
    }

    /// Sends to one rank while receiving from another.
    fn send_recv<T: Pod>(
        &self,
        to: usize,
        send: &[T],
        from: usize,
        recv: &mut [T],
    ) -> Result<(), CommError> {
        self.send_recv_bytes(to, bytemuck::cast_slice(send), from, bytemuck::cast_slice_mut(recv))
    }
}

impl<C: Communicator + ?Sized> CommunicatorExt for C {}
