//! The cost of an operation, computed from shapes alone: arithmetic, bytes read, scratch,
//! collectives.
//!
//! Each operation states its cost next to its code. The profile measures times against the same
//! statement, and the tests of `qwen3-model` compare the stated collectives with the ledger.

use std::iter::Sum;
use std::ops::{Add, Mul};

use comm::{Collective, WireFormat};
use simd_kernels::KvFormat;
use tensor::WeightFormat;

/// Bytes of an f32.
pub(crate) const F32: usize = size_of::<f32>();

/// Amounts of arithmetic and of memory reads.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Floating-point (or integer) operations; a multiply-add counts as two.
    pub flops: f64,
    /// Bytes of weights and cache read.
    pub bytes: f64,
}

impl Add for Work {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { flops: self.flops + other.flops, bytes: self.bytes + other.bytes }
    }
}

impl Mul<f64> for Work {
    type Output = Self;

    fn mul(self, times: f64) -> Self {
        Self { flops: self.flops * times, bytes: self.bytes * times }
    }
}

impl Sum for Work {
    fn sum<I: Iterator<Item = Self>>(works: I) -> Self {
        works.fold(Self::default(), Add::add)
    }
}

/// The kind of data that work reads. Its format decides the speed of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operand {
    /// Weights of a linear layer.
    Weights(WeightFormat),
    /// Cached keys and values.
    Cache(KvFormat),
}

/// The ranks that take part in a collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// The ranks that split heads and weights.
    Heads,
    /// The ranks that split positions.
    Positions,
}

/// One call of a collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The ranks that take part.
    pub group: Group,
    /// Which collective.
    pub collective: Collective,
    /// Payload in f32 elements, as the [`Ledger`](comm::Ledger) counts it: the whole buffer of an
    /// Allreduce, Reduce-scatter or Broadcast; the whole gathered result of an Allgather.
    pub elements: usize,
    /// Whether the payload travels as f32 in every wire format.
    pub exact: bool,
}

impl Call {
    /// A call whose payload has the wire format if it is a sum, and f32 otherwise.
    pub(crate) fn new(group: Group, collective: Collective, elements: usize) -> Self {
        Self { group, collective, elements, exact: false }
    }

    /// Bytes of payload in this wire format.
    pub fn bytes(&self, wire: WireFormat) -> u64 {
        let sum = matches!(self.collective, Collective::Allreduce | Collective::ReduceScatter);
        let bytes = if sum && !self.exact {
            wire.encoded_bytes(self.elements)
        } else {
            F32 * self.elements
        };
        bytes as u64
    }
}

/// The cost of an operation on one rank, or the sum of several operations.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cost {
    /// The work by operand, one entry per product or attention.
    pub work: Vec<(Operand, Work)>,
    /// Bytes of the buffers that the operation fills.
    pub scratch: usize,
    /// Collectives in the order of the calls.
    pub calls: Vec<Call>,
}

impl Cost {
    /// The sum of all work.
    pub fn total(&self) -> Work {
        self.work.iter().map(|(_, work)| *work).sum()
    }
}

impl Add for Cost {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self.work.extend(other.work);
        self.scratch += other.scratch;
        self.calls.extend(other.calls);
        self
    }
}
