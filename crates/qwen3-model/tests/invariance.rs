//! The bits of a sequence's logits depend neither on the sequences beside it nor on how its prompt
//! is cut, on the number of threads, on a prefix that another sequence has computed, or on tokens
//! that are computed again.
//!
//! The model reaches what depends on sizes: heads of 128 elements, 4 query heads per KV head, 3 KV
//! heads, rows of more than 512 columns, and more positions than a segment of attention has.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use checkpoint::{CheckpointWriter, ModelSource, TensorSpec};
use comm::{Communicator, ThreadComm, WireFormat};
use qwen3_model::names::{TensorRole, tensor_specs};
use qwen3_model::options::{KvFormat, WeightFormat};
use qwen3_model::{Batch, Config, Isa, Model, ModelOptions, PAGE_POSITIONS, PageId, Span, Wanted};
use serde_json::{Value, json};

/// Cuts of a prompt; what is left comes last.
const CHUNKS: [usize; 9] = [1, 5, 6, 7, 12, 13, 127, 128, 129];
/// Positions of a prompt of more than a segment, and of a short one for slow instruction sets.
const LONG: usize = 1110;
const SHORT: usize = 70;
/// Generated tokens.
const GENERATED: usize = 8;
/// Pages of each sequence in the arena: of the first one, and of each other.
const FIRST_PAGES: usize = 9;
const OTHER_PAGES: usize = 2;

fn dense() -> Value {
    json!({
        "model_type": "qwen3", "hidden_size": 544, "intermediate_size": 576,
        "num_hidden_layers": 2, "num_attention_heads": 12, "num_key_value_heads": 3,
        "head_dim": 128, "vocab_size": 90, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4
    })
}

fn sparse() -> Value {
    let mut value = dense();
    let more = json!({
        "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 96, "norm_topk_prob": true
    });
    value.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    value
}

/// A checkpoint whose scores spread over the keys as those of a trained model do.
fn checkpoint(value: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("config.json"), value.to_string()).expect("written");
    let source = ModelSource::open(folder.path()).expect("a model");
    let config = Config::read(&source).expect("valid");
    let specs: Vec<_> = tensor_specs(&config).collect();
    let stored = specs.iter().map(|spec| TensorSpec {
        name: spec.name.clone(),
        format: WeightFormat::F32,
        shape: spec.shape.clone(),
    });
    let file = folder.path().join("model.safetensors");
    let stored: Vec<_> = stored.collect();
    let mut file = CheckpointWriter::create(file, &stored, &[]).expect("a new file");
    let mut state = 1u64;
    let mut random = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    for spec in &specs {
        let inputs = spec.shape[spec.shape.len() - 1] as f32;
        let values: Vec<f32> = match spec.role {
            TensorRole::Norm => (0..spec.elements()).map(|_| 1.5 + 0.5 * random()).collect(),
            _ => (0..spec.elements()).map(|_| 1.7 * random() / inputs.sqrt()).collect(),
        };
        file.write(&spec.name, &values).expect("written");
    }
    file.finish().expect("written");
    folder
}

fn token(sequence: usize, position: usize) -> u32 {
    ((position * 7919 + sequence * 31 + position * position % 11) % 90) as u32
}

/// How a sequence is computed.
#[derive(Clone, Copy, Debug)]
struct Schedule {
    threads: usize,
    /// Whether the prompt is cut.
    chunked: bool,
    /// Other sequences in the passes.
    others: usize,
}

/// How many positions of the first sequence each pass takes: those of the prompt, then generated
/// ones.
fn steps(prompt: usize, schedule: Schedule) -> Vec<usize> {
    let mut steps = Vec::new();
    let mut rest = prompt;
    for chunk in CHUNKS.into_iter().filter(|_| schedule.chunked) {
        if rest > chunk {
            steps.push(chunk);
            rest -= chunk;
        }
    }
    steps.push(rest);
    // Generated tokens that are computed again come several at once.
    steps.extend(if schedule.chunked { &[1, 3, 1, 1, 2][..] } else { &[1; GENERATED] });
    steps
}

/// The rows wanted of the first sequence, the same in all schedules.
fn wanted(prompt: usize) -> Vec<usize> {
    let mut ends = vec![prompt - 1];
    let mut end = 0;
    for chunk in CHUNKS {
        end += chunk;
        ends.extend((end <= prompt).then_some(end - 1));
    }
    ends.extend(prompt..prompt + GENERATED);
    ends.sort_unstable();
    ends.dedup();
    ends
}

/// A span of a sequence, and its tokens appended to the batch.
fn add(batch: &mut Batch, sequence: usize, positions: Range<usize>, prompt: usize, rows: &[usize]) {
    let first = batch.tokens.len();
    batch.tokens.extend(positions.clone().map(|position| token(sequence, position)));
    let page = |index: usize| match sequence {
        0 => index,
        _ => FIRST_PAGES + (sequence - 1) * OTHER_PAGES + index,
    };
    let pages = positions.end.div_ceil(PAGE_POSITIONS);
    let rows = rows.iter().filter(|row| positions.contains(row));
    batch.spans.push(Span {
        sequence: sequence as u64,
        start: positions.start,
        tokens: first..batch.tokens.len(),
        pages: (0..pages).map(|index| PageId(page(index) as u32)).collect(),
        slot: 0,
        first_rank: 0,
        generated: positions.start >= prompt,
        wanted: rows.map(|row| (row - positions.start, Wanted::Logits)).collect(),
    });
}

/// The bits of this rank's logits for each wanted row of the first sequence; and those for the rows
/// behind its first pages that a sequence with the same tokens gets, which begins there.
fn run(model: &Model, prompt: usize, schedule: Schedule) -> [BTreeMap<usize, Vec<u32>>; 2] {
    let pages = FIRST_PAGES + 1 + schedule.others * OTHER_PAGES;
    let mut arena = model.new_arena(pages, 0).expect("memory");
    let mut workspace = model.new_workspace();
    let rows = wanted(prompt);
    let [mut found, mut hit] = [const { BTreeMap::new() }; 2];
    let mut pass = |batch: &Batch, place: usize, found: &mut BTreeMap<_, _>| {
        let output = model.forward(&mut arena, batch, &mut workspace).expect("a pass");
        let span = &batch.spans[place];
        for ((index, _), row) in span.wanted.iter().zip(output.logits.values.outer_iter()) {
            let bits = row.iter().map(|x| x.to_bits()).collect();
            assert!(row.iter().all(|x| x.is_finite()) && row.len() > 1);
            found.insert(span.start + index, bits);
        }
    };
    let mut start = 0;
    let mut lengths = vec![0; schedule.others];
    for (step, count) in steps(prompt, schedule).into_iter().enumerate() {
        // The others come before and behind it, with prompts and single tokens.
        let mut batch = Batch::default();
        let mut other = |batch: &mut Batch, index: usize| {
            let count = if lengths[index] == 0 { 2 + index * 7 % 31 } else { 1 };
            if step >= index % 5 {
                let end = lengths[index] + count;
                add(batch, index + 1, lengths[index]..end, count * 2, &[]);
                lengths[index] = end;
            }
        };
        let half = schedule.others / 2;
        (0..half).for_each(|index| other(&mut batch, index));
        let place = batch.spans.len();
        add(&mut batch, 0, start..start + count, prompt, &rows);
        (half..schedule.others).for_each(|index| other(&mut batch, index));
        pass(&batch, place, &mut found);
        start += count;
    }
    let shared = prompt / PAGE_POSITIONS;
    let mut batch = Batch::default();
    add(&mut batch, 0, shared * PAGE_POSITIONS..prompt, prompt, &rows);
    batch.spans[0].pages[shared] = PageId(pages as u32 - 1);
    pass(&batch, 0, &mut hit);
    [found, hit]
}

/// What a model is loaded with.
#[derive(Clone, Copy, Debug)]
struct Setting {
    isa: Isa,
    weights: WeightFormat,
    kv: KvFormat,
    ranks: usize,
    wire: WireFormat,
}

/// Every schedule gives the bits of the first one.
fn check(folder: &Path, prompt: usize, setting: Setting) {
    let Setting { isa, weights, kv, ranks, wire } = setting;
    let on_rank = |comm: ThreadComm, schedule: Schedule| {
        comm.set_wire(wire);
        let options = ModelOptions {
            weights: Some(weights),
            kv,
            threads: schedule.threads,
            ..ModelOptions::new(isa)
        };
        let source = ModelSource::open(folder).expect("a model");
        let model = Model::load(&source, Arc::new(comm), &options, &|_| ()).expect("it loads");
        run(&model, prompt, schedule)
    };
    let on_ranks = |schedule: Schedule| {
        std::thread::scope(|scope| {
            let group = ThreadComm::group(ranks).into_iter();
            let ranks: Vec<_> = group.map(|comm| scope.spawn(|| on_rank(comm, schedule))).collect();
            ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect::<Vec<_>>()
        })
    };
    let schedule = |threads, chunked, others| Schedule { threads, chunked, others };
    let expected = on_ranks(schedule(1, false, 0));
    for schedule in
        [schedule(3, true, 0), schedule(2, false, 1), schedule(3, true, 7), schedule(2, true, 31)]
    {
        for ([expected, _], found) in expected.iter().zip(on_ranks(schedule)) {
            for (found, rows) in found.iter().zip([expected.len(), 1]) {
                assert!(found.len() >= rows, "{setting:?}, {schedule:?}: {} rows", found.len());
                for (position, bits) in found {
                    let label = format!("{setting:?}, {schedule:?}, position {position}");
                    assert!(*bits == expected[position], "{label}: other bits");
                }
            }
        }
    }
}

fn vector_sets() -> Vec<Isa> {
    let sets: Vec<_> = Isa::all().filter(|isa| isa.has_avx2()).collect();
    if sets.is_empty() {
        eprintln!("not tested: this CPU has no AVX2");
    }
    sets
}

/// The last vector instruction set, if there is one.
fn best() -> Vec<Isa> {
    vector_sets().split_off(vector_sets().len().saturating_sub(1))
}

const ALONE: (usize, WireFormat) = (1, WireFormat::F32);

#[test]
fn with_every_instruction_set() {
    let folder = checkpoint(&dense());
    let (ranks, wire) = ALONE;
    for isa in vector_sets() {
        for (weights, kv) in
            [(WeightFormat::Bf16, KvFormat::F16), (WeightFormat::Q8, KvFormat::F32)]
        {
            check(folder.path(), LONG, Setting { isa, weights, kv, ranks, wire });
        }
    }
    for isa in Isa::all().filter(|isa| !isa.has_avx2()) {
        let (weights, kv) = (WeightFormat::F32, KvFormat::F16);
        check(folder.path(), SHORT, Setting { isa, weights, kv, ranks, wire });
    }
}

#[test]
fn with_every_format() {
    let folder = checkpoint(&dense());
    let (ranks, wire) = ALONE;
    for isa in best() {
        for (weights, kv) in [
            (WeightFormat::F32, KvFormat::F32),
            (WeightFormat::F16, KvFormat::Q8),
            (WeightFormat::Q4, KvFormat::F16),
        ] {
            check(folder.path(), LONG, Setting { isa, weights, kv, ranks, wire });
        }
    }
}

#[test]
fn on_three_ranks_with_a_short_wire() {
    let folder = checkpoint(&dense());
    for isa in best() {
        for (weights, wire) in
            [(WeightFormat::Bf16, WireFormat::Bf16), (WeightFormat::Q8, WireFormat::Q8)]
        {
            let (kv, ranks) = (KvFormat::F16, 3);
            check(folder.path(), LONG, Setting { isa, weights, kv, ranks, wire });
        }
    }
}

#[test]
fn with_experts() {
    let folder = checkpoint(&sparse());
    for isa in best() {
        for (weights, (ranks, wire)) in [
            (WeightFormat::Bf16, ALONE),
            (WeightFormat::Q8, ALONE),
            (WeightFormat::Q4, (3, WireFormat::Bf16)),
        ] {
            let kv = KvFormat::F16;
            check(folder.path(), LONG, Setting { isa, weights, kv, ranks, wire });
        }
    }
}
