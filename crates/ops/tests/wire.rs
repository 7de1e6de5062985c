//! What a short wire leaves of attention to keys of earlier passes on other ranks.

use std::sync::Arc;
use std::{iter, thread};

use comm::{Communicator, ThreadComm, WireFormat};
use ops::attention::{AttentionAlgorithm, AttentionShape, AttentionSpec, QkNorm, Rotary};
use ops::attention_headwise::{AttentionScratch, TokenSpan};
use ops::attention_sequence::PassPlan;
use ops::{Context, Isa, KvArena, PAGE_POSITIONS, PageId, Placement, attention_sequence};
use simd_kernels::KvFormat;
use tensor::Activations;

const HEAD_DIM: usize = 32;
/// Tokens of the two passes.
const PASSES: [usize; 2] = [400, 8];
/// The token whose key one head looks for.
const SOUGHT: usize = 5;

/// Two heads: one sees the sought key alone, so that its softmax's sum is 1, the other sees all
/// keys alike, with a sum of hundreds.
#[test]
fn the_sum_of_one_head_is_not_rounded_by_that_of_another() {
    for wire in [WireFormat::Bf16, WireFormat::Q8] {
        thread::scope(|scope| {
            for comm in ThreadComm::group(2) {
                comm.set_wire(wire);
                scope.spawn(move || attend(Arc::new(comm)));
            }
        });
    }
}

fn value(token: usize, index: usize) -> f32 {
    ((token * 31 + index * 17) % 97) as f32 / 97.0 - 0.3
}

/// A query that meets the sought key, one that meets none, the key and the value of a token.
fn row(token: usize) -> Vec<f32> {
    let one_hot =
        |place: usize| (0..HEAD_DIM).map(move |index| if index == place { 1.0 } else { 0.0 });
    let key = one_hot(if token == SOUGHT { 1 } else { 0 });
    one_hot(1)
        .chain(one_hot(20))
        .chain(key)
        .chain((0..HEAD_DIM).map(|index| value(token, index)))
        .collect()
}

fn attend(comm: Arc<dyn Communicator>) {
    let ctx = Context::new(Isa::detect(), comm, 1, 1, Placement::Free).expect("the grid forms");
    let shape = AttentionShape { groups: iter::once(0..2).collect(), head_dim: HEAD_DIM };
    let norm = vec![2.0; HEAD_DIM];
    let pages = PASSES.iter().sum::<usize>().div_ceil(PAGE_POSITIONS);
    let mut arena = KvArena::new(KvFormat::F32, 1, 1, HEAD_DIM, pages).expect("memory");
    let (mut scratch, mut start) = (AttentionScratch::default(), 0);
    for tokens in PASSES {
        let pages = (0..pages as u32).map(PageId).collect();
        let span = TokenSpan { tokens, start, pages, first_rank: 1, generated: false };
        let plan = PassPlan::new(&ctx, &shape, &[span]);
        let own: Vec<usize> =
            plan.layout().indices(ctx.positions.rank()).map(|index| start + index).collect();
        let mut qkv = Activations::default((own.len(), 4 * HEAD_DIM));
        for (place, token) in own.iter().enumerate() {
            qkv.row_mut(place).iter_mut().zip(row(*token)).for_each(|(to, from)| *to = from);
        }
        // No rotation.
        let (cos, sin) = (
            Activations::ones((own.len(), HEAD_DIM / 2)),
            Activations::zeros((own.len(), HEAD_DIM / 2)),
        );
        let spec = AttentionSpec {
            algorithm: AttentionAlgorithm::Streaming,
            shape: &shape,
            norm: QkNorm { q: &norm, k: &norm, eps: 1e-6 },
            rotary: Rotary { cos: &cos, sin: &sin },
        };
        let (pages, mut out) = (&mut arena.layer(0), Activations::default((0, 0)));
        attention_sequence(&ctx, &spec, &plan, &mut qkv, pages, &mut scratch, &mut out)
            .expect("all ranks are there");
        for (token, out) in own.iter().zip(out.outer_iter()).filter(|(token, _)| **token >= SOUGHT)
        {
            for index in 0..HEAD_DIM {
                let mean =
                    (0..=*token).map(|other| value(other, index)).sum::<f32>() / (token + 1) as f32;
                for (head, expected) in [value(SOUGHT, index), mean].into_iter().enumerate() {
                    let found = out[head * HEAD_DIM + index];
                    assert!(
                        (found - expected).abs() < 0.01,
                        "token {token}, head {head}: {found}, not {expected}"
                    );
                }
            }
        }
        start += tokens;
    }
}
