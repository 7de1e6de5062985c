//! The engine on every rank: rank 0 serves requests, the others follow its records.

use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use std::{panic, thread};

use qwen3_model::comm::{CommError, Communicator, CommunicatorExt as _};
use qwen3_model::ops::KvFormat;
use qwen3_model::{Model, ModelError, PAGE_POSITIONS};

use crate::chain::ChainKey;
use crate::handle::{EngineHandle, Limits, Shared};
use crate::pace::Pace;
use crate::pages::pages_for;
use crate::record::{Record, RecordError};
use crate::scheduler::{Scheduler, Sizes};
use crate::service::{Service, Step};
use crate::stats::{RankShare, ShareMeter};
use crate::step::Executor;
use crate::steps_file::LatestSteps;

/// Logits that a rank computes at once for prompt tokens: 64 MiB of f32.
const LOGITS_AT_ONCE: usize = 1 << 24;

/// The size of the key-value cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvMemory {
    /// So many bytes on this rank, rounded down to whole pages.
    Bytes(usize),
    /// Pages for so many positions, on all ranks that split positions together.
    Positions(usize),
}

/// How an engine works. Ranks may have memory of different size; everything else counts on rank 0.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The size of the key-value cache. All ranks use the number of pages of the smallest.
    pub kv_memory: KvMemory,
    /// Write to the whole cache at the start, so that the system cannot refuse its memory later.
    pub touch: bool,
    /// Sequences that run together.
    pub max_sequences: usize,
    /// Snapshots of recurrent states that are kept for prompts with the same beginning. Only hybrid
    /// models have such states; memory is taken as it is needed.
    pub state_snapshots: usize,
    /// Requests that may wait.
    pub max_queue: usize,
    /// Prompt tokens of all requests that may wait.
    pub max_queued_tokens: usize,
    /// Rows of a step, for each rank of those that split positions. Beside running sequences
    /// prompts take fewer, so that the time between two tokens stays bounded.
    pub step_rows: usize,
    /// Events that a reader may leave unread before its request fails.
    pub stream_limit: usize,
    /// The waiting time that makes up for one level of priority.
    pub aging: Duration,
    /// Where the shapes and ids of the latest 256 steps are written when a rank is lost. The rank
    /// is appended to the file's name.
    pub steps_file: Option<PathBuf>,
}

impl Default for EngineConfig {
    /// One GiB of cache, 64 sequences, 1,024 waiting requests, steps of 512 rows.
    fn default() -> Self {
        Self {
            kv_memory: KvMemory::Bytes(1 << 30),
            touch: false,
            max_sequences: 64,
            state_snapshots: 32,
            max_queue: 1024,
            max_queued_tokens: 1 << 22,
            step_rows: 512,
            stream_limit: 4096,
            aging: Duration::from_secs(5),
            steps_file: None,
        }
    }
}

/// Why an engine cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The cache has no page on some rank.
    #[error(
        "rank {rank} has {pages} pages of keys and values, expected at least 1: \
         a page takes {page_bytes} bytes on rank 0"
    )]
    NoPages {
        /// The first such rank.
        rank: usize,
        /// Its pages.
        pages: usize,
        /// Bytes of a page on this rank.
        page_bytes: usize,
    },
    /// The system has no random numbers for the key of the prefix cache.
    #[error("the system gives no random numbers: {reason}")]
    Random {
        /// The system's words.
        reason: String,
    },
    /// A record of rank 0 cannot be decoded.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The model fails.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A rank is lost.
    #[error(transparent)]
    Comm(#[from] CommError),
}

impl EngineError {
    /// The failed collective behind this error, if a collective failed.
    pub fn collective(&self) -> Option<&CommError> {
        match self {
            Self::Comm(error) | Self::Model(ModelError::Comm(error)) => Some(error),
            _ => None,
        }
    }
}

/// One rank's part of the engine.
pub struct Engine {
    executor: Executor,
    steps_file: Option<PathBuf>,
    /// On rank 0.
    front: Option<(Service, EngineHandle)>,
}

impl Engine {
    /// Creates the engine of a model. All ranks call it together.
    ///
    /// # Errors
    ///
    /// When some rank has no memory for a page or for the states, or a rank is lost.
    pub fn new(model: Model, config: &EngineConfig) -> Result<Self, EngineError> {
        let comm = model.comm().clone();
        let arenas = model.context().positions.size();
        let page_bytes = model.page_bytes();
        let pages = match config.kv_memory {
            KvMemory::Bytes(bytes) => bytes / page_bytes.max(1),
            KvMemory::Positions(positions) => pages_for(positions).div_ceil(arenas),
        };
        let all = comm.all_gather_one(pages as u64)?;
        let (rank, &pages) =
            all.iter().enumerate().min_by_key(|(_, pages)| **pages).expect("there is a rank");
        let pages = pages.min(u64::from(u32::MAX)) as usize;
        if pages == 0 {
            return Err(EngineError::NoPages { rank, pages, page_bytes });
        }
        let mut slots = [(config.max_sequences.max(1) + config.state_snapshots) as u64];
        comm.broadcast(0, &mut slots)?;
        let mut arena = model.new_arena(pages, slots[0] as usize)?;
        if config.touch {
            arena.touch(model.context());
        }
        let front =
            if comm.rank() == 0 { Some(front(&model, config, arenas, pages)?) } else { None };
        let steps_file = config.steps_file.as_ref().map(|path| {
            let mut name = path.clone().into_os_string();
            name.push(format!(".rank{}", comm.rank()));
            PathBuf::from(name)
        });
        Ok(Self { executor: Executor::new(model, arena), steps_file, front })
    }

    /// A handle for clients, on rank 0. The engine ends when all handles are dropped, the one kept
    /// here excepted: [`run`](Self::run) drops it.
    pub fn handle(&self) -> Option<EngineHandle> {
        self.front.as_ref().map(|(_, handle)| handle.clone())
    }

    /// Serves the requests of `client`, which runs on a thread of rank 0 and has its value there,
    /// until it returns. All ranks call it together.
    ///
    /// # Errors
    ///
    /// As [`run`](Self::run). `client` has ended in that case, too.
    ///
    /// # Panics
    ///
    /// If `client` panics.
    pub fn serve<T: Send>(
        self,
        client: impl FnOnce(&EngineHandle) -> T + Send,
    ) -> Result<(Model, Option<T>), EngineError> {
        thread::scope(|scope| {
            let client = self.handle().map(|handle| scope.spawn(move || client(&handle)));
            let model = self.run();
            let join = |client: thread::ScopedJoinHandle<'_, T>| {
                client.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
            };
            let value = client.map(join);
            Ok((model?, value))
        })
    }

    /// Serves requests until the engine is drained or shut down, or all handles are dropped. All
    /// ranks call it together; it returns on all ranks, with the model.
    ///
    /// # Errors
    ///
    /// When the model fails or a rank is lost. Then every open request has failed, and the job can
    /// only end.
    pub fn run(self) -> Result<Model, EngineError> {
        let Self { mut executor, steps_file, front } = self;
        let comm = executor.model.comm().clone();
        let mut steps = LatestSteps::default();
        let result = match front {
            Some((mut service, handle)) => {
                drop(handle);
                let result = serve(&mut service, &mut executor, &*comm, &mut steps);
                if let Err(error) = &result {
                    service.fail_all(&error.to_string());
                }
                result
            }
            None => follow(&mut executor, &*comm, &mut steps),
        };
        if let Err(error) = result {
            // Other ranks must not wait for this one.
            comm.abort(&error.to_string());
            if let Some(path) = steps_file {
                // The error that ended the engine matters more than one of this file.
                let _ = steps.write(&path, &error.to_string());
            }
            return Err(error);
        }
        Ok(executor.model)
    }
}

/// Rank 0's service and its handle.
fn front(
    model: &Model,
    config: &EngineConfig,
    arenas: usize,
    pages: usize,
) -> Result<(Service, EngineHandle), EngineError> {
    let mut key = [0; 32];
    getrandom::fill(&mut key).map_err(|error| EngineError::Random { reason: error.to_string() })?;
    let identity = format!("{:?} {:?}", model.config(), model.options());
    let vocab_size = model.config().vocab_size;
    let step_rows = model.pass_tokens(config.step_rows.max(1));
    let slice = vocab_size.div_ceil(model.comm().size()).max(1);
    let sizes = Sizes {
        arenas,
        pages,
        sequences: config.max_sequences.max(1),
        uniform_pages: model.options().kv == KvFormat::F32,
        snapshots: model.config().hybrid.as_ref().map(|_| config.state_snapshots),
        logit_rows: (LOGITS_AT_ONCE / slice).clamp(1, step_rows),
        aging: config.aging,
    };
    let shared = Arc::new(Shared::new(Limits {
        vocab_size,
        has_head: model.config().has_head,
        context_length: model.config().context_length(),
        pages: pages * arenas,
        page_positions: PAGE_POSITIONS,
        page_bytes: model.page_bytes(),
        sequences: sizes.sequences,
        queue: config.max_queue,
        queued_tokens: config.max_queued_tokens,
    }));
    let (sender, submissions) = mpsc::channel();
    let scheduler = Scheduler::new(sizes, ChainKey::new(key, identity.as_bytes()));
    let pace = Pace::new(step_rows);
    let service = Service::new(shared.clone(), submissions, scheduler, pace, config.stream_limit);
    Ok((service, EngineHandle::new(shared, sender)))
}

/// Rank 0: plans steps until there is nothing left to do.
fn serve(
    service: &mut Service,
    executor: &mut Executor,
    comm: &dyn Communicator,
    steps: &mut LatestSteps,
) -> Result<(), EngineError> {
    let mut meter = ShareMeter::default();
    loop {
        let Some(Step { plan, record, begin }) = service.next(comm)? else {
            return Ok(Record { end: true, ..Record::default() }.send(comm)?);
        };
        steps.add(&record);
        record.send(comm)?;
        let planning = begin.elapsed();
        let outcome = executor.execute(&record, Some(service.decide()))?;
        meter.add(begin.elapsed());
        if record.report {
            let shares = exchange_shares(comm, &mut meter)?;
            service.report(shares, comm);
        }
        service.take(&plan, outcome, planning, begin.elapsed());
    }
}

/// The other ranks: carry out the records of rank 0 until it ends.
fn follow(
    executor: &mut Executor,
    comm: &dyn Communicator,
    steps: &mut LatestSteps,
) -> Result<(), EngineError> {
    let mut meter = ShareMeter::default();
    loop {
        let record = Record::receive(comm)??;
        if record.end {
            return Ok(());
        }
        if record.heartbeat {
            continue;
        }
        steps.add(&record);
        let begin = Instant::now();
        executor.execute(&record, None)?;
        meter.add(begin.elapsed());
        if record.report {
            exchange_shares(comm, &mut meter)?;
        }
    }
}

/// Every rank's shares of its time since the last exchange.
fn exchange_shares(
    comm: &dyn Communicator,
    meter: &mut ShareMeter,
) -> Result<Vec<RankShare>, CommError> {
    let own = meter.take(&comm.ledger().entries());
    let all = comm.all_gather_one([own.computing, own.waiting, own.transferring])?;
    let share = |[computing, waiting, transferring]: [f64; 3]| RankShare {
        computing,
        waiting,
        transferring,
    };
    Ok(all.into_iter().map(share).collect())
}
