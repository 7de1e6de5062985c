//! Checkpoints in the formats of other programs, against the answers that Hugging Face transformers
//! gives for the same codes and scales.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qwen3_model::comm::ThreadComm;
use qwen3_model::options::WeightFormat;
use qwen3_model::{Isa, LogitRows, Model, ModelOptions, ModelSource, ParallelStrategy, Sequence};
use safetensors::SafeTensors;

/// Cases in the repository.
const BUNDLED: [&str; 4] = ["fp8-block-moe", "gptq-int4-act", "ct-w4a16-asym", "gguf-ud-mix"];

/// All cases, where the reference data lies beside the workspace.
const ALL: [&str; 29] = [
    "awq-int4",
    "ct-fp8-channel",
    "ct-nvfp4",
    "ct-w4a16",
    "ct-w4a16-asym",
    "ct-w8a16",
    "ct-w8a8-int8",
    "fp8-block",
    "fp8-block-moe",
    "gguf-bf16",
    "gguf-f16",
    "gguf-f32",
    "gguf-iq4_nl",
    "gguf-iq4_xs",
    "gguf-moe-q4_k_m",
    "gguf-q2_k",
    "gguf-q3_k_m",
    "gguf-q4_0",
    "gguf-q4_1",
    "gguf-q4_k_m",
    "gguf-q5_0",
    "gguf-q5_1",
    "gguf-q5_k_m",
    "gguf-q6_k",
    "gguf-q8_0",
    "gguf-ud-mix",
    "gptq-int4",
    "gptq-int4-act",
    "gptq-int8",
];

struct Case {
    name: &'static str,
    folder: PathBuf,
    /// Of the prompt, then of the greedy continuation but for its last token.
    tokens: Vec<u32>,
    /// Of the prompt's tokens.
    logits: Vec<f32>,
    greedy: Vec<u32>,
    vocab: usize,
}

impl Case {
    fn read(name: &'static str, folder: PathBuf) -> Self {
        let bytes = fs::read(folder.join("expected.safetensors")).expect("the case's answers");
        let tensors = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let ids = |name: &str| -> Vec<u32> {
            let data = tensors.tensor(name).expect(name).data().to_vec();
            data.chunks_exact(8)
                .map(|id| i64::from_le_bytes(id.try_into().unwrap()) as u32)
                .collect()
        };
        let logits = tensors.tensor("logits").expect("logits");
        let vocab = logits.shape()[1];
        let logits: Vec<f32> = logits
            .data()
            .chunks_exact(4)
            .map(|x| f32::from_le_bytes(x.try_into().unwrap()))
            .collect();
        let (mut tokens, greedy) = (ids("input_ids"), ids("greedy_ids"));
        tokens.extend(&greedy[..greedy.len() - 1]);
        Self { name, folder, tokens, logits, greedy, vocab }
    }

    /// The largest difference of logits as a share of the largest logit, and how many of the greedy
    /// tokens are the same.
    fn distance(&self, ranks: usize, options: ModelOptions) -> (f32, usize) {
        let source = ModelSource::open(&self.folder).expect(self.name);
        let rows = std::thread::scope(|scope| {
            let ranks: Vec<_> = ThreadComm::group(ranks)
                .into_iter()
                .map(|comm| {
                    let source = &source;
                    scope.spawn(move || {
                        let model = Model::load(source, Arc::new(comm), &options, &|_| ())
                            .unwrap_or_else(|error| panic!("{}: {error}", self.name));
                        let mut sequence =
                            Sequence::new(&model, self.tokens.len()).expect("memory");
                        let logits = sequence.forward(&model, &self.tokens, LogitRows::All);
                        let rows = model.gather_logits(&logits.expect("logits")).expect("gathered");
                        rows.as_slice().expect("contiguous").to_vec()
                    })
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).next().expect("a rank")
        });
        let largest = self.logits.iter().fold(0.0_f32, |max, logit| max.max(logit.abs()));
        let differences = self.logits.iter().zip(&rows).map(|(a, b)| (a - b).abs());
        let distance = differences.fold(0.0_f32, f32::max) / largest;
        let first = self.tokens.len() - self.greedy.len();
        let best = rows.chunks_exact(self.vocab).skip(first).map(|row| {
            (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).expect("a vocabulary") as u32
        });
        (distance, best.zip(&self.greedy).filter(|(found, expected)| found == *expected).count())
    }
}

fn cases() -> Vec<Case> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let shared = root.join("../../../shared/oracle");
    let (folder, names) = if shared.is_dir() {
        (shared, &ALL[..])
    } else {
        eprintln!("only the bundled cases: {} is absent", shared.display());
        (root.join("tests/data"), &BUNDLED[..])
    };
    names.iter().map(|name| Case::read(name, folder.join(name))).collect()
}

#[test]
fn every_format_is_exact_in_f32_on_any_number_of_ranks() {
    for case in cases() {
        for ranks in [1, 2, 3, 5] {
            for strategy in [ParallelStrategy::Heads, ParallelStrategy::Sequence] {
                let options = ModelOptions {
                    strategy,
                    weights: Some(WeightFormat::F32),
                    ..ModelOptions::new(Isa::detect())
                };
                let (distance, greedy) = case.distance(ranks, options);
                let name = case.name;
                assert!(distance <= 2e-4, "{name} on {ranks} ranks, {strategy}: {distance:.1e}");
                assert_eq!(greedy, case.greedy.len(), "{name} on {ranks} ranks, {strategy}");
            }
        }
    }
}

/// As stored, floats and FP8 stay exact. Q8_0 is q8, whose products round activations of prompts to
/// 8 bits. Other codes are rounded to q8 when they are loaded, which adds to that.
#[test]
fn formats_as_stored() {
    for case in cases() {
        let exact = ["f32", "f16", "bf16", "fp8"].iter().any(|part| case.name.contains(part));
        let limit = match case.name {
            _ if exact => 2e-4,
            "gguf-q8_0" => 3e-2,
            _ => 5e-2,
        };
        for ranks in [1, 3] {
            let (distance, _) = case.distance(ranks, ModelOptions::new(Isa::detect()));
            println!("{} on {ranks} ranks: {distance:.1e}", case.name);
            assert!(distance <= limit, "{} on {ranks} ranks: {distance:.1e}", case.name);
        }
    }
}
