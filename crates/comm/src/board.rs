//! The first transport: threads put their blocks on a board under a lock and read those of the others.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::communicator::{Communicator, ReduceOp};
use crate::error::{CommError, Place};
use crate::ledger::{Collective, Ledger};
use crate::wire::WireFormat;

type Blocks = Arc<Vec<Vec<u8>>>;

#[derive(Default)]
struct Round {
    kind: Option<(Collective, usize)>,
    here: Vec<Option<Vec<u8>>>,
    done: Option<Blocks>,
    taken: usize,
}

#[derive(Default)]
struct State {
    rounds: HashMap<u64, Round>,
    mail: HashMap<(usize, usize), std::collections::VecDeque<Vec<u8>>>,
    groups: HashMap<(u64, usize), Arc<Board>>,
    failed: Option<(usize, String)>,
}

struct Board {
    size: usize,
    state: Mutex<State>,
    changed: Condvar,
}

/// One rank of a group of threads.
pub struct ThreadComm {
    rank: usize,
    board: Arc<Board>,
    round: AtomicU64,
    ledger: Arc<Ledger>,
    timeout: Mutex<Duration>,
    wire: AtomicU8,
    name: &'static str,
}

/// A group of one rank.
pub struct SoloComm;

impl SoloComm {
    /// The only rank of its group.
    #[allow(clippy::new_ret_no_self)]
    pub fn new() -> ThreadComm {
        let mut solo = ThreadComm::group(1).remove(0);
        solo.name = "solo";
        solo
    }
}

impl ThreadComm {
    /// A group of `size` ranks, in rank order: one for each thread.
    pub fn group(size: usize) -> Vec<ThreadComm> {
        let board = Arc::new(Board {
            size,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        (0..size)
            .map(|rank| ThreadComm::on(board.clone(), rank, Arc::default()))
            .collect()
    }

    fn on(board: Arc<Board>, rank: usize, ledger: Arc<Ledger>) -> ThreadComm {
        ThreadComm {
            rank,
            board,
            round: AtomicU64::new(0),
            ledger,
            timeout: Mutex::new(Duration::from_secs(60)),
            wire: AtomicU8::new(0),
            name: "threads",
        }
    }

    fn place(&self, collective: Collective) -> Place {
        Place {
            collective,
            phase: self.ledger.phase(),
            layer: self.ledger.layer(),
        }
    }

    fn wait<'a, R>(
        &'a self,
        kind: Collective,
        mut state: MutexGuard<'a, State>,
        mut ready: impl FnMut(&mut State) -> Option<R>,
        missing: impl Fn(&State) -> Vec<usize>,
    ) -> Result<R, CommError> {
        let start = Instant::now();
        loop {
            if let Some(result) = ready(&mut state) {
                return Ok(result);
            }
            let place = self.place(kind);
            if let Some((rank, reason)) = state.failed.clone() {
                return Err(CommError::PeerFailed {
                    place,
                    rank,
                    reason,
                });
            }
            let timeout = *self.timeout.lock().unwrap();
            let waited = start.elapsed();
            if waited >= timeout {
                let missing = missing(&state);
                state.failed = Some((self.rank, "deadline".into()));
                self.board.changed.notify_all();
                return Err(CommError::Timeout {
                    place,
                    rank: self.rank,
                    missing,
                    waited,
                });
            }
            let nap = (timeout - waited).min(Duration::from_secs(3600));
            state = self.board.changed.wait_timeout(state, nap).unwrap().0;
        }
    }

    fn exchange(
        &self,
        kind: Collective,
        tag: usize,
        mine: &[u8],
        payload: usize,
    ) -> Result<Blocks, CommError> {
        let start = Instant::now();
        let size = self.board.size;
        let number = self.round.fetch_add(1, Relaxed);
        let mut state = self.board.state.lock().unwrap();
        let round = state.rounds.entry(number).or_default();
        if round.here.is_empty() {
            round.here = vec![None; size];
            round.kind = Some((kind, tag));
        } else if round.kind != Some((kind, tag)) {
            let (other, there) = round.kind.unwrap();
            let peer = round.here.iter().position(Option::is_some).unwrap();
            state.failed = Some((self.rank, format!("calls do not match: {kind} and {other}")));
            self.board.changed.notify_all();
            return Err(CommError::Mismatch {
                place: self.place(kind),
                rank: self.rank,
                here: format!("{kind} of {tag}"),
                peer,
                there: format!("{other} of {there}"),
            });
        }
        round.here[self.rank] = Some(mine.to_vec());
        if round.here.iter().all(Option::is_some) {
            round.done = Some(Arc::new(
                round.here.iter_mut().map(|b| b.take().unwrap()).collect(),
            ));
            self.board.changed.notify_all();
        }
        let waiting = Instant::now();
        let blocks = self.wait(
            kind,
            state,
            |state| {
                let round = state.rounds.get_mut(&number)?;
                let done = round.done.clone()?;
                round.taken += 1;
                if round.taken == size {
                    state.rounds.remove(&number);
                }
                Some(done)
            },
            |state| {
                let here = &state.rounds[&number].here;
                (0..size).filter(|&r| here[r].is_none()).collect()
            },
        );
        self.ledger.record(
            kind,
            self.ledger.phase(),
            payload,
            start.elapsed(),
            waiting.elapsed(),
        );
        blocks
    }

    fn expect(
        &self,
        kind: Collective,
        what: &'static str,
        found: usize,
        expected: usize,
    ) -> Result<(), CommError> {
        if found == expected {
            return Ok(());
        }
        let expected = expected.to_string();
        Err(CommError::Argument {
            place: self.place(kind),
            what,
            found,
            expected,
        })
    }
}

fn read(block: &[u8]) -> impl Iterator<Item = f32> {
    block
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
}

impl Communicator for ThreadComm {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        self.board.size
    }
    fn transport(&self) -> &'static str {
        self.name
    }
    fn ledger(&self) -> &Ledger {
        &self.ledger
    }
    fn timeout(&self) -> Duration {
        *self.timeout.lock().unwrap()
    }
    fn set_timeout(&self, timeout: Duration) {
        *self.timeout.lock().unwrap() = timeout;
    }
    fn wire(&self) -> WireFormat {
        [WireFormat::F32, WireFormat::Bf16, WireFormat::Q8][self.wire.load(Relaxed) as usize]
    }
    fn set_wire(&self, wire: WireFormat) {
        self.wire.store(wire as u8, Relaxed);
    }
    fn all_reduce(&self, buf: &mut [f32], op: ReduceOp) -> Result<(), CommError> {
        let bytes: &[u8] = bytemuck::cast_slice(buf);
        let blocks = self.exchange(Collective::Allreduce, bytes.len(), bytes, bytes.len())?;
        for (rank, block) in blocks.iter().enumerate() {
            for (x, y) in buf.iter_mut().zip(read(block)) {
                *x = match (rank, op) {
                    (0, _) => y,
                    (_, ReduceOp::Sum) => *x + y,
                    (_, ReduceOp::Max) => x.max(y),
                };
            }
        }
        Ok(())
    }
    fn all_reduce_add(&self, partial: &[f32], residual: &mut [f32]) -> Result<(), CommError> {
        self.expect(
            Collective::Allreduce,
            "residual.len()",
            residual.len(),
            partial.len(),
        )?;
        let mut sum = partial.to_vec();
        self.all_reduce(&mut sum, ReduceOp::Sum)?;
        residual.iter_mut().zip(sum).for_each(|(r, s)| *r += s);
        Ok(())
    }
    fn reduce_scatter(
        &self,
        send: &[f32],
        counts: &[usize],
        recv: &mut [f32],
    ) -> Result<(), CommError> {
        let kind = Collective::ReduceScatter;
        self.expect(kind, "counts.len()", counts.len(), self.size())?;
        self.expect(kind, "send.len()", send.len(), counts.iter().sum())?;
        self.expect(kind, "recv.len()", recv.len(), counts[self.rank])?;
        let bytes: &[u8] = bytemuck::cast_slice(send);
        let blocks = self.exchange(kind, bytes.len(), bytes, bytes.len())?;
        let start: usize = counts[..self.rank].iter().sum();
        for (rank, block) in blocks.iter().enumerate() {
            for (x, y) in recv.iter_mut().zip(read(&block[4 * start..])) {
                *x = if rank == 0 { y } else { *x + y };
            }
        }
        Ok(())
    }
    fn all_gather_bytes(&self, send: &[u8], recv: &mut [u8]) -> Result<(), CommError> {
        self.expect(
            Collective::Allgather,
            "recv.len()",
            recv.len(),
            send.len() * self.size(),
        )?;
        let blocks = self.exchange(Collective::Allgather, send.len(), send, recv.len())?;
        recv.copy_from_slice(&blocks.concat());
        Ok(())
    }
    fn all_gather_v_bytes(
        &self,
        send: &[u8],
        counts: &[usize],
        recv: &mut [u8],
    ) -> Result<(), CommError> {
        let kind = Collective::Allgatherv;
        self.expect(kind, "counts.len()", counts.len(), self.size())?;
        self.expect(kind, "recv.len()", recv.len(), counts.iter().sum())?;
        self.expect(kind, "send.len()", send.len(), counts[self.rank])?;
        let blocks = self.exchange(kind, recv.len(), send, recv.len())?;
        recv.copy_from_slice(&blocks.concat());
        Ok(())
    }
    fn broadcast_bytes(&self, root: usize, buf: &mut [u8]) -> Result<(), CommError> {
        let mine: &[u8] = if root == self.rank { buf } else { &[] };
        let blocks = self.exchange(Collective::Broadcast, buf.len(), mine, buf.len())?;
        buf.copy_from_slice(&blocks[root]);
        Ok(())
    }
    fn send_bytes(&self, to: usize, buf: &[u8]) -> Result<(), CommError> {
        let start = Instant::now();
        let mut state = self.board.state.lock().unwrap();
        state
            .mail
            .entry((self.rank, to))
            .or_default()
            .push_back(buf.to_vec());
        self.board.changed.notify_all();
        self.ledger.record(
            Collective::Send,
            self.ledger.phase(),
            buf.len(),
            start.elapsed(),
            Duration::ZERO,
        );
        Ok(())
    }
    fn recv_bytes(&self, from: usize, buf: &mut [u8]) -> Result<(), CommError> {
        let start = Instant::now();
        let kind = Collective::Recv;
        let state = self.board.state.lock().unwrap();
        let next = |state: &mut State| state.mail.get_mut(&(from, self.rank))?.pop_front();
        let message = self.wait(kind, state, next, |_| vec![from])?;
        self.expect(kind, "buf.len()", buf.len(), message.len())?;
        buf.copy_from_slice(&message);
        self.ledger.record(
            kind,
            self.ledger.phase(),
            buf.len(),
            start.elapsed(),
            start.elapsed(),
        );
        Ok(())
    }
    fn send_recv_bytes(
        &self,
        to: usize,
        send: &[u8],
        from: usize,
        recv: &mut [u8],
    ) -> Result<(), CommError> {
        self.send_bytes(to, send)?;
        self.recv_bytes(from, recv)
    }
    fn barrier(&self) -> Result<(), CommError> {
        self.exchange(Collective::Barrier, 0, &[], 0).map(drop)
    }
    fn split(&self, color: usize, key: usize) -> Result<Box<dyn Communicator>, CommError> {
        let number = self.round.load(Relaxed);
        let mine: Vec<u8> = [color, key].iter().flat_map(|v| v.to_le_bytes()).collect();
        let blocks = self.exchange(Collective::Split, 0, &mine, 0)?;
        let word =
            |block: &[u8], i: usize| usize::from_le_bytes(block[8 * i..][..8].try_into().unwrap());
        let mut members: Vec<usize> = (0..self.size())
            .filter(|&r| word(&blocks[r], 0) == color)
            .collect();
        members.sort_by_key(|&r| (word(&blocks[r], 1), r));
        let mut state = self.board.state.lock().unwrap();
        let size = members.len();
        let new = || {
            Arc::new(Board {
                size,
                state: Mutex::default(),
                changed: Condvar::new(),
            })
        };
        let board = state
            .groups
            .entry((number, color))
            .or_insert_with(new)
            .clone();
        let rank = members.iter().position(|&r| r == self.rank).unwrap();
        let part = ThreadComm::on(board, rank, self.ledger.clone());
        part.set_timeout(self.timeout());
        part.set_wire(self.wire());
        Ok(Box::new(part))
    }
    fn abort(&self, reason: &str) {
        let mut state = self.board.state.lock().unwrap();
        state.failed.get_or_insert((self.rank, reason.to_owned()));
        for group in state.groups.values() {
            let mut state = group.state.lock().unwrap();
            state.failed.get_or_insert((self.rank, reason.to_owned()));
            group.changed.notify_all();
        }
        self.board.changed.notify_all();
    }
}

impl Drop for ThreadComm {
    fn drop(&mut self) {
        self.abort(if std::thread::panicking() {
            "its thread panicked"
        } else {
            "it left the group"
        });
    }
}
