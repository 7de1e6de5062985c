//! The changes to a row of logits before a token is chosen from it.

use std::ops::Range;

use super::SampleRow;
use super::params::MIN_TEMPERATURE;

/// Memory for counting the tokens of a history, reused from row to row. All entries are zero
/// between two calls.
#[derive(Default)]
pub(super) struct Counts(Vec<u32>);

impl Counts {
    /// Calls `change` once for each token of `history` that lies in `vocab`, with its index in
    /// `vocab` and the number of its occurrences.
    fn for_each(
        &mut self,
        vocab: &Range<usize>,
        history: &[&[u32]],
        mut change: impl FnMut(usize, u32),
    ) {
        self.0.resize(self.0.len().max(vocab.len()), 0);
        let local = || {
            let ids = history.iter().flat_map(|part| part.iter());
            ids.filter_map(|&id| index_in(vocab, id))
        };
        local().for_each(|index| self.0[index] += 1);
        for index in local() {
            let count = std::mem::take(&mut self.0[index]);
            if count > 0 {
                change(index, count);
            }
        }
    }
}

/// The index of token `id` in the slice `vocab` of the vocabulary, if it lies there.
pub(super) fn index_in(vocab: &Range<usize>, id: u32) -> Option<usize> {
    vocab.contains(&(id as usize)).then(|| id as usize - vocab.start)
}

/// Writes the logits of `row` after all changes to `scores`; returns false, and leaves `scores`
/// alone, if there is nothing to change.
pub(super) fn adjust(
    row: &SampleRow<'_>,
    vocab: &Range<usize>,
    logits: &[f32],
    counts: &mut Counts,
    scores: &mut Vec<f32>,
) -> bool {
    let params = row.params;
    let scaled = params.temperature >= MIN_TEMPERATURE && params.temperature != 1.0;
    let repetition = params.repetition_penalty != 1.0;
    let occurrence = params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
    let too_early = row.generated.len() < params.min_tokens && !params.stop_token_ids.is_empty();
    let excluded = row.mask.is_some() || too_early || !params.bad_words.is_empty();
    if !(scaled || repetition || occurrence || excluded || !params.logit_bias.is_empty()) {
        return false;
    }
    scores.clear();
    scores.extend_from_slice(logits);
    if repetition {
        let penalty = params.repetition_penalty;
        counts.for_each(vocab, &[row.prompt, row.generated], |index, _| {
            let score = &mut scores[index];
            *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
        });
    }
    if occurrence {
        let (presence, frequency) = (params.presence_penalty, params.frequency_penalty);
        counts.for_each(vocab, &[row.generated], |index, count| {
            scores[index] -= frequency * count as f32 + presence;
        });
    }
    for &(id, bias) in &params.logit_bias {
        if let Some(index) = index_in(vocab, id) {
            scores[index] += bias;
        }
    }
    let mut exclude = |id| {
        if let Some(index) = index_in(vocab, id) {
            scores[index] = f32::NEG_INFINITY;
        }
    };
    if too_early {
        params.stop_token_ids.iter().for_each(|&id| exclude(id));
    }
    for word in &params.bad_words {
        let (&last, before) = word.split_last().expect("validated: no bad word is empty");
        if ends_with(row, before) {
            exclude(last);
        }
    }
    if let Some(mask) = row.mask {
        let words = mask.iter().copied().chain(std::iter::repeat(0));
        for (block, word) in scores.chunks_mut(32).zip(words) {
            if word == u32::MAX {
                continue;
            }
            for (bit, score) in block.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *score = f32::NEG_INFINITY;
                }
            }
        }
    }
    if scaled {
        scores.iter_mut().for_each(|score| *score /= params.temperature);
    }
    true
}

/// Whether the prompt and the generated tokens, taken together, end with `suffix`.
fn ends_with(row: &SampleRow<'_>, suffix: &[u32]) -> bool {
    let history = row.generated.iter().rev().chain(row.prompt.iter().rev());
    row.generated.len() + row.prompt.len() >= suffix.len()
        && suffix.iter().rev().zip(history).all(|(wanted, found)| wanted == found)
}
