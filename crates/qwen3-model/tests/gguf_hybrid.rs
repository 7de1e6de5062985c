//! Hybrid models in GGUF files: the reference cases, written as llama.cpp's converter writes them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use checkpoint::Checkpoint;
use qwen3_model::comm::ThreadComm;
use qwen3_model::hybrid_config::HybridConfig;
use qwen3_model::names::{TensorSpec, tensor_specs};
use qwen3_model::{
    Config, Isa, LogitRows, Model, ModelOptions, ModelSource, PAGE_POSITIONS, Sequence,
};
use safetensors::SafeTensors;

/// A GGUF file in the making; all tensors are f32.
#[derive(Default)]
struct Gguf {
    keys: Vec<u8>,
    key_count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

impl Gguf {
    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    }

    fn key(&mut self, key: &str, kind: u32, value: &[u8]) {
        Self::text(&mut self.keys, key);
        self.keys.extend(kind.to_le_bytes());
        self.keys.extend(value);
        self.key_count += 1;
    }

    fn size(&mut self, key: &str, value: usize) {
        self.key(key, 4, &(value as u32).to_le_bytes());
    }

    fn float(&mut self, key: &str, value: f32) {
        self.key(key, 6, &value.to_le_bytes());
    }

    /// A tensor of the given shape, rows first.
    fn tensor(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        Self::text(&mut self.tensors, name);
        self.tensors.extend((shape.len() as u32).to_le_bytes());
        for dim in shape.iter().rev() {
            self.tensors.extend((*dim as u64).to_le_bytes());
        }
        self.tensors.extend(0_u32.to_le_bytes());
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self.tensors.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self.tensor_count += 1;
    }

    fn write(&self, file: &Path) {
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend(self.tensor_count.to_le_bytes());
        out.extend(self.key_count.to_le_bytes());
        out.extend(&self.keys);
        out.extend(&self.tensors);
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        fs::write(file, out).expect("writable");
    }
}

/// The part of a name in GGUF files, of the part in transformers.
fn part_name(part: &str) -> String {
    let (own, field) = part.rsplit_once('.').unwrap_or((part, ""));
    let own = match own {
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" => "post_attention_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "linear_attn.in_proj_qkv" => "attn_qkv",
        "linear_attn.in_proj_z" => "attn_gate",
        "linear_attn.in_proj_b" => "ssm_beta",
        "linear_attn.in_proj_a" => "ssm_alpha",
        "linear_attn.in_proj_ba" => "ssm_ba",
        "linear_attn.conv1d" => "ssm_conv1d",
        "linear_attn.norm" => "ssm_norm",
        "linear_attn.out_proj" => "ssm_out",
        "linear_attn" if field == "A_log" => return "ssm_a".to_owned(),
        "linear_attn" if field == "dt_bias" => return "ssm_dt.bias".to_owned(),
        "mlp.gate" => "ffn_gate_inp",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "mlp.shared_expert.gate_proj" => "ffn_gate_shexp",
        "mlp.shared_expert.up_proj" => "ffn_up_shexp",
        "mlp.shared_expert.down_proj" => "ffn_down_shexp",
        "mlp.shared_expert_gate" => "ffn_gate_inp_shexp",
        other => panic!("a tensor of the layer: {other}"),
    };
    format!("{own}.{field}")
}

/// Moves value heads from their order by key head to llama.cpp's: the first of each key head, then
/// the second of each. `rows` are the rows of the heads, `width` elements each.
fn tile(rows: &[f32], hybrid: &HybridConfig, head_rows: usize, width: usize) -> Vec<f32> {
    let (keys, group) = (hybrid.linear_num_key_heads, hybrid.group_size());
    let size = head_rows * width;
    let head = |index: usize| {
        let source = index % keys * group + index / keys;
        rows[source * size..(source + 1) * size].to_vec()
    };
    (0..keys * group).flat_map(head).collect()
}

/// The columns of a matrix in that order.
fn tile_columns(values: &[f32], hybrid: &HybridConfig) -> Vec<f32> {
    let width = hybrid.value_size();
    values
        .chunks(width)
        .flat_map(|row| tile(row, hybrid, hybrid.linear_value_head_dim, 1))
        .collect()
}

/// Queries, keys, values and output gates of a fused projection, each ordered by head.
fn unfuse(values: &[f32], hybrid: &HybridConfig, hidden: usize) -> (Vec<f32>, Vec<f32>) {
    let (dim, value_dim) = (hybrid.linear_key_head_dim, hybrid.linear_value_head_dim);
    let own = hybrid.group_size() * value_dim;
    let stride = 2 * dim + 2 * own;
    let part = |start: usize, rows: usize| -> Vec<f32> {
        let heads = values.chunks(stride * hidden);
        heads.flat_map(|head| head[start * hidden..(start + rows) * hidden].to_vec()).collect()
    };
    let qkv = [part(0, dim), part(dim, dim), part(2 * dim, own)].concat();
    (qkv, part(2 * dim + own, own))
}

/// Writes the checkpoint in `folder` as a GGUF file.
fn convert(folder: &Path, file: &Path) {
    let source = ModelSource::open(folder).expect("a model");
    let config = Config::read(&source).expect("a valid configuration");
    let checkpoint = Checkpoint::open(folder).expect("a valid checkpoint");
    let hybrid = config.hybrid.as_ref().expect("a hybrid model");
    let fused = checkpoint.contains("model.layers.0.linear_attn.in_proj_qkvz.weight");
    let architecture = match (&config.moe, fused) {
        (_, true) => "qwen3next",
        (Some(_), false) => "qwen35moe",
        (None, false) => "qwen35",
    };
    let mut gguf = Gguf::default();
    let mut name = Vec::new();
    Gguf::text(&mut name, architecture);
    gguf.key("general.architecture", 8, &name);
    let key = |name: &str| format!("{architecture}.{name}");
    // One layer more, which predicts a second token.
    gguf.size(&key("block_count"), config.num_hidden_layers + 1);
    gguf.size(&key("nextn_predict_layers"), 1);
    gguf.tensor(&format!("blk.{}.nextn.enorm.weight", config.num_hidden_layers), &[1], &[1.0]);
    gguf.tensor(&format!("blk.{}.attn_norm.weight", config.num_hidden_layers), &[1], &[1.0]);
    for (field, size) in [
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.key_length", config.head_dim),
        ("rope.dimension_count", config.rope.rotary_dim(config.head_dim)),
        ("ssm.conv_kernel", hybrid.linear_conv_kernel_dim),
        ("ssm.state_size", hybrid.linear_key_head_dim),
        ("ssm.group_count", hybrid.linear_num_key_heads),
        ("ssm.time_step_rank", hybrid.linear_num_value_heads),
        ("ssm.inner_size", hybrid.value_size()),
        ("full_attention_interval", 4),
    ] {
        gguf.size(&key(field), size);
    }
    gguf.float(&key("attention.layer_norm_rms_epsilon"), config.rms_norm_eps);
    gguf.float(&key("rope.freq_base"), config.rope.theta as f32);
    if let Some(moe) = &config.moe {
        gguf.size(&key("expert_count"), moe.num_experts);
        gguf.size(&key("expert_used_count"), moe.num_experts_per_tok);
        gguf.size(&key("expert_feed_forward_length"), moe.moe_intermediate_size);
        let shared = moe.shared_expert_intermediate_size.expect("a shared expert");
        gguf.size(&key("expert_shared_feed_forward_length"), shared);
    }
    let read = |spec: &TensorSpec| -> Vec<f32> {
        let [rows, cols] = spec.shape[..] else {
            return checkpoint.values(&spec.name, &spec.shape).expect("readable");
        };
        let mut values = vec![0.0; rows * cols];
        let matrix = checkpoint.matrix(&spec.name, rows, cols).expect("present");
        matrix.read_rows(0..rows, &mut values).expect("readable");
        values
    };
    let mut experts: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    for spec in tensor_specs(&config) {
        let mut values = read(&spec);
        if spec.name.ends_with("norm.weight") && !spec.name.contains("linear_attn") {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        let mut shape = spec.shape.clone();
        let Some(rest) = spec.name.strip_prefix("model.layers.") else {
            let name = match spec.name.as_str() {
                "model.embed_tokens.weight" => "token_embd.weight",
                "model.norm.weight" => "output_norm.weight",
                "lm_head.weight" => "output.weight",
                other => panic!("a tensor of the model: {other}"),
            };
            gguf.tensor(name, &shape, &values);
            continue;
        };
        let (layer, part) = rest.split_once('.').expect("a layer");
        if let Some((_, own)) = part.split_once(".experts.") {
            let (_, own) = own.split_once('.').expect("an expert");
            let own = own.trim_end_matches("_proj.weight");
            let name = format!("blk.{layer}.ffn_{own}_exps.weight");
            match experts.iter_mut().find(|(other, ..)| *other == name) {
                Some((_, shape, all)) => {
                    shape[0] += 1;
                    all.extend(values);
                }
                None => experts.push((name, [&[1], &shape[..]].concat(), values)),
            }
            continue;
        }
        let (hidden, value_dim) = (config.hidden_size, hybrid.linear_value_head_dim);
        if part == "linear_attn.in_proj_qkvz.weight" {
            let (qkv, z) = unfuse(&values, hybrid, hidden);
            let name = |part: &str| format!("blk.{layer}.{part}.weight");
            gguf.tensor(&name("attn_qkv"), &[qkv.len() / hidden, hidden], &qkv);
            gguf.tensor(&name("attn_gate"), &[z.len() / hidden, hidden], &z);
            continue;
        }
        if part == "linear_attn.A_log" {
            values.iter_mut().for_each(|value| *value = -value.exp());
        }
        if part.contains("conv1d") {
            shape.remove(1);
        }
        if part.contains("shared_expert_gate") {
            shape.remove(0);
        }
        if !fused {
            let first = 2 * hybrid.key_size();
            match part.trim_end_matches(".weight") {
                "linear_attn.in_proj_qkv" => {
                    let tail = tile(&values[first * hidden..], hybrid, value_dim, hidden);
                    values.splice(first * hidden.., tail);
                }
                "linear_attn.conv1d" => {
                    let taps = hybrid.linear_conv_kernel_dim;
                    let tail = tile(&values[first * taps..], hybrid, value_dim, taps);
                    values.splice(first * taps.., tail);
                }
                "linear_attn.in_proj_z" => values = tile(&values, hybrid, value_dim, hidden),
                "linear_attn.in_proj_b" | "linear_attn.in_proj_a" => {
                    values = tile(&values, hybrid, 1, hidden);
                }
                "linear_attn.A_log" | "linear_attn.dt_bias" => values = tile(&values, hybrid, 1, 1),
                "linear_attn.out_proj" => values = tile_columns(&values, hybrid),
                _ => {}
            }
        }
        gguf.tensor(&format!("blk.{layer}.{}", part_name(part)), &shape, &values);
    }
    for (name, shape, values) in experts {
        gguf.tensor(&name, &shape, &values);
    }
    gguf.write(file);
}

fn check(case: &Path) {
    let bytes = fs::read(case.join("expected.safetensors")).expect("the answers");
    let answers = SafeTensors::deserialize(&bytes).expect("a safetensors file");
    let data = |name: &str| answers.tensor(name).expect(name).data().to_vec();
    let tokens: Vec<u32> = data("input_ids")
        .chunks(8)
        .map(|id| i64::from_le_bytes(id.try_into().expect("eight bytes")) as u32)
        .collect();
    let logits: Vec<f32> = data("logits")
        .chunks(4)
        .map(|x| f32::from_le_bytes(x.try_into().expect("four bytes")))
        .collect();
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("model.gguf");
    convert(case, &file);
    let source = ModelSource::open(&file).expect("a GGUF file");
    for ranks in [1, 2, 3, 5] {
        std::thread::scope(|scope| {
            for comm in ThreadComm::group(ranks) {
                let (source, tokens, logits) = (&source, &tokens, &logits);
                scope.spawn(move || {
                    let options = ModelOptions::new(Isa::detect());
                    let model = Model::load(source, Arc::new(comm), &options, &|_| ())
                        .unwrap_or_else(|error| panic!("{error}"));
                    let mut sequence = Sequence::new(&model, PAGE_POSITIONS * 2).expect("memory");
                    let own = sequence.forward(&model, tokens, LogitRows::All).expect("a pass");
                    let rows = model.gather_logits(&own).expect("all ranks");
                    let largest = logits.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                    let apart = rows.iter().zip(logits).map(|(a, b)| (a - b).abs());
                    let distance = apart.fold(0.0f32, f32::max) / largest;
                    assert!(distance <= 2e-4, "{} on {ranks} ranks: {distance}", case.display());
                });
            }
        });
    }
}

#[test]
fn converted_hybrids_give_the_references_logits() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    check(&root.join("tests/data/qwen3next"));
    let shared: PathBuf = root.join("../../../shared/oracle");
    for case in ["qwen35-dense", "qwen35-long", "qwen35-moe"] {
        if shared.join(case).is_dir() {
            check(&shared.join(case));
        } else {
            eprintln!("{case} is not checked: {} is absent", shared.display());
        }
    }
}
