//! The wire format of keys and values. Between machines they travel as f16 if the cache stores f16,
//! which loses no further precision.

use std::borrow::Cow;

use simd_kernels::{KvFormat, pack_halves, unpack_halves};

use crate::context::Context;

/// The wire format of keys and values.
#[derive(Clone, Copy)]
pub(crate) struct KvWire {
    /// Two f16 travel in the slot of one f32. On a single machine packing would only cost time.
    halves: bool,
}

impl KvWire {
    /// The wire format for a cache of `format` and ranks on `machines` machines.
    pub fn of(format: KvFormat, machines: usize) -> Self {
        Self { halves: format == KvFormat::F16 && machines > 1 }
    }

    /// Number of f32 slots that a token with `numbers` elements of keys and values takes.
    pub fn width(self, numbers: usize) -> usize {
        if self.halves { numbers / 2 } else { numbers }
    }

    /// Encodes `numbers` for the wire.
    pub fn pack(self, ctx: &Context, numbers: Vec<f32>) -> Vec<f32> {
        if !self.halves {
            return numbers;
        }
        let mut places = vec![0.0; numbers.len() / 2];
        pack_halves(ctx.isa, &numbers, &mut places);
        places
    }

    /// Decodes slots from the wire.
    pub fn unpack<'a>(self, ctx: &Context, places: &'a [f32]) -> Cow<'a, [f32]> {
        if !self.halves {
            return places.into();
        }
        let mut numbers = vec![0.0; 2 * places.len()];
        unpack_halves(ctx.isa, places, &mut numbers);
        numbers.into()
    }
}
