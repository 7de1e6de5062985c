//! Keys and values as they travel between machines: in half precision where the cache keeps them
//! so, which loses nothing more.

use std::borrow::Cow;

use simd_kernels::{KvFormat, pack_halves, unpack_halves};

use crate::context::Context;

/// How keys and values go to other ranks.
#[derive(Clone, Copy)]
pub(crate) struct KvWire {
    /// Two numbers in the place of an f32. Within one memory that would be work for nothing.
    halves: bool,
}

impl KvWire {
    /// For numbers that are going to be kept in this format, with ranks on so many machines.
    pub fn of(format: KvFormat, machines: usize) -> Self {
        Self { halves: format == KvFormat::F16 && machines > 1 }
    }

    /// Places of f32 that the keys and values of a token take, `numbers` in all: as many of the one
    /// as of the other.
    pub fn width(self, numbers: usize) -> usize {
        if self.halves { numbers / 2 } else { numbers }
    }

    /// The numbers on their way.
    pub fn pack(self, ctx: &Context, numbers: Vec<f32>) -> Vec<f32> {
        if !self.halves {
            return numbers;
        }
        let mut places = vec![0.0; numbers.len() / 2];
        pack_halves(ctx.isa, &numbers, &mut places);
        places
    }

    /// The numbers again.
    pub fn unpack<'a>(self, ctx: &Context, places: &'a [f32]) -> Cow<'a, [f32]> {
        if !self.halves {
            return places.into();
        }
        let mut numbers = vec![0.0; 2 * places.len()];
        unpack_halves(ctx.isa, places, &mut numbers);
        numbers.into()
    }
}
