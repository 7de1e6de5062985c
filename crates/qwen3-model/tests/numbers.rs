//! Files whose numbers a pass cannot hold, and biases that a config does not state.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use qwen3_model::comm::SoloComm;
use qwen3_model::options::KvFormat;
use qwen3_model::{Isa, LogitRows, Model, ModelError, ModelOptions, ModelSource, Sequence};
use serde_json::{Value, json};

const CASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/dense-untied-f32");

/// Copies the case, with another value in every element of the f32 tensor `name`, which is added
/// with `len` elements if it is not there.
fn copy(name: &str, len: usize, value: f32) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let config = Path::new(CASE).join("config.json");
    fs::copy(config, folder.path().join("config.json")).expect("copied");
    let mut bytes = fs::read(Path::new(CASE).join("model.safetensors")).expect("the case");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("JSON");
    let mut data = bytes.split_off(8 + length);
    if header.get(name).is_none() {
        let offsets = [data.len(), data.len() + 4 * len];
        header[name] = json!({"dtype": "F32", "shape": [len], "data_offsets": offsets});
        data.resize(offsets[1], 0);
    }
    let offset = |index: usize| header[name]["data_offsets"][index].as_u64().expect("set") as usize;
    for element in data[offset(0)..offset(1)].chunks_exact_mut(4) {
        element.copy_from_slice(&value.to_le_bytes());
    }
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    fs::write(folder.path().join("model.safetensors"), file).expect("writable");
    folder
}

fn load(folder: &Path, kv: KvFormat) -> Result<Model, ModelError> {
    let options = ModelOptions { kv, ..ModelOptions::new(Isa::detect()) };
    let source = ModelSource::open(folder).expect("a model");
    Model::load(&source, Arc::new(SoloComm::new()), &options, &|_| ())
}

#[test]
fn logits_that_are_not_finite_are_an_error_that_names_the_cause() {
    // Keys of this size fit f32 and not f16.
    let folder = copy("model.layers.0.self_attn.k_norm.weight", 0, 1.0e6);
    for (kv, finite) in [(KvFormat::F32, true), (KvFormat::F16, false)] {
        let model = load(folder.path(), kv).expect("loads");
        let mut sequence = Sequence::new(&model, 16).expect("memory");
        let logits = sequence.forward(&model, &[1, 2, 3], LogitRows::All);
        match logits {
            Ok(logits) => {
                assert!(finite && logits.values.iter().all(|logit| logit.is_finite()), "{kv}");
            }
            Err(error) => {
                assert!(!finite && matches!(error, ModelError::NotFinite { .. }), "{kv}: {error}");
                let text = error.to_string();
                assert!(text.contains("format of the cache") && text.contains("65504"), "{text}");
            }
        }
    }
    // The square of such an embedding overflows; its norm is finite all the same.
    let folder = copy("model.embed_tokens.weight", 0, 1.0e30);
    let model = load(folder.path(), KvFormat::F32).expect("loads");
    let mut sequence = Sequence::new(&model, 16).expect("memory");
    let logits = sequence.forward(&model, &[1, 2, 3], LogitRows::Last).expect("finite");
    assert!(logits.values.iter().any(|logit| *logit != 0.0));
}

#[test]
fn biases_are_refused_unless_they_are_zero() {
    let bias = "model.layers.0.self_attn.q_proj.bias";
    let config: Value =
        serde_json::from_slice(&fs::read(Path::new(CASE).join("config.json")).expect("the case"))
            .expect("JSON");
    let size = |field: &str| config[field].as_u64().expect("a size") as usize;
    let rows = size("num_attention_heads") * size("head_dim");
    load(copy(bias, rows, 0.0).path(), KvFormat::F32).expect("zeros change nothing");
    let error = load(copy(bias, rows, 0.5).path(), KvFormat::F32).err().expect("a bias");
    assert!(error.to_string().contains(bias), "{error}");
}
