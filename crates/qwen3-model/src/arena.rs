//! What a rank keeps of its sequences between passes.

use ops::{Context, KvArena, StateArena};

/// A rank's memory for sequences: pages of keys and values for the layers with attention, and a
/// slot of recurrent states per sequence for those with a gated delta rule.
pub struct Arena {
    /// The pages.
    pub pages: KvArena,
    /// The recurrent states; no layers in a model that has attention everywhere.
    pub states: StateArena,
}

impl Arena {
    /// Writes zeros to all memory, so that the operating system provides it now.
    pub fn touch(&mut self, ctx: &Context) {
        self.pages.touch(ctx);
        (0..self.states.slots()).for_each(|slot| self.states.reset(slot));
    }
}
