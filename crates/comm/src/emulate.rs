//! A slow link on a fast machine: a communicator whose calls take as long as a given link would
//! make them.
//!
//! Ranks are divided into contiguous blocks, the emulated nodes. A call whose members are on more
//! than one node is made as always; then each rank waits until the time of [`Link::seconds`] over
//! the *nodes* has passed since the last rank came. What the ranks of one node exchange among
//! themselves takes the time that it really takes.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::communicator::{Communicator, ReduceOp};
use crate::cost::{Crowd, Link, node_of};
use crate::error::CommError;
use crate::ledger::{Collective, Ledger};
use crate::wire::WireFormat;

/// The end of a wait that is spun through: sleeping is not more precise than this.
const SPIN: Duration = Duration::from_micros(200);

/// A communicator with an emulated link between blocks of its ranks.
///
/// Results, errors and deadlines are those of the communicator inside. The ledger is this one's
/// own; its seconds include what the link costs.
pub struct EmulatedComm {
    inner: Arc<dyn Communicator>,
    link: Link,
    /// The node of each rank.
    nodes: Vec<usize>,
    machines: usize,
    ledger: Arc<Ledger>,
}

impl EmulatedComm {
    /// Puts `link` between `nodes` contiguous blocks of the ranks of `inner`; the first blocks are
    /// one longer where they do not divide. All ranks do so alike.
    ///
    /// # Errors
    /// When there are no nodes or more than ranks.
    pub fn new(
        inner: Arc<dyn Communicator>,
        link: Link,
        nodes: usize,
    ) -> Result<EmulatedComm, CommError> {
        let size = inner.size();
        if nodes == 0 || nodes > size {
            let reason = format!("found {nodes} nodes, expected 1 to {size}, the number of ranks");
            return Err(CommError::Setup { transport: "emulated", reason });
        }
        let nodes = (0..size).map(|rank| node_of(rank, size, nodes)).collect();
        Ok(EmulatedComm::of(inner, link, nodes, Arc::default()))
    }

    fn of(
        inner: Arc<dyn Communicator>,
        link: Link,
        nodes: Vec<usize>,
        ledger: Arc<Ledger>,
    ) -> EmulatedComm {
        let machines = Crowd::of(&nodes).machines;
        EmulatedComm { inner, link, nodes, machines, ledger }
    }

    /// Makes a call of all members, with `bytes` of payload.
    fn all<R>(
        &self,
        collective: Collective,
        bytes: usize,
        call: impl FnOnce() -> Result<R, CommError>,
    ) -> Result<R, CommError> {
        self.slowed(
            collective,
            bytes,
            self.link.seconds(collective, self.machines, bytes as f64),
            call,
        )
    }

    /// Makes a call and waits until `least` seconds have passed since the last rank came.
    fn slowed<R>(
        &self,
        collective: Collective,
        bytes: usize,
        least: f64,
        call: impl FnOnce() -> Result<R, CommError>,
    ) -> Result<R, CommError> {
        let activity = self.ledger.activity();
        let waited_before = self.waited(collective);
        let start = Instant::now();
        let result = activity.during(call);
        let waited = Duration::from_secs_f64((self.waited(collective) - waited_before).max(0.0));
        if result.is_ok() && least > 0.0 {
            wait_until(start + waited + Duration::from_secs_f64(least), activity.background);
        }
        self.ledger.record(collective, activity, bytes, start.elapsed(), waited);
        result
    }

    /// Seconds that this rank has waited for others in such calls so far.
    fn waited(&self, collective: Collective) -> f64 {
        let entries = self.inner.ledger().entries().into_iter();
        entries.filter(|entry| entry.collective == collective).map(|entry| entry.wait_seconds).sum()
    }

    /// Seconds of a message between this rank and `peer`.
    fn message(&self, peer: usize, bytes: usize) -> f64 {
        let far = self.nodes.get(peer).is_some_and(|node| *node != self.machine());
        if far { self.link.seconds(Collective::Recv, 2, bytes as f64) } else { 0.0 }
    }
}

/// `background`: the core has better things to do than to be precise.
fn wait_until(end: Instant, background: bool) {
    let spin = if background { Duration::ZERO } else { SPIN };
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        if left > spin {
            thread::sleep(left - spin);
        } else {
            // Yields, since the rank that is waited for may need this core.
            thread::yield_now();
        }
    }
}

impl Communicator for EmulatedComm {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn size(&self) -> usize {
        self.inner.size()
    }

    fn transport(&self) -> &'static str {
        self.inner.transport()
    }

    fn machines(&self) -> usize {
        self.machines
    }

    fn machine(&self) -> usize {
        self.nodes[self.inner.rank()]
    }

    fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    fn timeout(&self) -> Duration {
        self.inner.timeout()
    }

    fn set_timeout(&self, timeout: Duration) {
        self.inner.set_timeout(timeout);
    }

    fn wire(&self) -> WireFormat {
        self.inner.wire()
    }

    fn set_wire(&self, wire: WireFormat) {
        self.inner.set_wire(wire);
    }

    fn all_reduce(&self, buf: &mut [f32], op: ReduceOp) -> Result<(), CommError> {
        let (_, wire) = op.on(self.wire());
        self.all(Collective::Allreduce, wire.encoded_bytes(buf.len()), || {
            self.inner.all_reduce(buf, op)
        })
    }

    fn all_reduce_add(&self, partial: &[f32], residual: &mut [f32]) -> Result<(), CommError> {
        let bytes = self.wire().encoded_bytes(residual.len());
        self.all(Collective::Allreduce, bytes, || self.inner.all_reduce_add(partial, residual))
    }

    fn reduce_scatter(
        &self,
        send: &[f32],
        counts: &[usize],
        recv: &mut [f32],
    ) -> Result<(), CommError> {
        let bytes = self.wire().encoded_blocks(counts);
        self.all(Collective::ReduceScatter, bytes, || self.inner.reduce_scatter(send, counts, recv))
    }

    fn all_gather_bytes(&self, send: &[u8], recv: &mut [u8]) -> Result<(), CommError> {
        self.all(Collective::Allgather, recv.len(), || self.inner.all_gather_bytes(send, recv))
    }

    fn all_gather_v_bytes(
        &self,
        send: &[u8],
        counts: &[usize],
        recv: &mut [u8],
    ) -> Result<(), CommError> {
        self.all(Collective::Allgatherv, recv.len(), || {
            self.inner.all_gather_v_bytes(send, counts, recv)
        })
    }

    fn broadcast_bytes(&self, root: usize, buf: &mut [u8]) -> Result<(), CommError> {
        self.all(Collective::Broadcast, buf.len(), || self.inner.broadcast_bytes(root, buf))
    }

    fn send_bytes(&self, to: usize, buf: &[u8]) -> Result<(), CommError> {
        let least = self.message(to, buf.len());
        self.slowed(Collective::Send, buf.len(), least, || self.inner.send_bytes(to, buf))
    }

    fn recv_bytes(&self, from: usize, buf: &mut [u8]) -> Result<(), CommError> {
        let least = self.message(from, buf.len());
        self.slowed(Collective::Recv, buf.len(), least, || self.inner.recv_bytes(from, buf))
    }

    fn send_recv_bytes(
        &self,
        to: usize,
        send: &[u8],
        from: usize,
        recv: &mut [u8],
    ) -> Result<(), CommError> {
        // Both directions of a link at once: the slower message counts. Its time stands in the line
        // of what is received.
        let least = self.message(to, send.len()).max(self.message(from, recv.len()));
        let none = Duration::ZERO;
        self.ledger.record(Collective::Send, self.ledger.activity(), send.len(), none, none);
        self.slowed(Collective::Recv, recv.len(), least, || {
            self.inner.send_recv_bytes(to, send, from, recv)
        })
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.all(Collective::Barrier, 0, || self.inner.barrier())
    }

    fn check(&self) -> Result<(), CommError> {
        self.inner.check()
    }

    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Communicator>, CommError> {
        let (inner, nodes) = self.all(Collective::Split, 0, || {
            let inner: Arc<dyn Communicator> = self.inner.split(color, key)?.into();
            let mut nodes = vec![0; inner.size()];
            inner.all_gather_bytes(
                bytemuck::bytes_of(&self.machine()),
                bytemuck::cast_slice_mut(&mut nodes),
            )?;
            Ok((inner, nodes))
        })?;
        Ok(Box::new(EmulatedComm::of(inner, self.link, nodes, Arc::clone(&self.ledger))))
    }

    fn abort(&self, reason: &str) {
        self.inner.abort(reason);
    }
}
