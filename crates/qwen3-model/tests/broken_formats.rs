//! Quantized checkpoints that are broken: each gives one line that names the tensor or the field,
//! and where it is.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use qwen3_model::comm::SoloComm;
use qwen3_model::{Isa, Model, ModelOptions, ModelSource};
use serde_json::{Map, Value, json};

/// A checkpoint whose parts a test changes.
struct Parts {
    header: Map<String, Value>,
    data: Vec<u8>,
    config: Value,
}

impl Parts {
    fn read(case: &str) -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(case);
        let file = fs::read(folder.join("model.safetensors")).unwrap();
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        Self {
            header: serde_json::from_slice(&file[8..8 + length]).unwrap(),
            data: file[8 + length..].to_vec(),
            config: serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap(),
        }
    }

    /// The bytes of a tensor.
    fn bytes(&mut self, tensor: &str) -> &mut [u8] {
        let at = |index: usize| self.header[tensor]["data_offsets"][index].as_u64().unwrap();
        let range = at(0) as usize..at(1) as usize;
        &mut self.data[range]
    }

    fn quantization(&mut self) -> &mut Value {
        &mut self.config["quantization_config"]
    }

    /// Writes the checkpoint and returns the error of loading it.
    fn error(&self) -> String {
        let folder = tempfile::tempdir().unwrap();
        let header = serde_json::to_vec(&self.header).unwrap();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend(header);
        file.extend(&self.data);
        fs::write(folder.path().join("model.safetensors"), file).unwrap();
        fs::write(folder.path().join("config.json"), self.config.to_string()).unwrap();
        let source = ModelSource::open(folder.path()).unwrap();
        let options = ModelOptions::new(Isa::scalar());
        match Model::load(&source, Arc::new(SoloComm::new()), &options, &|_| ()) {
            Ok(_) => "it loads".to_owned(),
            Err(error) => error.to_string(),
        }
    }
}

/// What is broken in one tensor.
#[derive(Debug)]
enum Fault {
    /// The tensor is called otherwise, and so is missing.
    Missing,
    /// Another type of as many bytes.
    Type(&'static str),
    /// Another shape of as many bytes.
    Shape(&'static [usize]),
    /// The first bytes of its data.
    Starts(&'static [u8]),
}

const BF16_NAN: &[u8] = &[0xc0, 0x7f];
const BF16_INFINITY: &[u8] = &[0x80, 0x7f];
const F16_NAN: &[u8] = &[0x00, 0x7e];
const F16_INFINITY: &[u8] = &[0x00, 0x7c];

#[test]
fn a_fault_in_a_tensor_of_codes_or_scales_names_the_file_and_the_tensor() {
    use Fault::{Missing, Shape, Starts, Type};
    let (gptq, packed, fp8) = ("gptq-int4-act", "ct-w4a16-asym", "fp8-block-moe");
    let expert = "model.layers.0.mlp.experts.0.gate_proj";
    let q_proj = "model.layers.0.self_attn.q_proj";
    let mut wrong = Vec::new();
    for (case, module, part, fault) in [
        (gptq, q_proj, "qweight", Missing),
        (gptq, q_proj, "qweight", Type("F32")),
        (gptq, q_proj, "qweight", Type("U32")),
        (gptq, q_proj, "qweight", Shape(&[256, 32])),
        (gptq, q_proj, "qweight", Shape(&[8192])),
        (gptq, q_proj, "qweight", Shape(&[32, 256, 1])),
        (gptq, q_proj, "qzeros", Missing),
        (gptq, q_proj, "qzeros", Type("F32")),
        (gptq, q_proj, "qzeros", Shape(&[32, 8])),
        (gptq, q_proj, "scales", Missing),
        (gptq, q_proj, "scales", Type("I16")),
        (gptq, q_proj, "scales", Shape(&[256, 8])),
        (gptq, q_proj, "scales", Shape(&[2048])),
        (gptq, q_proj, "scales", Starts(F16_NAN)),
        (gptq, q_proj, "scales", Starts(F16_INFINITY)),
        (gptq, q_proj, "g_idx", Type("F32")),
        (gptq, q_proj, "g_idx", Shape(&[16, 16])),
        (gptq, q_proj, "g_idx", Starts(&[8, 0, 0, 0])),
        (gptq, q_proj, "g_idx", Starts(&[0xff, 0xff, 0xff, 0xff])),
        (packed, q_proj, "weight_packed", Missing),
        (packed, q_proj, "weight_packed", Type("F32")),
        (packed, q_proj, "weight_packed", Shape(&[32, 256])),
        (packed, q_proj, "weight_scale", Missing),
        (packed, q_proj, "weight_scale", Type("I16")),
        (packed, q_proj, "weight_scale", Shape(&[2, 256])),
        (packed, q_proj, "weight_scale", Starts(BF16_NAN)),
        (packed, q_proj, "weight_scale", Starts(BF16_INFINITY)),
        (packed, q_proj, "weight_zero_point", Missing),
        (packed, q_proj, "weight_zero_point", Type("F32")),
        (packed, q_proj, "weight_zero_point", Shape(&[2, 32])),
        (packed, q_proj, "weight_shape", Starts(&[1])),
        (fp8, expert, "weight", Missing),
        (fp8, expert, "weight", Type("U8")),
        (fp8, expert, "weight", Shape(&[192, 160])),
        (fp8, expert, "weight", Starts(&[0x7f])),
        (fp8, expert, "weight_scale_inv", Missing),
        (fp8, expert, "weight_scale_inv", Type("I16")),
        (fp8, expert, "weight_scale_inv", Shape(&[4, 1])),
        (fp8, expert, "weight_scale_inv", Shape(&[4])),
        (fp8, expert, "weight_scale_inv", Starts(BF16_NAN)),
        (fp8, expert, "weight_scale_inv", Starts(BF16_INFINITY)),
    ] {
        let name = format!("{module}.{part}");
        let mut parts = Parts::read(case);
        match fault {
            Missing => {
                let tensor = parts.header.remove(&name).unwrap();
                parts.header.insert("other".to_owned(), tensor);
            }
            Type(dtype) => parts.header[&name]["dtype"] = dtype.into(),
            Shape(shape) => parts.header[&name]["shape"] = shape.into(),
            Starts(bytes) => parts.bytes(&name)[..bytes.len()].copy_from_slice(bytes),
        }
        let error = parts.error();
        let one_line = !error.contains('\n') && error.len() < 500;
        // A tensor that is in no file is missing in the folder.
        let place = if matches!(fault, Missing) { "has no tensor" } else { "model.safetensors" };
        if !error.contains(module) || !error.contains(place) || !one_line {
            wrong.push(format!("{case} {part} {fault:?}: {error}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_config_that_contradicts_the_weights_is_refused() {
    let mut wrong = Vec::new();
    for (case, field, value) in [
        ("gptq-int4-act", "/bits", json!(8)),
        ("gptq-int4-act", "/bits", json!(3)),
        ("gptq-int4-act", "/quant_method", json!("bitsandbytes")),
        ("gptq-int4-act", "/quant_method", json!(4)),
        ("ct-w4a16-asym", "/format", json!("marlin-24")),
        ("ct-w4a16-asym", "/config_groups/group_0/weights/num_bits", json!(8)),
        ("ct-w4a16-asym", "/config_groups/group_0/weights/group_size", json!(64)),
        ("fp8-block-moe", "/weight_block_size", json!([64, 128])),
    ] {
        let mut parts = Parts::read(case);
        *parts.quantization().pointer_mut(field).unwrap() = value.clone();
        let error = parts.error();
        let named = error.contains("config.json") || error.contains("model.layers.0.");
        if !named || error.contains('\n') {
            wrong.push(format!("{case} {field} {value}: {error}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
