//! Ranks that are threads of one process.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use crate::alarm::{Alarm, Membership};
use crate::call::Call;
use crate::endpoint::{End, Endpoint};
use crate::error::CommError;
use crate::group::{self, Group};
use crate::segment::Segment;
use crate::transport::{Collectives, Transport};

/// One rank of a group of threads, on the same shared-memory collectives as processes of one
/// machine.
///
/// A rank whose communicators are all dropped has left: who still waits for it gets
/// [`CommError::PeerFailed`], as does everyone when one is dropped by a panic.
pub struct ThreadComm {
    end: Endpoint,
}

impl ThreadComm {
    /// A group of `size` ranks, at least one, in rank order: one for each thread.
    pub fn group(size: usize) -> Vec<ThreadComm> {
        assert!(size > 0, "a group has {size} ranks, expected at least 1");
        let board = Arc::new(Segment::private(Alarm::board_bytes(size), 0));
        let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
        let nursery = Arc::default();
        let machine: Arc<[usize]> = vec![0; size].into();
        let segment = (size > 1).then(|| segment(size));
        (0..size)
            .map(|rank| {
                let alarm = Alarm::new(board.clone(), None);
                let membership = Arc::new(Membership { alarm, rank, size });
                let transport = segment.clone().map(|segment| {
                    Box::new(Threads {
                        group: Group::new(segment, rank, size),
                        path: vec![],
                        splits: 0,
                        nursery: Arc::clone(&nursery),
                    }) as Box<dyn Transport>
                });
                let end =
                    Endpoint::new("threads", machine.clone(), membership, transport, size <= cores);
                ThreadComm { end }
            })
            .collect()
    }
}

impl End for ThreadComm {
    fn end(&self) -> &Endpoint {
        &self.end
    }
}

fn segment(size: usize) -> Arc<Segment> {
    let (words, data) = group::extent(size);
    Arc::new(Segment::private(words, data))
}

/// Memory of groups that some members have joined and others will: by the way to the group from the
/// first one (for each split its number and the group's), with the number of members to come.
type Nursery = Mutex<HashMap<Vec<(usize, usize)>, (Arc<Segment>, usize)>>;

struct Threads {
    group: Group,
    path: Vec<(usize, usize)>,
    splits: usize,
    nursery: Arc<Nursery>,
}

impl Transport for Threads {
    fn group(&mut self) -> &mut dyn Collectives {
        &mut self.group
    }

    fn split(
        &mut self,
        _call: &mut Call<'_>,
        groups: &[Vec<usize>],
        mine: usize,
    ) -> Result<Option<Box<dyn Transport>>, CommError> {
        self.splits += 1;
        let size = groups[mine].len();
        if size == 1 {
            return Ok(None);
        }
        let mut path = self.path.clone();
        path.push((self.splits, mine));
        let mut nursery = self.nursery.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = nursery.entry(path.clone()).or_insert_with(|| (segment(size), size));
        entry.1 -= 1;
        let segment = entry.0.clone();
        if entry.1 == 0 {
            nursery.remove(&path);
        }
        let own = self.group.rank();
        let rank = groups[mine].iter().position(|&rank| rank == own);
        let group = Group::new(segment, rank.expect("this rank is in its group"), size);
        let nursery = self.nursery.clone();
        Ok(Some(Box::new(Threads { group, path, splits: 0, nursery })))
    }
}
