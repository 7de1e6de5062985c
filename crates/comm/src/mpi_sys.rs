//! The MPI functions in use, behind safe ones: every return code is checked, every buffer outlives
//! its transfer, and calls of different threads take turns. Also the system calls that tell which
//! processes live.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use mpi::environment::{Threading, Universe, initialize_with_threading};
use mpi::ffi;

use crate::alarm::Ending;
use crate::buffer::{Buffer, Buffers};
use crate::error::CommError;

/// MPI may take this long to end once all ranks have left.
const PATIENCE: Duration = Duration::from_secs(5);
/// The highest tag that the standard grants: implementations that allow more are not asked for it.
pub(crate) const LARGEST_TAG: usize = 32_767;

/// The only communicator of this crate: a duplicate of MPI's world, so that no other library's
/// messages mix in.
pub(crate) struct World {
    comm: ffi::MPI_Comm,
    rank: usize,
    size: usize,
    /// The lowest tag that no group of this process has used; tag 0 is for news about ranks.
    pub(crate) next_tag: AtomicU64,
    /// Taken by every call: MPI may have been built for one thread at a time.
    turn: Mutex<()>,
    pub(crate) buffers: Buffers,
    universe: Option<Universe>,
    /// Where this rank's clock begins.
    epoch: Instant,
    /// Finalizing waits for all processes, so it has to be left out when one of them may be gone.
    ending: Mutex<Ending>,
}

// SAFETY: the handle is a number or a pointer to an object that MPI allows all threads to use, one
// at a time, which `turn` sees to.
unsafe impl Send for World {}
// SAFETY: as above.
unsafe impl Sync for World {}

/// Turns a return code into an error with MPI's own words.
fn check(function: &'static str, code: i32) -> Result<(), CommError> {
    if code == ffi::MPI_SUCCESS as i32 {
        return Ok(());
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut length = 0;
    // SAFETY: the buffer has the size that MPI asks for.
    let ok = unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut length) };
    let length = if ok == ffi::MPI_SUCCESS as i32 { length.max(0) as usize } else { 0 };
    let message = String::from_utf8_lossy(&text[..length.min(text.len())]).into_owned();
    Err(CommError::Mpi { function, code, message })
}

fn setup(reason: impl Into<String>) -> CommError {
    CommError::Setup { transport: "mpi", reason: reason.into() }
}

impl World {
    /// Starts MPI. Once per process.
    pub(crate) fn start() -> Result<World, CommError> {
        let (universe, provided) = initialize_with_threading(Threading::Serialized)
            .ok_or_else(|| setup("MPI has been started in this process before"))?;
        if !matches!(provided, Threading::Serialized | Threading::Multiple) {
            return Err(setup(format!(
                "MPI allows threads as {provided:?} only, expected Serialized"
            )));
        }
        // SAFETY: MPI is initialized; all out-pointers are to live variables of the right types.
        unsafe {
            let mut comm = ffi::RSMPI_COMM_NULL;
            check("MPI_Comm_dup", ffi::MPI_Comm_dup(ffi::RSMPI_COMM_WORLD, &mut comm))?;
            let handler = ffi::RSMPI_ERRORS_RETURN;
            check("MPI_Comm_set_errhandler", ffi::MPI_Comm_set_errhandler(comm, handler))?;
            let (mut rank, mut size) = (0, 0);
            check("MPI_Comm_rank", ffi::MPI_Comm_rank(comm, &mut rank))?;
            check("MPI_Comm_size", ffi::MPI_Comm_size(comm, &mut size))?;
            Ok(World {
                comm,
                rank: rank as usize,
                size: size as usize,
                next_tag: AtomicU64::new(1),
                turn: Mutex::new(()),
                buffers: Buffers::default(),
                universe: Some(universe),
                epoch: Instant::now(),
                // Until the ranks are connected: one that fails before leaves without the others.
                ending: Mutex::new(Ending::Failed),
            })
        }
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Nanoseconds of a clock of this rank's own.
    pub(crate) fn clock(&self) -> i64 {
        self.epoch.elapsed().as_nanos() as i64
    }

    /// How this process ends: it waits for the others unless one has failed, and not for long once
    /// all have left.
    pub(crate) fn set_ending(&self, ending: Ending) {
        *self.ending.lock().unwrap_or_else(PoisonError::into_inner) = ending;
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lowest rank of the machine of each rank. Collective, for the start.
    pub(crate) fn machines(&self) -> Result<Vec<usize>, CommError> {
        let _turn = self.turn();
        // SAFETY: MPI is initialized; the communicators are valid, the new one is freed here.
        unsafe {
            let mut node = ffi::RSMPI_COMM_NULL;
            let code = ffi::MPI_Comm_split_type(
                self.comm,
                ffi::RSMPI_COMM_TYPE_SHARED,
                self.rank as i32,
                ffi::RSMPI_INFO_NULL,
                &mut node,
            );
            check("MPI_Comm_split_type", code)?;
            let mut lowest = [self.rank as u64];
            let code = ffi::MPI_Bcast(lowest.as_mut_ptr().cast(), 8, byte_type(), 0, node);
            check("MPI_Bcast", code)?;
            check("MPI_Comm_free", ffi::MPI_Comm_free(&mut node))?;
            Ok(self.gather(&lowest)?.into_iter().map(|rank| rank as usize).collect())
        }
    }

    /// What each rank gives, one after the other. Collective, for the start.
    pub(crate) fn all_gather(&self, own: &[u64]) -> Result<Vec<u64>, CommError> {
        let _turn = self.turn();
        self.gather(own)
    }

    fn gather(&self, own: &[u64]) -> Result<Vec<u64>, CommError> {
        let mut all = vec![0u64; own.len() * self.size];
        let bytes = size_of_val(own) as i32;
        // SAFETY: both buffers live through this blocking call; `all` has room for `size` times
        // `bytes`.
        let code = unsafe {
            ffi::MPI_Allgather(
                own.as_ptr().cast(),
                bytes,
                byte_type(),
                all.as_mut_ptr().cast(),
                bytes,
                byte_type(),
                self.comm,
            )
        };
        check("MPI_Allgather", code)?;
        Ok(all)
    }

    /// Begins to send; nobody writes the buffer until that is done, and any number of transfers may
    /// read it.
    pub(crate) fn send<'w>(
        &'w self,
        to: usize,
        tag: usize,
        buffer: Arc<Buffer<'w>>,
    ) -> Result<Transfer<'w>, CommError> {
        let count =
            i32::try_from(buffer.len()).expect("messages are sent in pieces of less than 2 GiB");
        let _turn = self.turn();
        // SAFETY: reading a constant of the library.
        let mut request = unsafe { ffi::RSMPI_REQUEST_NULL };
        // SAFETY: the transfer owns a share of the buffer, which keeps it unmoved and unchanged
        // until MPI has done.
        let code = unsafe {
            let data = buffer.as_ptr().cast();
            ffi::MPI_Isend(data, count, byte_type(), to as i32, tag as i32, self.comm, &mut request)
        };
        check("MPI_Isend", code)?;
        Ok(Transfer { world: self, request, buffer: Some(buffer), done: false })
    }

    /// Begins to receive the next message of `from` (or of anyone) with the tag, if there is one.
    pub(crate) fn receive(
        &self,
        from: Option<usize>,
        tag: usize,
    ) -> Result<Option<(usize, Transfer<'_>)>, CommError> {
        let _turn = self.turn();
        // SAFETY: MPI is initialized; the out-pointers are to live variables; the status is written
        // by `MPI_Improbe` whenever it sets the flag, and read only then; the buffer is owned by
        // the transfer.
        unsafe {
            let source = from.map_or(ffi::RSMPI_ANY_SOURCE, |rank| rank as i32);
            let (mut flag, mut message) = (0, ffi::RSMPI_MESSAGE_NULL);
            let mut status: ffi::MPI_Status = std::mem::zeroed();
            let code = ffi::MPI_Improbe(
                source,
                tag as i32,
                self.comm,
                &mut flag,
                &mut message,
                &mut status,
            );
            check("MPI_Improbe", code)?;
            if flag == 0 {
                return Ok(None);
            }
            let mut count = 0;
            check("MPI_Get_count", ffi::MPI_Get_count(&status, byte_type(), &mut count))?;
            let mut buffer = self.buffers.of(count.max(0) as usize);
            let mut request = ffi::RSMPI_REQUEST_NULL;
            let data = buffer.as_mut_ptr().cast();
            let code = ffi::MPI_Imrecv(data, count, byte_type(), &mut message, &mut request);
            check("MPI_Imrecv", code)?;
            let transfer =
                Transfer { world: self, request, buffer: Some(Arc::new(buffer)), done: false };
            Ok(Some((status.MPI_SOURCE as usize, transfer)))
        }
    }

    /// Ends all processes of the job at once. For when nothing else did.
    pub(crate) fn abort(&self) {
        // Without taking a turn: the thread whose turn it is may be what hangs.
        // SAFETY: ends the process; MPI allows it at any time after initialization.
        unsafe { ffi::MPI_Abort(self.comm, 1) };
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let last = Last { comm: self.comm, universe: self.universe.take() };
        match *self.ending.get_mut().unwrap_or_else(PoisonError::into_inner) {
            Ending::Failed => std::mem::forget(last),
            Ending::Early => last.end(),
            Ending::Together => {
                within(PATIENCE, move || last.end());
            }
        }
    }
}

/// What is left of MPI when all ranks have done with it.
struct Last {
    comm: ffi::MPI_Comm,
    universe: Option<Universe>,
}

// SAFETY: as for `World`, the last owner of the handle, whose turns are over.
unsafe impl Send for Last {}

impl Last {
    fn end(mut self) {
        // Ranks that do not come together to the end of MPICH over UCX and TCP mostly hang there:
        // docs/clusters.md. SAFETY: the communicator is valid until it is freed below; all ranks
        // that did not fail come here.
        let code = unsafe { ffi::MPI_Barrier(self.comm) };
        debug_assert_eq!(code, ffi::MPI_SUCCESS as i32);
        // SAFETY: nobody uses the communicator any more; all transfers borrowed the world that was
        // dropped.
        let code = unsafe { ffi::MPI_Comm_free(&mut self.comm) };
        debug_assert_eq!(code, ffi::MPI_SUCCESS as i32);
        drop(self.universe);
    }
}

/// Does `work` on a thread that is left behind when it takes longer than `limit`; whether it was
/// done.
///
/// MPICH can hang at its end where one rank spins until another reads its messages, which sleeps
/// until the launcher says that all have come. Who sleeps is left behind a little later: if its
/// process ended first, the other would go on to the launcher, which fails to answer one that is
/// gone, and so makes a failure of a job that has done all its work.
fn within(limit: Duration, work: impl FnOnce() + Send + 'static) -> bool {
    let (done, ended) = mpsc::channel();
    let work = move || {
        work();
        // Nobody may be there to hear it.
        let _ = done.send(());
    };
    let thread = thread::Builder::new().name("end of MPI".into()).spawn(work);
    let came = |limit| ended.recv_timeout(limit) == Ok(());
    // Where there is no thread to be had, MPI is left as it is.
    thread.is_ok_and(|thread| {
        came(limit) || (time_on_core(&thread) < limit / 2 && came(Duration::from_secs(1)))
    })
}

/// How long a thread has computed so far.
fn time_on_core(thread: &thread::JoinHandle<()>) -> Duration {
    let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: the thread has not been joined, so that its handle is valid; the out-pointers are to
    // live variables.
    let known = unsafe {
        libc::pthread_getcpuclockid(thread.as_pthread_t(), &mut clock) == 0
            && libc::clock_gettime(clock, &mut time) == 0
    };
    if known { Duration::new(time.tv_sec as u64, time.tv_nsec as u32) } else { Duration::ZERO }
}

fn byte_type() -> ffi::MPI_Datatype {
    // SAFETY: reading a constant of the library.
    unsafe { ffi::RSMPI_UINT8_T }
}

/// A message on its way, with its buffer.
pub(crate) struct Transfer<'w> {
    world: &'w World,
    request: ffi::MPI_Request,
    /// Taken out once the transfer is done.
    buffer: Option<Arc<Buffer<'w>>>,
    done: bool,
}

// SAFETY: a request is a number or a pointer that any thread may use, one at a time: `&mut self`
// and `turn`.
unsafe impl Send for Transfer<'_> {}

impl<'w> Transfer<'w> {
    /// Whether MPI has done with the buffer.
    pub(crate) fn done(&mut self) -> Result<bool, CommError> {
        if !self.done {
            let _turn = self.world.turn();
            let mut flag = 0;
            // SAFETY: the request is active; MPI accepts its constant for "no status".
            let code =
                unsafe { ffi::MPI_Test(&mut self.request, &mut flag, ffi::RSMPI_STATUS_IGNORE) };
            check("MPI_Test", code)?;
            self.done = flag != 0;
        }
        Ok(self.done)
    }

    /// What a finished receive brought.
    pub(crate) fn into_received(mut self) -> Buffer<'w> {
        assert!(self.done, "the data of an unfinished transfer");
        let buffer = self.buffer.take().and_then(Arc::into_inner);
        buffer.expect("a receive shares its buffer with nobody")
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        if !self.done {
            // After a failure MPI may still use the buffer: it is given up rather than freed.
            std::mem::forget(self.buffer.take());
        }
    }
}

/// A process of this machine, to be asked whether it lives. Knows it by a descriptor, which tells a
/// dead process from its successor in the process table, and from a zombie.
pub(crate) struct Process {
    descriptor: Option<OwnedFd>,
    id: i32,
}

impl Process {
    /// The process, if it lives.
    pub(crate) fn new(id: u32) -> Option<Process> {
        let id = id as i32;
        // SAFETY: the call takes two numbers and touches no memory of this process.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, id, 0) };
        // SAFETY: a descriptor that is not negative is new and owned by nobody else.
        let descriptor = (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) });
        Some(Process { descriptor, id }).filter(Process::lives)
    }

    pub(crate) fn lives(&self) -> bool {
        match &self.descriptor {
            Some(descriptor) => {
                let mut poll =
                    libc::pollfd { fd: descriptor.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                // SAFETY: one live entry, and no waiting.
                unsafe { libc::poll(&mut poll, 1, 0) <= 0 || poll.revents & libc::POLLIN == 0 }
            }
            // SAFETY: signal 0 is sent to nobody; the call only checks.
            None => unsafe {
                libc::kill(self.id, 0) == 0
                    || io::Error::last_os_error().raw_os_error() != Some(libc::ESRCH)
            },
        }
    }
}

/// Words of a set of processor cores.
pub(crate) const CORE_WORDS: usize = 16;

/// The cores that this process may run on, one bit each; all zero where the system does not say.
pub(crate) fn cores() -> [u64; CORE_WORDS] {
    let mut cores = [0; CORE_WORDS];
    // SAFETY: the set has the size that is passed, and any bits are valid in it.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of_val(&set), &mut set) == 0 {
            for core in (0..64 * CORE_WORDS).filter(|&core| libc::CPU_ISSET(core, &set)) {
                cores[core / 64] |= 1 << (core % 64);
            }
        }
    }
    cores
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_ends_is_left_behind_who_sleeps_a_little_later() {
        let (limit, soon) = (Duration::from_millis(200), Duration::from_secs(20));
        assert!(within(Duration::from_secs(60), || ()));
        let start = Instant::now();
        assert!(!within(limit, || thread::sleep(Duration::MAX)));
        let slept = start.elapsed();
        assert!((limit + Duration::from_secs(1)..soon).contains(&slept), "{slept:?}");
        assert!(!within(limit, || loop {
            std::hint::spin_loop()
        }));
        assert!(
            (limit..soon).contains(&(start.elapsed() - slept)),
            "{:?}",
            start.elapsed() - slept
        );
    }

    #[test]
    fn who_spins_is_told_from_who_sleeps() {
        let spinning = thread::spawn(|| {
            loop {
                std::hint::spin_loop()
            }
        });
        let sleeping = thread::spawn(|| thread::sleep(Duration::MAX));
        let (start, some) = (Instant::now(), Duration::from_millis(100));
        while time_on_core(&spinning) < some {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "it spun for {:?}",
                time_on_core(&spinning)
            );
            thread::sleep(Duration::from_millis(10));
        }
        assert!(time_on_core(&sleeping) < some);
    }
}
