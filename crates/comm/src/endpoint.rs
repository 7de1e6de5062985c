//! A rank's end of any group: checks arguments, keeps the ledger, and turns an error into a failure
//! of the job.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::alarm::Membership;
use crate::call::{Call, Header, Site};
use crate::communicator::{Communicator, ReduceOp};
use crate::cost::Crowd;
use crate::error::{CommError, Place};
use crate::ledger::{Activity, Collective, Ledger};
use crate::transport::{Collectives, Counts, Reduction, Transport};
use crate::wire::WireFormat;

/// The deadline of a call unless it is set.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What all kinds of communicators are inside.
pub(crate) struct Endpoint {
    name: &'static str,
    rank: usize,
    /// The rank in the whole job of each rank.
    world: Vec<usize>,
    /// For each rank of the whole job, a number that it shares with the ranks of its machine.
    machine: Arc<[usize]>,
    membership: Arc<Membership>,
    ledger: Arc<Ledger>,
    state: Mutex<State>,
    spin: bool,
    /// In nanoseconds; the largest value is for ever.
    timeout: AtomicU64,
    wire: AtomicU8,
}

struct State {
    /// Nothing in a group of one.
    transport: Option<Box<dyn Transport>>,
    failed: Option<CommError>,
}

impl Endpoint {
    /// The end of this rank in the group of all ranks that `transport` connects. `machine`: for
    /// each rank, a number that it shares with the ranks of its machine; `spin`: whether each rank
    /// has a core.
    pub(crate) fn new(
        name: &'static str,
        machine: Arc<[usize]>,
        membership: Arc<Membership>,
        transport: Option<Box<dyn Transport>>,
        spin: bool,
    ) -> Endpoint {
        Endpoint {
            name,
            rank: membership.rank,
            world: (0..membership.size).collect(),
            machine,
            membership,
            ledger: Arc::default(),
            state: Mutex::new(State { transport, failed: None }),
            spin,
            timeout: AtomicU64::new(TIMEOUT.as_nanos() as u64),
            wire: AtomicU8::new(WireFormat::F32 as u8),
        }
    }

    fn size(&self) -> usize {
        self.world.len()
    }

    fn machines(&self) -> usize {
        let nodes: Vec<usize> = self.world.iter().map(|&rank| self.machine[rank]).collect();
        Crowd::of(&nodes).machines
    }

    fn timeout(&self) -> Duration {
        match self.timeout.load(Relaxed) {
            u64::MAX => Duration::MAX,
            nanos => Duration::from_nanos(nanos),
        }
    }

    fn wire(&self) -> WireFormat {
        WireFormat::ALL[usize::from(self.wire.load(Relaxed))]
    }

    /// Makes a call: `body` checks the arguments and moves the data, over nothing in a group of
    /// one.
    fn call<R>(
        &self,
        header: Header,
        payload: usize,
        body: impl FnOnce(&mut Call<'_>, Option<&mut dyn Transport>) -> Result<R, CommError>,
    ) -> Result<R, CommError> {
        let start = Instant::now();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let State { transport, failed } = &mut *state;
        let (collective, activity) = (header.collective, self.ledger.activity());
        let Activity { phase, layer, background } = activity;
        let mut call = Call {
            site: Site {
                place: Place { collective, phase, layer },
                header,
                rank: self.rank,
                world: &self.world,
            },
            alarm: &self.membership.alarm,
            timeout: self.timeout(),
            spin: self.spin,
            background,
            progress: None,
            waited: Duration::ZERO,
            travelled: Duration::ZERO,
        };
        let result = if let Some(error) = failed {
            Err(error.clone())
        } else if let Some((rank, reason)) = call.alarm.raised() {
            Err(call.site.peer_failed(rank, reason))
        } else {
            // The match shortens the life of the trait object, which `as_deref_mut` leaves at
            // 'static.
            match transport {
                Some(transport) => body(&mut call, Some(&mut **transport)),
                None => body(&mut call, None),
            }
        };
        // An error of MPI knows neither the call that it ends nor the rank that had it.
        let result = result.map_err(|error| match error {
            CommError::Mpi { .. } => call.site.peer_failed(self.membership.rank, error.to_string()),
            error => error,
        });
        if let Err(error) = &result
            && failed.is_none()
        {
            *failed = Some(error.clone());
            match error {
                CommError::PeerFailed { rank, reason, .. } if *rank == self.membership.rank => {
                    self.membership.fail(reason)
                }
                CommError::PeerFailed { rank, reason, .. } => call.alarm.raise(*rank, reason),
                _ => self.membership.fail(&error.to_string()),
            }
        }
        let waited = call.waited;
        self.ledger.record(collective, activity, payload, start.elapsed(), waited);
        result
    }

    fn reduce(&self, data: Reduction<'_>) -> Result<(), CommError> {
        let header = Header::new(Collective::Allreduce, data.len()).reduce(data.op, data.wire);
        self.call(header, data.wire.encoded_bytes(data.len()), |call, transport| {
            let (found, expected) = (data.own().len(), data.len());
            expect(call, "partial.len()", found, expected, "residual.len()")?;
            match transport {
                Some(transport) => return transport.group().all_reduce(call, data),
                None => {
                    if let Some(input) = data.input {
                        data.output.iter_mut().zip(input).for_each(|(sum, value)| *sum += value);
                    }
                }
            }
            Ok(())
        })
    }

    fn gather(
        &self,
        header: Header,
        send: &[u8],
        counts: Counts<'_>,
        recv: &mut [u8],
    ) -> Result<(), CommError> {
        self.call(header, recv.len(), |call, transport| {
            if let Counts::Each(counts) = counts {
                expect(call, "counts.len()", counts.len(), self.size(), "size()")?;
                expect(call, "send.len()", send.len(), counts[self.rank], "counts[rank]")?;
            }
            let total = counts.start(self.size());
            expect(call, "recv.len()", recv.len(), total, "the sum over the ranks")?;
            match transport {
                Some(transport) => transport.group().all_gather(call, send, counts, recv)?,
                None => recv.copy_from_slice(send),
            }
            Ok(())
        })
    }

    /// A message out, a message in, or both. `header` names the one that is waited for.
    fn messages(
        &self,
        header: Header,
        send: Option<(usize, &[u8])>,
        recv: Option<(usize, &mut [u8])>,
    ) -> Result<(), CommError> {
        self.call(header, header.count as usize, |call, transport| {
            let (to, from) = (send.map(|s| s.0), recv.as_ref().map(|r| r.0));
            for (what, peer) in [("to", to), ("from", from)] {
                if let Some(peer) = peer.filter(|&peer| peer >= self.size()) {
                    let range = format_args!("a rank below {}", self.size());
                    return Err(call.site.argument(what, peer, range));
                }
            }
            if to != Some(self.rank) && from != Some(self.rank) {
                let transport = transport.expect("another rank is in a group of at least two");
                return transport.group().send_recv(call, send, recv);
            }
            match (send, recv) {
                (Some((to, send)), Some((from, recv))) if to == from => {
                    expect(call, "recv.len()", recv.len(), send.len(), "send.len()")?;
                    recv.copy_from_slice(send);
                    Ok(())
                }
                _ => Err(call.site.argument("the other end", self.rank, "another rank")),
            }
        })
    }

    /// Agrees on the groups of a split: the members of each, in the order of their ranks there.
    fn groups(
        &self,
        group: &mut dyn Collectives,
        call: &mut Call<'_>,
        color: usize,
        key: usize,
    ) -> Result<(Vec<Vec<usize>>, usize), CommError> {
        let own = [color as u64, key as u64];
        let mut all = vec![[0u64; 2]; self.size()];
        group.all_gather(
            call,
            bytemuck::cast_slice(&own),
            Counts::Equal(size_of_val(&own)),
            bytemuck::cast_slice_mut(&mut all),
        )?;
        let mut order: Vec<usize> = (0..self.size()).collect();
        order.sort_by_key(|&rank| (all[rank][0], all[rank][1], rank));
        let groups: Vec<Vec<usize>> =
            order.chunk_by(|&a, &b| all[a][0] == all[b][0]).map(<[usize]>::to_vec).collect();
        let mine = groups.iter().position(|group| group.contains(&self.rank));
        Ok((groups, mine.expect("every rank is in the group of its color")))
    }
}

fn expect(
    call: &Call<'_>,
    what: &'static str,
    found: usize,
    expected: usize,
    name: &str,
) -> Result<(), CommError> {
    if found == expected {
        Ok(())
    } else {
        Err(call.site.argument(what, found, format_args!("{name} = {expected}")))
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.membership.check_panic();
    }
}

/// Whatever is an endpoint inside is a communicator.
pub(crate) trait End: Send + Sync {
    fn end(&self) -> &Endpoint;
}

impl End for Endpoint {
    fn end(&self) -> &Endpoint {
        self
    }
}

impl<E: End> Communicator for E {
    fn rank(&self) -> usize {
        self.end().rank
    }

    fn size(&self) -> usize {
        self.end().size()
    }

    fn transport(&self) -> &'static str {
        self.end().name
    }

    fn machines(&self) -> usize {
        self.end().machines()
    }

    fn machine(&self) -> usize {
        let end = self.end();
        end.machine[end.world[end.rank]]
    }

    fn ledger(&self) -> &Ledger {
        &self.end().ledger
    }

    fn timeout(&self) -> Duration {
        self.end().timeout()
    }

    fn set_timeout(&self, timeout: Duration) {
        let nanos = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        self.end().timeout.store(nanos, Relaxed);
    }

    fn wire(&self) -> WireFormat {
        self.end().wire()
    }

    fn set_wire(&self, wire: WireFormat) {
        self.end().wire.store(wire as u8, Relaxed);
    }

    fn all_reduce(&self, buf: &mut [f32], op: ReduceOp) -> Result<(), CommError> {
        let end = self.end();
        let (op, wire) = op.on(end.wire());
        end.reduce(Reduction { input: None, output: buf, op, wire })
    }

    fn all_reduce_add(&self, partial: &[f32], residual: &mut [f32]) -> Result<(), CommError> {
        let (end, op) = (self.end(), ReduceOp::Sum);
        end.reduce(Reduction { input: Some(partial), output: residual, op, wire: end.wire() })
    }

    fn reduce_scatter(
        &self,
        send: &[f32],
        counts: &[usize],
        recv: &mut [f32],
    ) -> Result<(), CommError> {
        let end = self.end();
        let wire = end.wire();
        let header = Header::new(Collective::ReduceScatter, send.len())
            .reduce(ReduceOp::Sum, wire)
            .counts(counts);
        end.call(header, wire.encoded_blocks(counts), |call, transport| {
            expect(call, "counts.len()", counts.len(), end.size(), "size()")?;
            expect(call, "send.len()", send.len(), counts.iter().sum(), "the sum of counts")?;
            expect(call, "recv.len()", recv.len(), counts[end.rank], "counts[rank]")?;
            match transport {
                Some(transport) => {
                    transport.group().reduce_scatter(call, send, counts, recv, wire)?
                }
                None => recv.copy_from_slice(send),
            }
            Ok(())
        })
    }

    fn all_gather_bytes(&self, send: &[u8], recv: &mut [u8]) -> Result<(), CommError> {
        let header = Header::new(Collective::Allgather, recv.len());
        self.end().gather(header, send, Counts::Equal(send.len()), recv)
    }

    fn all_gather_v_bytes(
        &self,
        send: &[u8],
        counts: &[usize],
        recv: &mut [u8],
    ) -> Result<(), CommError> {
        let header = Header::new(Collective::Allgatherv, recv.len()).counts(counts);
        self.end().gather(header, send, Counts::Each(counts), recv)
    }

    fn broadcast_bytes(&self, root: usize, buf: &mut [u8]) -> Result<(), CommError> {
        let end = self.end();
        let header = Header::new(Collective::Broadcast, buf.len()).root(root);
        end.call(header, buf.len(), |call, transport| {
            if root >= end.size() {
                let range = format_args!("a rank below {}", end.size());
                return Err(call.site.argument("root", root, range));
            }
            transport.map_or(Ok(()), |transport| transport.group().broadcast(call, root, buf))
        })
    }

    fn send_bytes(&self, to: usize, buf: &[u8]) -> Result<(), CommError> {
        let header = Header::new(Collective::Send, buf.len());
        self.end().messages(header, Some((to, buf)), None)
    }

    fn recv_bytes(&self, from: usize, buf: &mut [u8]) -> Result<(), CommError> {
        let header = Header::new(Collective::Recv, buf.len());
        self.end().messages(header, None, Some((from, buf)))
    }

    fn send_recv_bytes(
        &self,
        to: usize,
        send: &[u8],
        from: usize,
        recv: &mut [u8],
    ) -> Result<(), CommError> {
        let end = self.end();
        // The time of an exchange stands in the line of what is received.
        let none = Duration::ZERO;
        end.ledger.record(Collective::Send, end.ledger.activity(), send.len(), none, none);
        let header = Header::new(Collective::Recv, recv.len());
        end.messages(header, Some((to, send)), Some((from, recv)))
    }

    fn barrier(&self) -> Result<(), CommError> {
        self.end().call(Header::new(Collective::Barrier, 0), 0, |call, transport| {
            transport.map_or(Ok(()), |transport| transport.group().barrier(call))
        })
    }

    fn check(&self) -> Result<(), CommError> {
        let end = self.end();
        // As in a call: threads do not look for failures at the same time.
        let _state = end.state.lock().unwrap_or_else(PoisonError::into_inner);
        let alarm = &end.membership.alarm;
        let departed = || {
            let rank = end.world.iter().copied().find(|rank| alarm.departed(*rank))?;
            Some((rank, "it left while others still needed it".to_owned()))
        };
        match alarm.raised().or_else(|| alarm.probe()).or_else(departed) {
            None => Ok(()),
            Some((rank, reason)) => {
                let Activity { phase, layer, .. } = end.ledger.activity();
                let place = Place { collective: Collective::Barrier, phase, layer };
                Err(CommError::PeerFailed { place, rank, reason, missing: vec![] })
            }
        }
    }

    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Communicator>, CommError> {
        let end = self.end();
        let header = Header::new(Collective::Split, 0);
        let (rank, world, transport) = end.call(header, 0, |call, transport| {
            let Some(transport) = transport else { return Ok((0, end.world.clone(), None)) };
            let (groups, mine) = end.groups(transport.group(), call, color, key)?;
            let transport = transport.split(call, &groups, mine)?;
            let members = &groups[mine];
            let rank = members.iter().position(|&rank| rank == end.rank);
            let world = members.iter().map(|&rank| end.world[rank]).collect();
            Ok((rank.expect("this rank is in its group"), world, transport))
        })?;
        Ok(Box::new(Endpoint {
            name: end.name,
            rank,
            world,
            machine: end.machine.clone(),
            membership: end.membership.clone(),
            ledger: end.ledger.clone(),
            state: Mutex::new(State { transport, failed: None }),
            spin: end.spin,
            timeout: AtomicU64::new(end.timeout.load(Relaxed)),
            wire: AtomicU8::new(end.wire.load(Relaxed)),
        }))
    }

    fn abort(&self, reason: &str) {
        self.end().membership.fail(reason);
    }
}
