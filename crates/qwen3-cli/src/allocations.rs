//! What this process has allocated so far; counted only with the feature `count-allocations`.

/// Allocations and their bytes since the process began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocations {
    /// How many, those that grew among them.
    pub count: u64,
    /// Bytes of all of them, whether they were freed or not.
    pub bytes: u64,
}

impl Allocations {
    /// What was allocated since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self { count: self.count - earlier.count, bytes: self.bytes - earlier.bytes }
    }
}

#[cfg(feature = "count-allocations")]
#[global_allocator]
static ALLOCATOR: &stats_alloc::StatsAlloc<std::alloc::System> = &stats_alloc::INSTRUMENTED_SYSTEM;

/// The count at this moment.
#[cfg(feature = "count-allocations")]
pub fn now() -> Option<Allocations> {
    let stats = ALLOCATOR.stats();
    let count = (stats.allocations + stats.reallocations) as u64;
    Some(Allocations { count, bytes: stats.bytes_allocated as u64 })
}

/// Nobody counts.
#[cfg(not(feature = "count-allocations"))]
pub fn now() -> Option<Allocations> {
    None
}
