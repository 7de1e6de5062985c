//! Ranks on machines: shared memory inside each, messages between them, and both for a call that
//! needs both.
//!
//! Where there are several machines with several ranks each, a collective goes up to the first rank
//! of each machine (its leader), across between the leaders, and down again, so that each machine's
//! link carries the data once.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use crate::call::Call;
use crate::communicator::ReduceOp;
use crate::error::CommError;
use crate::group::{self, Group};
use crate::mail::{Incoming, Outgoing};
use crate::messages::{Messages, Receiving, Sending};
use crate::mpi_job::{Gather, Job, share};
use crate::mpi_sys::LARGEST_TAG;
use crate::transport::{Collectives, Counts, Reduction, Transport, carry};
use crate::wire::{Fold, WireFormat};

/// How much longer a rank waits for one that may wait for others itself.
const PATIENCE: Duration = Duration::from_millis(500);

/// One rank's end of a group of processes.
pub(crate) struct Nodes {
    job: Arc<Job>,
    /// The rank in MPI's world of each rank.
    world: Vec<usize>,
    rank: usize,
    /// The name of what carries the data of collectives.
    pub path: &'static str,
    data: Box<dyn Collectives>,
}

/// Several machines, at least one with several ranks.
struct Machines {
    /// All ranks, by messages.
    all: Messages,
    /// The ranks of each machine, in order; the first is its leader.
    ranks: Vec<Vec<usize>>,
    /// This rank's machine, and its place there.
    own: (usize, usize),
    /// The ranks of this machine and the leaders as ranks of the whole job.
    world: (Vec<usize>, Vec<usize>),
    /// Nothing where this rank is alone on its machine.
    local: Option<Group>,
    /// On leaders, the group of leaders.
    leaders: Option<Messages>,
}

impl Nodes {
    /// Connects the groups of `groups` (each a list of ranks of the parent, whose ranks in MPI's
    /// world are `world`); returns the end of rank `own` of the parent in its group. Collective
    /// over the parent, whose ranks learn from each other by `gather` (the words of all ranks, one
    /// after the other).
    pub(crate) fn connect(
        job: &Arc<Job>,
        world: &[usize],
        groups: &[Vec<usize>],
        own: usize,
        gather: Gather<'_>,
    ) -> Result<Nodes, CommError> {
        // The tags of all groups of this split: above all that any of its ranks has used.
        let tag = gather(&[job.world.next_tag.load(Relaxed)])?.into_iter().max().unwrap_or(0);
        job.world.next_tag.fetch_max(tag + 3, Relaxed);
        if tag as usize + 3 > LARGEST_TAG {
            let reason = "too many communicators were split off: MPI has no tags left".into();
            return Err(CommError::Setup { transport: "mpi", reason });
        }
        let members =
            groups.iter().find(|group| group.contains(&own)).expect("every rank is in a group");
        let rank = members.iter().position(|&rank| rank == own).expect("the group has this rank");
        let in_world: Vec<usize> = members.iter().map(|&rank| world[rank]).collect();
        let machines = machines(&in_world, &job.machine);
        let at = machines
            .iter()
            .position(|ranks| ranks.contains(&rank))
            .expect("every rank has a machine");
        let local: Vec<usize> = machines[at].iter().map(|&place| members[place]).collect();
        let (words, data) = group::extent(local.len());
        let wanted = job.shared && local.len() > 1;
        let segment = share(if wanted { &local } else { &[] }, own, words, data, gather)?;
        let place =
            machines[at].iter().position(|&r| r == rank).expect("the machine has this rank");
        let shared = segment.map(|segment| Group::new(segment, place, local.len()));
        // All or none: a machine whose ranks share nothing counts as several machines to all others
        // too.
        let failed = gather(&[(wanted && shared.is_none()) as u64])?;
        let off = !job.shared || members.iter().any(|&rank| failed[rank] != 0);
        let tag = tag as usize;
        let all = Messages::new(job, in_world.clone(), rank, tag);
        let (path, data): (_, Box<dyn Collectives>) = match shared {
            // Each is alone on its machine, or shared memory is off or not to be had.
            _ if off || machines.len() == members.len() => ("messages", Box::new(all)),
            Some(group) if machines.len() == 1 => ("shared memory", Box::new(group)),
            local => {
                let of =
                    |ranks: &[usize]| ranks.iter().map(|&rank| in_world[rank]).collect::<Vec<_>>();
                let leading: Vec<usize> = machines.iter().map(|ranks| ranks[0]).collect();
                let world = (of(&machines[at]), of(&leading));
                let leaders =
                    (place == 0).then(|| Messages::new(job, world.1.clone(), at, tag + 2));
                let machines =
                    Machines { all, ranks: machines, own: (at, place), world, local, leaders };
                ("shared memory and messages", Box::new(machines))
            }
        };
        Ok(Nodes { job: job.clone(), world: in_world, rank, path, data })
    }
}

/// The ranks of each machine, in the order of their first ranks.
fn machines(in_world: &[usize], machine: &[usize]) -> Vec<Vec<usize>> {
    let mut machines: Vec<(usize, Vec<usize>)> = Vec::new();
    for (rank, &world) in in_world.iter().enumerate() {
        match machines.iter_mut().find(|(id, _)| *id == machine[world]) {
            Some((_, ranks)) => ranks.push(rank),
            None => machines.push((machine[world], vec![rank])),
        }
    }
    machines.into_iter().map(|(_, ranks)| ranks).collect()
}

impl Machines {
    /// Runs a part of a call among the ranks of this machine, if there are others. They wait a
    /// little longer than their leader, which may itself wait for another machine and then knows
    /// better who is late, and as long as it moves something.
    fn local(
        &mut self,
        call: &mut Call<'_>,
        part: impl FnOnce(&mut Group, &mut Call<'_>) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        match &mut self.local {
            Some(group) => call.among(self.own.1, &self.world.0, None, |call| {
                if self.own.1 != 0 {
                    call.timeout = call.timeout.saturating_add(2 * PATIENCE);
                }
                part(group, call)
            }),
            None => Ok(()),
        }
    }

    /// Runs a part of a call among the leaders, if this rank is one, and notes how much of it was
    /// no waiting. Leaders wait for each other a little longer than inside their machines: a leader
    /// that is late because of its neighbour says so first.
    fn across(
        &mut self,
        call: &mut Call<'_>,
        part: impl FnOnce(&mut Messages, &mut Call<'_>) -> Result<(), CommError>,
    ) -> Result<(), CommError> {
        match &mut self.leaders {
            Some(leaders) => {
                let (start, waited) = (Instant::now(), call.waited);
                let progress = self.local.as_ref().map(Group::progress);
                let result = call.among(self.own.0, &self.world.1, progress, |call| {
                    call.timeout = call.timeout.saturating_add(PATIENCE);
                    part(leaders, call)
                });
                call.travelled = start.elapsed().saturating_sub(call.waited - waited);
                result
            }
            None => Ok(()),
        }
    }

    /// The place of a rank in this machine's shared memory.
    fn place(&self, rank: usize) -> Option<usize> {
        self.local.as_ref()?;
        self.ranks[self.own.0].iter().position(|&other| other == rank)
    }
}

impl Collectives for Machines {
    fn all_reduce(&mut self, call: &mut Call<'_>, data: Reduction<'_>) -> Result<(), CommError> {
        let Reduction { input, output, op, wire } = data;
        let mut scratch = input.map(<[f32]>::to_vec);
        let sum: &mut [f32] = scratch.as_deref_mut().unwrap_or(output);
        let exact = |output| Reduction { input: None, output, op, wire: WireFormat::F32 };
        self.local(call, |group, call| group.all_reduce(call, exact(sum)))?;
        self.across(call, |leaders, call| {
            leaders.all_reduce(call, Reduction { input: None, output: sum, op, wire })
        })?;
        self.local(call, |group, call| group.broadcast(call, 0, bytemuck::cast_slice_mut(sum)))?;
        if let Some(sum) = scratch {
            WireFormat::F32.fold_rounded(&sum, output, Fold::Add);
        }
        Ok(())
    }

    fn reduce_scatter(
        &mut self,
        call: &mut Call<'_>,
        send: &[f32],
        counts: &[usize],
        recv: &mut [f32],
        wire: WireFormat,
    ) -> Result<(), CommError> {
        let mut sum = send.to_vec();
        let exact =
            |output| Reduction { input: None, output, op: ReduceOp::Sum, wire: WireFormat::F32 };
        self.local(call, |group, call| group.all_reduce(call, exact(&mut sum)))?;
        // Between the leaders, the blocks of a machine's ranks lie together.
        let starts: Vec<usize> =
            (0..counts.len()).map(|rank| counts[..rank].iter().sum()).collect();
        let block = |rank: usize| starts[rank]..starts[rank] + counts[rank];
        let of_machine = |ranks: &Vec<usize>| ranks.iter().map(|&rank| counts[rank]).sum::<usize>();
        let machine_counts: Vec<usize> = self.ranks.iter().map(of_machine).collect();
        let ordered: Vec<f32> = self
            .ranks
            .iter()
            .flatten()
            .flat_map(|&rank| sum[block(rank)].iter().copied())
            .collect();
        let mut own = vec![0.0; machine_counts[self.own.0]];
        self.across(call, |leaders, call| {
            leaders.reduce_scatter(call, &ordered, &machine_counts, &mut own, wire)
        })?;
        self.local(call, |group, call| {
            group.broadcast(call, 0, bytemuck::cast_slice_mut(&mut own))
        })?;
        let before = &self.ranks[self.own.0][..self.own.1];
        let start: usize = before.iter().map(|&rank| counts[rank]).sum();
        recv.copy_from_slice(&own[start..start + recv.len()]);
        Ok(())
    }

    fn all_gather(
        &mut self,
        call: &mut Call<'_>,
        send: &[u8],
        counts: Counts<'_>,
        recv: &mut [u8],
    ) -> Result<(), CommError> {
        let ranks = self.ranks[self.own.0].clone();
        let local_counts: Vec<usize> = ranks.iter().map(|&rank| counts.of(rank)).collect();
        let mut own = vec![0; local_counts.iter().sum()];
        match self.local {
            Some(_) => self.local(call, |group, call| {
                group.all_gather(call, send, Counts::Each(&local_counts), &mut own)
            })?,
            None => own.copy_from_slice(send),
        }
        let of_machine =
            |ranks: &Vec<usize>| ranks.iter().map(|&rank| counts.of(rank)).sum::<usize>();
        let machine_counts: Vec<usize> = self.ranks.iter().map(of_machine).collect();
        let mut all = vec![0; recv.len()];
        self.across(call, |leaders, call| {
            leaders.all_gather(call, &own, Counts::Each(&machine_counts), &mut all)
        })?;
        self.local(call, |group, call| group.broadcast(call, 0, &mut all))?;
        let mut rest = &all[..];
        for &rank in self.ranks.iter().flatten() {
            let (block, after) = rest.split_at(counts.of(rank));
            recv[counts.start(rank)..][..block.len()].copy_from_slice(block);
            rest = after;
        }
        Ok(())
    }

    fn broadcast(
        &mut self,
        call: &mut Call<'_>,
        root: usize,
        buf: &mut [u8],
    ) -> Result<(), CommError> {
        let place = |ranks: &Vec<usize>| ranks.iter().position(|&rank| rank == root);
        let found = self.ranks.iter().enumerate().find_map(|(at, ranks)| Some((at, place(ranks)?)));
        let (machine, place) = found.expect("every rank has a machine");
        if machine == self.own.0 {
            self.local(call, |group, call| group.broadcast(call, place, buf))?;
        }
        self.across(call, |leaders, call| leaders.broadcast(call, machine, buf))?;
        if machine != self.own.0 {
            self.local(call, |group, call| group.broadcast(call, 0, buf))?;
        }
        Ok(())
    }

    fn barrier(&mut self, call: &mut Call<'_>) -> Result<(), CommError> {
        self.local(call, |group, call| group.barrier(call))?;
        self.across(call, |leaders, call| leaders.barrier(call))?;
        self.local(call, |group, call| group.barrier(call))
    }

    fn send_recv(
        &mut self,
        call: &mut Call<'_>,
        send: Option<(usize, &[u8])>,
        recv: Option<(usize, &mut [u8])>,
    ) -> Result<(), CommError> {
        // Each of the two messages takes its own way, and they move on together.
        let Some(group) = &self.local else { return self.all.send_recv(call, send, recv) };
        let all = &self.all;
        let begun = all.begin(call);
        let mut sent = None;
        let mut ways = Vec::with_capacity(2);
        if let Some((to, data)) = send {
            let way = match self.place(to) {
                Some(place) => Way::NearOut(Outgoing { to: place, data, chunks: 0 }),
                None => Way::FarOut(all.start_message(to, data)?),
            };
            ways.push((to, way));
        }
        if let Some((from, data)) = recv {
            let way = match self.place(from) {
                Some(place) => Way::NearIn(from, Incoming { from: place, data, chunks: 0 }),
                None => Way::FarIn(all.expect_message(from, data.len()), data),
            };
            ways.push((from, way));
        }
        carry(call, ways, |site, way| match way {
            Way::NearOut(message) => Ok(group.push(message)),
            Way::FarOut(message) => message.advance(),
            Way::NearIn(from, message) => group.pull(site, *from, message),
            Way::FarIn(message, data) => {
                let step = message.advance_into(site, data)?;
                sent = Some(message.sent);
                Ok(step)
            }
        })?;
        all.settle(call, begun, sent);
        Ok(())
    }
}

/// A message within the machine or between machines, out or in.
enum Way<'a> {
    NearOut(Outgoing<'a>),
    FarOut(Sending<'a>),
    /// With the sender as a rank of the communicator.
    NearIn(usize, Incoming<'a>),
    FarIn(Receiving<'a>, &'a mut [u8]),
}

impl Transport for Nodes {
    fn group(&mut self) -> &mut dyn Collectives {
        &mut *self.data
    }

    fn split(
        &mut self,
        call: &mut Call<'_>,
        groups: &[Vec<usize>],
        mine: usize,
    ) -> Result<Option<Box<dyn Transport>>, CommError> {
        let mut gather = |words: &[u64]| {
            let mut all = vec![0u64; words.len() * self.world.len()];
            let counts = Counts::Equal(size_of_val(words));
            self.data.all_gather(
                call,
                bytemuck::cast_slice(words),
                counts,
                bytemuck::cast_slice_mut(&mut all),
            )?;
            Ok(all)
        };
        let nodes = Nodes::connect(&self.job, &self.world, groups, self.rank, &mut gather)?;
        Ok((groups[mine].len() > 1).then(|| Box::new(nodes) as Box<dyn Transport>))
    }
}
