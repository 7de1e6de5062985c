//! The model as one rank holds it, and its one forward pass, which serves prefill and decode alike.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use comm::{CommError, Communicator, ReduceOp};
use ndarray::Axis;
use ops::attention::AttentionShape;
use ops::attention_sequence::SequenceSpan;
use ops::layout::TokenLayout;
use ops::linear::gather_columns;
use ops::lm_head::wanted_rows;
use ops::{Context, Embedding, LayerCache, Linear, LogitRows, Profile, lm_head, rms_norm};
use tensor::{Activations, split_range};

use crate::cache::KvCache;
use crate::config::Config;
use crate::error::ModelError;
use crate::layer::{DecoderLayer, Part, Pass};
use crate::options::{ModelOptions, pass_tokens};
use crate::overlap::Overlap;
use crate::rotary::RotaryTable;

/// Floating-point operations of a rank between two looks at whether to stop: some tenths of a
/// second, in which the look's few microseconds are lost.
const LOOK: f64 = 2e10;

/// A Qwen3 model, as far as this rank holds it.
pub struct Model {
    pub(crate) config: Config,
    pub(crate) options: ModelOptions,
    pub(crate) ctx: Context,
    pub(crate) shape: AttentionShape,
    pub(crate) rotary: RotaryTable,
    pub(crate) embedding: Embedding,
    pub(crate) layers: Vec<DecoderLayer>,
    pub(crate) norm: Vec<f32>,
    pub(crate) lm_head: Linear,
    pub(crate) vocab: Range<usize>,
    pub(crate) weight_format: tensor::WeightFormat,
    pub(crate) parts: Mutex<[Part; 2]>,
}

/// Logits of some tokens, as far as this rank has them.
#[derive(Clone, Debug)]
pub struct Logits {
    /// The tokens of the vocabulary that this rank scores.
    pub vocab: Range<usize>,
    /// [rows, vocab.len()]
    pub values: Activations,
}

/// Positions for which a cache makes room at once, of which a config may claim more than any memory
/// has: what Qwen3 with YaRN reaches.
const RESERVED: usize = 1 << 17;

impl Model {
    /// The model's `config.json`.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The ranks that share the model.
    pub fn comm(&self) -> &Arc<dyn Communicator> {
        &self.ctx.comm
    }

    /// What the model was loaded with.
    pub fn options(&self) -> &ModelOptions {
        &self.options
    }

    /// What the operations take, when it is recorded.
    pub fn profile(&self) -> &Profile {
        &self.ctx.profile
    }

    /// The surroundings of this rank's operations: its instruction set and its team.
    pub fn context(&self) -> &Context {
        &self.ctx
    }

    /// The format of the projection weights in memory.
    pub fn weight_format(&self) -> tensor::WeightFormat {
        self.weight_format
    }

    /// Which passes go through the layers in halves.
    fn overlap(&self) -> Overlap {
        Overlap { machines: self.ctx.heads.machines(), tokens: self.options.overlap }
    }

    /// Tokens of a pass that gives each rank at most `chunk` of them: that many for each rank of
    /// those that split positions.
    pub fn pass_tokens(&self, chunk: usize) -> usize {
        pass_tokens(chunk, self.ctx.positions.size())
    }

    /// Bytes of packed weights on this rank.
    pub fn weight_bytes(&self) -> usize {
        self.layers.iter().map(DecoderLayer::bytes).sum::<usize>() + self.lm_head.bytes()
    }

    /// An empty cache for a sequence of at most `capacity` tokens (and never more than the
    /// context).
    pub fn new_cache(&self, capacity: usize) -> KvCache {
        let capacity = capacity.min(self.config.context_length());
        // Positions are balanced to within a few tokens a pass; a cache that grows beyond this does
        // so by itself.
        let here = (capacity.div_ceil(self.ctx.positions.size()) + 2).min(capacity).min(RESERVED);
        let layer = || {
            let mut cache =
                LayerCache::new(self.options.kv, self.shape.groups.len(), self.shape.head_dim);
            cache.reserve(here);
            cache
        };
        KvCache {
            layers: (0..self.layers.len()).map(|_| layer()).collect(),
            len: 0,
            held: Vec::new(),
            capacity,
        }
    }

    /// Runs `tokens`, which follow those in `cache`, through the model. All ranks call it with the
    /// same tokens; each gets the wanted logits of its part of the vocabulary.
    ///
    /// # Errors
    /// When a token is outside the vocabulary, the cache has no room, the embedding cannot be read,
    /// or a rank is lost; after the last two the cache is of no further use.
    pub fn forward(
        &self,
        cache: &mut KvCache,
        tokens: &[u32],
        rows: LogitRows,
    ) -> Result<Logits, ModelError> {
        Ok(self.run(cache, tokens, rows, None)?.expect("nobody may stop it"))
    }

    /// Like [`forward`](Self::forward), unless `stop` is true on any rank when it is asked, before
    /// the first layer and then after every [`LOOK`] of work: then nothing is returned on any rank,
    /// and the cache is as it was.
    pub(crate) fn forward_unless(
        &self,
        cache: &mut KvCache,
        tokens: &[u32],
        rows: LogitRows,
        stop: &mut dyn FnMut() -> bool,
    ) -> Result<Option<Logits>, ModelError> {
        let stride = self.layers_between_looks(tokens.len(), cache.len);
        self.run(cache, tokens, rows, Some((stride, stop)))
    }

    fn run(
        &self,
        cache: &mut KvCache,
        tokens: &[u32],
        rows: LogitRows,
        mut stop: Option<(usize, &mut dyn FnMut() -> bool)>,
    ) -> Result<Option<Logits>, ModelError> {
        self.check(cache, tokens)?;
        let ctx = &self.ctx;
        let (rank, ranks) = (ctx.positions.rank(), ctx.positions.size());
        let layout = TokenLayout::balanced(tokens.len(), ranks);
        let own: Vec<usize> = layout.indices(rank).collect();
        let ranges = self.overlap().parts(&self.config, ranks, self.options.schedule(), own.len());
        let mut parts = self.parts.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let parts = &mut parts[..ranges.len()];
        for (part, range) in parts.iter_mut().zip(&ranges) {
            let own = &own[range.clone()];
            (part.cos, part.sin) =
                self.rotary.rows(&own.iter().map(|index| cache.len + index).collect::<Vec<_>>());
            self.embedding
                .lookup(own.iter().map(|index| tokens[*index]), part.x.start(ranges.len() > 1))?;
        }

        let pass = Pass {
            ctx,
            algorithm: self.options.attention,
            shape: &self.shape,
            span: SequenceSpan { layout: &layout, start: cache.len, held: &cache.held },
            eps: self.config.rms_norm_eps,
        };
        for (index, (layer, cached)) in self.layers.iter().zip(&mut cache.layers).enumerate() {
            ctx.comm.ledger().set_layer(Some(index));
            if let Some((stride, stop)) = &mut stop
                && index % *stride == 0
            {
                // A look is a call of this thread: the other one has to be done with its own.
                settle(ctx, parts)?;
                if self.any_rank_agrees(stop())? {
                    ctx.comm.ledger().set_layer(None);
                    let held = if ranks > 1 { cache.held.len() } else { cache.len };
                    cache.layers.iter_mut().for_each(|layer| layer.truncate(held));
                    return Ok(None);
                }
            }
            layer.forward(&pass, cached, parts)?;
        }
        settle(ctx, parts)?;
        ctx.comm.ledger().set_layer(None);
        if ranks > 1 {
            let kept = pass.span.kept(rank, ranks);
            cache.held.extend(kept);
        }
        cache.len += tokens.len();
        Ok(Some(Logits { vocab: self.vocab.clone(), values: self.logits(&layout, rows, parts)? }))
    }

    /// Layers that take a rank about [`LOOK`] for so many tokens after `past`; the same number on
    /// every rank.
    fn layers_between_looks(&self, tokens: usize, past: usize) -> usize {
        let layers = self.layers.len().max(1);
        let pass = self.config.forward_flops(tokens, past, 0) as f64;
        let layer = pass / (layers * self.ctx.comm.size()) as f64;
        ((LOOK / layer) as usize).clamp(1, layers)
    }

    /// Returns true on every rank if `here` is true on at least one.
    pub(crate) fn any_rank_agrees(&self, here: bool) -> Result<bool, CommError> {
        if self.ctx.comm.size() == 1 {
            return Ok(here);
        }
        let mut wishes = [f32::from(u8::from(here))];
        self.ctx.comm.all_reduce(&mut wishes, ReduceOp::Max)?;
        Ok(wishes[0] > 0.0)
    }

    /// The logits of all the vocabulary, [rows, vocab_size], on every rank: rows · vocab_size · 4
    /// bytes of Allgather(v). For inspection; sampling exchanges candidates instead.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn gather_logits(&self, logits: &Logits) -> Result<Activations, ModelError> {
        let ranks = self.ctx.comm.size();
        let counts: Vec<_> =
            (0..ranks).map(|rank| split_range(self.config.vocab_size, ranks, rank).len()).collect();
        let mut whole = Activations::default((0, 0));
        gather_columns(&*self.ctx.comm, &logits.values, &counts, false, &mut whole)?;
        Ok(whole)
    }

    fn logits(
        &self,
        layout: &TokenLayout,
        rows: LogitRows,
        parts: &mut [Part],
    ) -> Result<Activations, CommError> {
        let (first, others) = parts.split_first_mut().expect("a pass has a part");
        let Part { x, normed, wanted, input, .. } = first;
        for other in others {
            let tokens = other.x.tokens().view();
            x.tokens_mut().append(Axis(0), tokens).expect("parts are equally wide");
        }
        wanted_rows(&self.ctx, x.tokens(), layout, rows, wanted)?;
        rms_norm(&self.ctx, wanted, &self.norm, self.config.rms_norm_eps, normed);
        Ok(lm_head(&self.ctx, &self.lm_head, normed, input))
    }

    fn check(&self, cache: &KvCache, tokens: &[u32]) -> Result<(), ModelError> {
        ModelError::check_tokens(tokens, self.config.vocab_size)?;
        if cache.len + tokens.len() > cache.capacity {
            return Err(ModelError::ContextFull {
                tokens: tokens.len(),
                cached: cache.len,
                capacity: cache.capacity,
            });
        }
        Ok(())
    }
}

/// Waits for the sums of all parts.
fn settle(ctx: &Context, parts: &mut [Part]) -> Result<(), CommError> {
    parts.iter_mut().try_for_each(|part| part.x.settle(ctx))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use comm::ThreadComm;

    use super::*;
    use crate::options::ParallelStrategy;

    #[test]
    fn a_pass_that_is_stopped_between_layers_leaves_the_cache_as_it_was() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/austen");
        for (ranks, strategy) in [
            (1, ParallelStrategy::Heads),
            (2, ParallelStrategy::Heads),
            (3, ParallelStrategy::Sequence),
        ] {
            std::thread::scope(|scope| {
                for comm in ThreadComm::group(ranks) {
                    let dir = &dir;
                    scope.spawn(move || {
                        let last = comm.rank() + 1 == ranks;
                        let options =
                            ModelOptions { strategy, ..ModelOptions::new(ops::Isa::detect()) };
                        let model = Model::load(dir, Arc::new(comm), &options, &|_| {})
                            .expect("the bundled model");
                        // The second pass has earlier tokens, of which under Sequence some ranks
                        // hold none.
                        for first in [0, 1] {
                            let mut cache = model.new_cache(64);
                            let begin = |cache: &mut KvCache| {
                                if first > 0 {
                                    model
                                        .forward(cache, &[7], LogitRows::None)
                                        .expect("a first pass");
                                }
                            };
                            begin(&mut cache);
                            let tokens: Vec<u32> = (10..30).collect();
                            let bytes = cache.bytes();
                            let mut looks = 0;
                            let mut stop = || {
                                looks += 1;
                                looks == 3 && last
                            };
                            let stopped = model.run(
                                &mut cache,
                                &tokens,
                                LogitRows::Last,
                                Some((1, &mut stop)),
                            );
                            assert!(
                                stopped.expect("no rank is lost").is_none(),
                                "one rank's wish is all ranks' end"
                            );
                            assert_eq!((looks, cache.len(), cache.bytes()), (3, first, bytes));
                            let again = model
                                .forward(&mut cache, &tokens, LogitRows::Last)
                                .expect("a whole pass");
                            let mut fresh = model.new_cache(64);
                            begin(&mut fresh);
                            let expected = model
                                .forward(&mut fresh, &tokens, LogitRows::Last)
                                .expect("a whole pass");
                            assert_eq!(again.values, expected.values);
                        }
                    });
                }
            });
        }
    }
}
