//! Recurrent states: what the layers with a gated delta rule keep of each sequence.

use std::ops::Range;

use simd_kernels::KvMemoryError;

/// f32 of a cache line.
const LINE: usize = 16;

/// A rank's memory for recurrent states. A slot holds the states of one sequence in all layers with
/// a delta rule; the arena does not know which sequence a slot belongs to, but how many tokens its
/// states have seen.
pub struct StateArena {
    data: Vec<f32>,
    /// The element of `data` at which the first slot begins: the first one of a cache line.
    start: usize,
    /// Elements of a layer's state, a whole number of cache lines.
    state_len: usize,
    layers: usize,
    /// For each slot the number of tokens of its states; `None` after a pass that failed.
    tokens: Vec<Option<usize>>,
}

impl StateArena {
    /// An arena of `slots` slots for `layers` layers with a delta rule, of which each has
    /// `state_len` elements. The operating system provides the memory at the first write.
    ///
    /// # Errors
    /// When the operating system refuses the memory.
    pub fn new(state_len: usize, layers: usize, slots: usize) -> Result<Self, KvMemoryError> {
        let state_len = state_len.next_multiple_of(LINE);
        let len = state_len.saturating_mul(layers);
        let refused =
            KvMemoryError { group_bytes: len.saturating_mul(size_of::<f32>()), groups: slots };
        let all = len.saturating_mul(slots).saturating_add(LINE);
        let data: Vec<f32> = bytemuck::try_zeroed_vec(all).map_err(|()| refused)?;
        let start = data.as_ptr().align_offset(LINE * size_of::<f32>()).min(LINE);
        Ok(Self { data, start, state_len, layers, tokens: vec![Some(0); slots] })
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.tokens.len()
    }

    /// Bytes of a slot.
    pub fn slot_bytes(&self) -> usize {
        self.layers * self.state_len * size_of::<f32>()
    }

    /// How many tokens the states of a slot have seen; `None` after a pass that failed.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn tokens(&self, slot: usize) -> Option<usize> {
        self.tokens[slot]
    }

    /// Notes how many tokens the states of a slot have seen; `None` while a pass changes them.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn set_tokens(&mut self, slot: usize, tokens: Option<usize>) {
        self.tokens[slot] = tokens;
    }

    /// Copies the states of slot `from` to slot `to`.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn copy(&mut self, from: usize, to: usize) {
        let from_range = self.range(from);
        let to_start = self.range(to).start;
        self.data.copy_within(from_range, to_start);
        self.tokens[to] = self.tokens[from];
    }

    /// Sets the states of a slot to those before the first token.
    ///
    /// # Panics
    /// When there is no such slot.
    pub fn reset(&mut self, slot: usize) {
        let range = self.range(slot);
        self.data[range].fill(0.0);
        self.tokens[slot] = Some(0);
    }

    /// The elements of a slot.
    fn range(&self, slot: usize) -> Range<usize> {
        assert!(slot < self.tokens.len(), "slot {slot} of {}", self.tokens.len());
        let len = self.layers * self.state_len;
        self.start + slot * len..self.start + (slot + 1) * len
    }

    /// The states of one layer, of the given slots in the given order.
    ///
    /// # Panics
    /// When there is no such layer or slot, or a slot is named twice.
    pub fn layer(&mut self, layer: usize, slots: &[usize]) -> Vec<&mut [f32]> {
        assert!(layer < self.layers, "layer {layer} of {}", self.layers);
        let (len, state) = (self.layers * self.state_len, self.state_len);
        let mut all: Vec<Option<&mut [f32]>> = if len == 0 {
            self.tokens.iter().map(|_| Some(&mut [][..])).collect()
        } else {
            let slots = self.data[self.start..].chunks_exact_mut(len);
            slots.map(|slot| Some(&mut slot[layer * state..(layer + 1) * state])).collect()
        };
        slots.iter().map(|slot| all[*slot].take().expect("each slot is named once")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_and_layers_do_not_overlap() {
        let mut arena = StateArena::new(20, 3, 4).expect("memory");
        assert_eq!((arena.slots(), arena.slot_bytes()), (4, 3 * 32 * 4));
        for layer in 0..3 {
            for (index, state) in arena.layer(layer, &[2, 0, 3, 1]).into_iter().enumerate() {
                assert_eq!(state.as_ptr() as usize % 64, 0, "a state begins a cache line");
                assert!(state.iter().all(|x| *x == 0.0));
                state.fill((10 * layer + [2, 0, 3, 1][index]) as f32 + 1.0);
            }
        }
        arena.set_tokens(2, Some(7));
        arena.copy(2, 0);
        arena.reset(3);
        assert_eq!(
            [0, 1, 2, 3].map(|slot| arena.tokens(slot)),
            [Some(7), Some(0), Some(7), Some(0)]
        );
        for layer in 0..3 {
            let states = arena.layer(layer, &[0, 1, 2, 3]);
            let first = |slot: usize| (10 * layer + slot) as f32 + 1.0;
            let expected = [first(2), first(1), first(2), 0.0];
            for (state, expected) in states.iter().zip(expected) {
                assert!(state.iter().all(|x| *x == expected), "layer {layer}");
            }
        }
        assert!(StateArena::new(usize::MAX / 8, 3, 4).is_err());
    }

    #[test]
    #[should_panic(expected = "named once")]
    fn a_slot_is_not_given_twice() {
        StateArena::new(4, 1, 2).expect("memory").layer(0, &[1, 1]);
    }
}
