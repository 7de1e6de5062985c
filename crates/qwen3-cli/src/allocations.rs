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
mod counted {
    use std::alloc::System;

    use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

    use super::Allocations;

    #[global_allocator]
    static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

    pub fn now() -> Option<Allocations> {
        let stats = ALLOCATOR.stats();
        let count = (stats.allocations + stats.reallocations) as u64;
        Some(Allocations { count, bytes: stats.bytes_allocated as u64 })
    }
}

#[cfg(not(feature = "count-allocations"))]
mod counted {
    use super::Allocations;

    pub fn now() -> Option<Allocations> {
        None
    }
}

/// The count at this moment; `None` where nobody counts.
pub fn now() -> Option<Allocations> {
    counted::now()
}
