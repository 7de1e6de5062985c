//! GGUF files: the documents made from their metadata, split files, and broken ones.

mod folder;

use std::fs;

use checkpoint::{CheckpointError, DocumentError, ModelSource, OpenError};
use folder::Folder;
use serde_json::Value;

/// Writes GGUF headers.
#[derive(Default, Clone)]
struct Gguf {
    keys: Vec<u8>,
    key_count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Gguf {
    fn raw(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        text(&mut self.keys, key);
        self.keys.extend(kind.to_le_bytes());
        self.keys.extend(value);
        self.key_count += 1;
        self
    }

    fn string(self, key: &str, value: &str) -> Self {
        let mut bytes = Vec::new();
        text(&mut bytes, value);
        self.raw(key, 8, &bytes)
    }

    fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, &value.to_le_bytes())
    }

    fn f32(self, key: &str, value: f32) -> Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    fn strings(self, key: &str, values: &[&str]) -> Self {
        let mut bytes = 8_u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| text(&mut bytes, value));
        self.raw(key, 9, &bytes)
    }

    fn ints(self, key: &str, values: &[i32]) -> Self {
        let mut bytes = 5_u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
        self.raw(key, 9, &bytes)
    }

    /// A tensor whose data is `data`; `dims` as the file has them, columns first.
    fn tensor(mut self, name: &str, dims: &[u64], kind: u32, data: &[u8]) -> Self {
        text(&mut self.tensors, name);
        self.tensors.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| self.tensors.extend(dim.to_le_bytes()));
        self.tensors.extend(kind.to_le_bytes());
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self.tensors.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(data);
        self.tensor_count += 1;
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend(self.tensor_count.to_le_bytes());
        out.extend(self.key_count.to_le_bytes());
        out.extend(&self.keys);
        out.extend(&self.tensors);
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        out
    }
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn model() -> Gguf {
    Gguf::default()
        .string("general.architecture", "qwen3")
        .u32("qwen3.block_count", 2)
        .u32("qwen3.context_length", 512)
        .u32("qwen3.embedding_length", 4)
        .u32("qwen3.feed_forward_length", 96)
        .u32("qwen3.attention.head_count", 4)
        .u32("qwen3.attention.head_count_kv", 2)
        .u32("qwen3.attention.key_length", 16)
        .f32("qwen3.attention.layer_norm_rms_epsilon", 1e-6)
        .f32("qwen3.rope.freq_base", 1e6)
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", "qwen2")
        .strings("tokenizer.ggml.tokens", &["a", "b", "ab", "<|end|>", "<think>"])
        .strings("tokenizer.ggml.merges", &["a b"])
        .ints("tokenizer.ggml.token_type", &[1, 1, 1, 3, 4])
        .u32("tokenizer.ggml.eos_token_id", 3)
        .string("tokenizer.chat_template", "{{ messages }}")
        .string("tokenizer.chat_template.tool_use", "{{ tools }}")
        .tensor("token_embd.weight", &[4, 5], 0, &f32s(&[0.5; 20]))
        .tensor("output_norm.weight", &[4], 0, &f32s(&[1.0, 2.0, 3.0, 4.0]))
}

fn parse(document: &checkpoint::Document) -> Value {
    serde_json::from_slice(&document.bytes).expect("JSON")
}

#[test]
fn documents_come_from_the_metadata() {
    let folder = Folder::new();
    let file = folder.file("model.gguf", &model().bytes());
    // The file, and the folder that holds it alone.
    for path in [file.as_path(), folder.path()] {
        let source = ModelSource::open(path).unwrap();
        let config = parse(source.config().unwrap());
        for (field, value) in [
            ("model_type", Value::from("qwen3")),
            ("num_hidden_layers", 2.into()),
            ("hidden_size", 4.into()),
            ("head_dim", 16.into()),
            ("vocab_size", 5.into()),
            ("rms_norm_eps", 1e-6.into()),
            ("rope_theta", 1e6.into()),
            ("tie_word_embeddings", true.into()),
            ("eos_token_id", vec![3].into()),
        ] {
            assert_eq!(config[field], value, "{field}");
        }
        assert!(source.has_tokenizer() && source.generation_config().unwrap().is_none());
        source.find_tokenizer().unwrap();
        let tokenizer = parse(&source.tokenizer().unwrap());
        assert_eq!(tokenizer["model"]["vocab"], serde_json::json!({"a": 0, "b": 1, "ab": 2}));
        assert_eq!(tokenizer["model"]["merges"], serde_json::json!([["a", "b"]]));
        let added = tokenizer["added_tokens"].as_array().unwrap();
        assert_eq!(
            (added[0]["special"].clone(), added[1]["special"].clone()),
            (true.into(), false.into())
        );
        let config = parse(source.tokenizer_config().unwrap().unwrap());
        assert_eq!(config["eos_token"], "<|end|>");
        let templates = source.chat_templates().unwrap();
        assert_eq!(templates[0].0, "default");
        assert_eq!(templates[1].0, "tool_use");
        let weights = source.weights().unwrap();
        assert_eq!(weights.vector("model.norm.weight", 4).unwrap(), [1.0, 2.0, 3.0, 4.0]);
        let matrix = weights.matrix("model.embed_tokens.weight", 5, 4).unwrap();
        let mut row = [0.0; 4];
        matrix.read_row(4, &mut row).unwrap();
        assert_eq!(row, [0.5; 4]);
    }
}

#[test]
fn split_models_are_opened_by_their_first_part() {
    let folder = Folder::new();
    let first = folder.file("m-00001-of-00002.gguf", &model().bytes());
    let source = ModelSource::open(&first).unwrap();
    let error = source.weights().unwrap_err();
    assert!(matches!(error, CheckpointError::GgufPart { count: 2, .. }), "{error}");
    assert!(error.to_string().contains("m-00002-of-00002.gguf"), "{error}");
    let other = Gguf::default().tensor("output.weight", &[4, 5], 0, &f32s(&[0.25; 20]));
    let second = folder.file("m-00002-of-00002.gguf", &other.bytes());
    for path in [first.as_path(), folder.path()] {
        let source = ModelSource::open(path).unwrap();
        assert_eq!(parse(source.config().unwrap())["tie_word_embeddings"], false);
        let mut row = [0.0; 4];
        let head = source.weights().unwrap().matrix("lm_head.weight", 5, 4).unwrap();
        head.read_row(0, &mut row).unwrap();
        assert_eq!(row, [0.25; 4]);
    }
    let error = ModelSource::open(&second).unwrap_err();
    assert!(matches!(error, OpenError::LaterPart { .. }), "{error}");
    folder.file("n.gguf", &model().bytes());
    let error = ModelSource::open(folder.path()).unwrap_err();
    assert!(matches!(error, OpenError::SeveralGguf { .. }), "{error}");
}

#[test]
fn broken_headers_are_one_line() {
    let folder = Folder::new();
    let good = model().bytes();
    let with = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let tensor = |dims: &[u64], kind: u32, data: &[u8]| {
        Gguf::default().tensor("w", dims, kind, data).bytes()
    };
    for (bytes, part) in [
        (vec![], "shorter than its header says"),
        (with(0, b"GGML"), "the magic"),
        (with(4, &1_u32.to_le_bytes()), "the version is 1, expected 2 or 3"),
        (with(8, &u64::MAX.to_le_bytes()), "the number of tensors"),
        (with(16, &1_000_000_u64.to_le_bytes()), "the number of keys is 1000000"),
        (with(24, &u64::MAX.to_le_bytes()), "a key"),
        (good[..good.len() - 8].to_vec(), "shorter than its header says"),
        (good[..100].to_vec(), "shorter than its header says"),
        (Gguf::default().raw("k", 13, &[0]).bytes(), "k is a value of type 13"),
        (Gguf::default().raw("k", 7, &[2]).bytes(), "k is 2, expected 0 or 1"),
        (Gguf::default().u32("k", 1).u32("k", 2).bytes(), "k is there twice"),
        (Gguf::default().u32("general.alignment", 3).bytes(), "general.alignment"),
        (Gguf::default().raw("k", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]).bytes(), "not UTF-8"),
        (
            Gguf::default().raw("k", 9, &[4, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]).bytes(),
            "k is 1099511627776",
        ),
        (tensor(&[], 0, &[]), "w is 0 dimensions"),
        (tensor(&[1; 5], 0, &[0; 4]), "w is 5 dimensions"),
        (tensor(&[4], 99, &[0; 16]), "w is ggml type 99"),
        (tensor(&[33, 1], 2, &[0; 36]), "rows of whole blocks"),
        (tensor(&[1 << 40, 1 << 40], 0, &[]), "rows of whole blocks"),
        (tensor(&[1 << 20, 1], 0, &[0; 4]), "shorter than its header says"),
    ] {
        let source = ModelSource::open(folder.file("model.gguf", &bytes)).unwrap();
        let error = source.weights().map(drop).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("model.gguf"), "{part}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn metadata_of_wrong_types_names_the_key() {
    let folder = Folder::new();
    let change = |key: &str, change: &dyn Fn(Gguf) -> Gguf| {
        // The model without the key, then with another one.
        let mut gguf = Gguf::default();
        let (mut at, source) = (0, model());
        while at < source.keys.len() {
            let start = at;
            let long = |at: usize| u64::from_le_bytes(source.keys[at..at + 8].try_into().unwrap());
            let length = long(at) as usize;
            let name = String::from_utf8(source.keys[at + 8..at + 8 + length].to_vec()).unwrap();
            at += 8 + length;
            let kind = source.keys[at];
            at += 4;
            at += match (kind, source.keys[at]) {
                (8, _) => 8 + long(at) as usize,
                (9, 8) => {
                    let mut end = at + 12;
                    for _ in 0..long(at + 4) {
                        end += 8 + long(end) as usize;
                    }
                    end - at
                }
                (9, _) => 12 + 4 * long(at + 4) as usize,
                _ => 4,
            };
            if name != key {
                gguf.keys.extend(&source.keys[start..at]);
                gguf.key_count += 1;
            }
        }
        (gguf.tensors, gguf.tensor_count, gguf.data) =
            (source.tensors.clone(), source.tensor_count, source.data.clone());
        let file = folder.file("model.gguf", &change(gguf).bytes());
        ModelSource::open(file).unwrap()
    };
    let same = |gguf: Gguf| gguf;
    for key in [
        "general.architecture",
        "qwen3.block_count",
        "qwen3.embedding_length",
        "qwen3.feed_forward_length",
        "qwen3.attention.layer_norm_rms_epsilon",
    ] {
        for wrong in [&same as &dyn Fn(Gguf) -> Gguf, &|gguf| gguf.strings(key, &["x"])] {
            let error = change(key, wrong).config().unwrap_err();
            assert!(
                matches!(&error, DocumentError::Metadata { key: found, .. } if found == key),
                "{error}"
            );
        }
    }
    for (key, wrong) in [
        (
            "tokenizer.ggml.model",
            &(|gguf: Gguf| gguf.string("tokenizer.ggml.model", "llama")) as &dyn Fn(Gguf) -> Gguf,
        ),
        ("tokenizer.ggml.pre", &|gguf| gguf.string("tokenizer.ggml.pre", "llama3")),
        ("tokenizer.ggml.tokens", &|gguf| gguf.u32("tokenizer.ggml.tokens", 5)),
        ("tokenizer.ggml.tokens", &|gguf| {
            gguf.strings("tokenizer.ggml.tokens", &["a", "a", "c", "d", "e"])
        }),
        ("tokenizer.ggml.merges", &|gguf| gguf.strings("tokenizer.ggml.merges", &["ab"])),
        ("tokenizer.ggml.token_type", &|gguf| gguf.ints("tokenizer.ggml.token_type", &[1])),
    ] {
        let error = change(key, wrong).tokenizer().unwrap_err();
        assert!(
            matches!(&error, DocumentError::Metadata { key: found, .. } if found == key),
            "{error}"
        );
    }
    let key = "tokenizer.ggml.eos_token_id";
    let error = change(key, &|gguf| gguf.u32(key, 5)).tokenizer_config().unwrap_err();
    assert!(error.to_string().contains("eos_token_id is 5, expected an id below 5"), "{error}");
    let error = change("tokenizer.chat_template", &|gguf| gguf.u32("tokenizer.chat_template", 1));
    assert!(matches!(error.chat_templates(), Err(DocumentError::Metadata { .. })));
}

/// Any change of a byte of the header, and any cut, gives a model or an error, and never a panic.
#[test]
fn mutations_of_the_header_never_panic() {
    let folder = Folder::new();
    let good = model().bytes();
    let mut state = 1_u64;
    let mut random = |below: usize| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    for round in 0..1000 {
        let mut bytes = good.clone();
        for _ in 0..1 + random(3) {
            let at = random(bytes.len());
            bytes[at] = random(256) as u8;
        }
        if round % 7 == 0 {
            bytes.truncate(random(bytes.len()));
        }
        fs::write(folder.path().join("model.gguf"), &bytes).unwrap();
        let source = ModelSource::open(folder.path()).unwrap();
        _ = (source.config().is_ok(), source.tokenizer().is_ok(), source.chat_templates().is_ok());
        _ = source.tokenizer_config().is_ok();
        if let Ok(weights) = source.weights() {
            for name in weights.names() {
                if let Some(&[rows, cols]) = weights.shape(name)
                    && rows.saturating_mul(cols) < 1 << 20
                    && let Ok(matrix) = weights.matrix(name, rows, cols)
                {
                    _ = matrix.read_rows(0..rows, &mut vec![0.0; rows * cols]);
                }
            }
        }
    }
}
