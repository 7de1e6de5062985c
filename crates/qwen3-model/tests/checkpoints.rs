//! Checkpoints that this crate writes: made up and quantized ones.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use checkpoint::{Checkpoint, CheckpointWriter};
use comm::{SoloComm, ThreadComm};
use qwen3_model::ModelSource;
use qwen3_model::config::ConfigError;
use qwen3_model::generation_config::GenerationConfig;
use qwen3_model::names::{TensorSpec, tensor_specs};
use qwen3_model::options::WeightFormat;
use qwen3_model::presets::Preset;
use qwen3_model::quantize::quantize;
use qwen3_model::shards::ExportError;
use qwen3_model::synth::{SynthOptions, synthesize};
use qwen3_model::{Config, Isa, LogitRows, Model, ModelOptions, Sequence};

fn tiny(preset: Preset, seed: u64) -> SynthOptions {
    SynthOptions { preset, layers: None, seed }
}

fn synth(dir: &Path, options: &SynthOptions) {
    synthesize(dir, options, &mut |_| ()).expect("a made-up checkpoint");
}

fn logits(dir: &Path) -> Vec<f32> {
    let model = Model::load(
        &ModelSource::open(dir).expect("a model"),
        Arc::new(SoloComm::new()),
        &ModelOptions::new(Isa::scalar()),
        &|_| (),
    );
    let model = model.expect("the checkpoint loads");
    let mut cache = Sequence::new(&model, 16).expect("memory");
    let logits = cache.forward(&model, &[1, 7, 42, 300, 511], LogitRows::All).expect("logits");
    logits.values.into_raw_vec_and_offset().0
}

fn matrix(dir: &Path, name: &str, rows: usize, cols: usize) -> Vec<f32> {
    let mut values = vec![0.0; rows * cols];
    let matrix = Checkpoint::open(dir).expect("valid").matrix(name, rows, cols).expect("a matrix");
    matrix.read_rows(0..rows, &mut values).expect("readable");
    values
}

/// The root of the summed squares of the differences, relative to that of the reference.
fn distance(found: &[f32], reference: &[f32]) -> f64 {
    let square = |value: f32| f64::from(value).powi(2);
    let differences: f64 =
        found.iter().zip(reference).map(|(found, reference)| square(found - reference)).sum();
    (differences / reference.iter().map(|&value| square(value)).sum::<f64>()).sqrt()
}

#[test]
fn a_made_up_checkpoint_is_complete() {
    let folder = tempfile::tempdir().expect("a folder");
    for (preset, layers) in
        [(Preset::Tiny, None), (Preset::TinyMoe, Some(2)), (Preset::TinyHybrid, None)]
    {
        let dir = folder.path().join(preset.name());
        let mut progress = Vec::new();
        synthesize(&dir, &SynthOptions { preset, layers, seed: 1 }, &mut |now| progress.push(now))
            .expect("written");
        let last = progress.last().expect("progress");
        assert_eq!(last.written, last.total);
        assert!(progress.is_sorted_by_key(|now| now.written));

        let config = Config::read(&ModelSource::open(&dir).expect("a model"))
            .expect("a valid configuration");
        assert_eq!(
            config.num_hidden_layers,
            layers.unwrap_or(if preset == Preset::TinyHybrid { 4 } else { 3 })
        );
        assert_eq!(last.total, 2 * config.parameters());
        assert_eq!(
            GenerationConfig::read(&ModelSource::open(&dir).expect("a model"))
                .expect("valid")
                .eos_token_ids,
            [1, 0]
        );
        let checkpoint = Checkpoint::open(&dir).expect("a valid checkpoint");
        for spec in tensor_specs(&config) {
            assert_eq!(checkpoint.shape(&spec.name), Some(&spec.shape[..]), "{}", spec.name);
            assert_eq!(checkpoint.stored_format(&spec.name).expect("present"), WeightFormat::Bf16);
        }
        assert_eq!(
            checkpoint.vector("model.norm.weight", config.hidden_size).expect("present"),
            // Hybrid models store their norms less one.
            vec![if config.hybrid.is_some() { 0.0 } else { 1.0 }; 96]
        );
        let logits = logits(&dir);
        assert_eq!(logits.len(), 5 * 512);
        assert!(
            logits.iter().all(|logit| logit.is_finite())
                && logits.iter().any(|logit| *logit != logits[0])
        );
    }
}

#[test]
fn the_seed_decides() {
    let folder = tempfile::tempdir().expect("a folder");
    let weights = |name: &str, seed| {
        let dir = folder.path().join(name);
        synth(&dir, &tiny(Preset::Tiny, seed));
        std::fs::read(dir.join("model.safetensors")).expect("weights")
    };
    let first = weights("a", 1);
    assert_eq!(weights("b", 1), first);
    assert_ne!(weights("c", 2), first);
}

#[test]
fn weights_are_normally_distributed_and_independent() {
    let folder = tempfile::tempdir().expect("a folder");
    synth(folder.path(), &tiny(Preset::Tiny, 5));
    let read = |name: &str| -> Vec<f64> {
        matrix(folder.path(), name, 224, 96).into_iter().map(f64::from).collect()
    };
    let gate = read("model.layers.0.mlp.gate_proj.weight");
    let up = read("model.layers.0.mlp.up_proj.weight");
    let count = gate.len() as f64;
    let mean = gate.iter().sum::<f64>() / count;
    let deviation = (gate.iter().map(|value| value * value).sum::<f64>() / count).sqrt();
    let product = gate.iter().zip(&up).map(|(a, b)| a * b).sum::<f64>() / count / (0.02 * 0.02);
    let lag = gate.windows(2).map(|pair| pair[0] * pair[1]).sum::<f64>() / count / (0.02 * 0.02);
    // Five standard errors of each.
    let error = 5.0 / count.sqrt();
    assert!(mean.abs() < 0.02 * error, "mean {mean}");
    assert!((deviation / 0.02 - 1.0).abs() < error, "deviation {deviation}");
    assert!(product.abs() < error && lag.abs() < error, "correlations {product} and {lag}");
}

#[test]
fn quantized_checkpoints() {
    let folder = tempfile::tempdir().expect("a folder");
    for preset in [Preset::Tiny, Preset::TinyMoe, Preset::TinyHybrid] {
        let source = folder.path().join(preset.name());
        synth(&source, &tiny(preset, 9));
        std::fs::write(source.join("tokenizer.json"), "{}").expect("writable");
        std::fs::write(source.join("notes.txt"), "mine").expect("writable");
        std::fs::create_dir(source.join("additional_chat_templates")).expect("a folder");
        std::fs::write(source.join("additional_chat_templates/tool_use.jinja"), "tools")
            .expect("writable");
        let exact = logits(&source);
        // One with attention.
        let layer = if preset == Preset::TinyHybrid { 3 } else { 1 };
        let layer = format!("model.layers.{layer}");
        // The largest of 32 normal weights is about 2.4 deviations: steps of 2.4 / 127, or of 2 *
        // 2.4 / 16, and an error of a step over the root of 12.
        for (format, bits, bound) in [(WeightFormat::Q8, 8, 0.008), (WeightFormat::Q4, 4, 0.1)] {
            let target = folder.path().join(format!("{preset}-{format}"));
            let mut last = None;
            quantize(&ModelSource::open(&source).expect("a model"), &target, format, &mut |now| {
                last = Some(now)
            })
            .expect("quantized");
            let last = last.expect("progress");
            assert_eq!(last.written, last.total);
            let config = Config::read(&ModelSource::open(&target).expect("a model"))
                .expect("a valid configuration");
            assert_eq!(config.quantization_bits, Some(bits));
            assert_eq!(
                Config { quantization_bits: None, ..config.clone() },
                Config::read(&ModelSource::open(&source).expect("a model")).expect("valid")
            );
            assert!(
                target.join("tokenizer.json").exists()
                    && target.join("generation_config.json").exists()
            );
            assert!(target.join("additional_chat_templates/tool_use.jinja").exists());
            assert!(!target.join("notes.txt").exists());

            let checkpoint = Checkpoint::open(&target).expect("a valid checkpoint");
            let stored = |name: &str| checkpoint.stored_format(name).expect("present");
            assert_eq!(stored("model.embed_tokens.weight"), format);
            assert_eq!(stored(&format!("{layer}.self_attn.o_proj.weight")), format);
            assert_eq!(stored(&format!("{layer}.self_attn.q_norm.weight")), WeightFormat::Bf16);
            if preset == Preset::TinyHybrid {
                let delta = |part: &str| stored(&format!("model.layers.1.linear_attn.{part}"));
                assert_eq!(
                    (delta("in_proj_qkv.weight"), delta("out_proj.weight")),
                    (format, format)
                );
                for part in ["in_proj_a.weight", "in_proj_b.weight", "conv1d.weight", "A_log"] {
                    assert_eq!(delta(part), WeightFormat::Bf16, "{part}");
                }
            }
            if preset == Preset::TinyMoe {
                assert_eq!(stored("model.layers.1.mlp.gate.weight"), WeightFormat::Bf16);
                assert_eq!(stored("model.layers.1.mlp.experts.7.up_proj.weight"), format);
            }
            let name = &format!("{layer}.self_attn.o_proj.weight");
            let (rows, cols) = (config.hidden_size, config.query_size());
            let distance =
                distance(&matrix(&target, name, rows, cols), &matrix(&source, name, rows, cols));
            assert!(
                distance > bound / 3.0 && distance < bound,
                "{name} as {format}: relative distance {distance}"
            );
            // Errors of the layers add up, and in a mixture they may choose another expert, but the
            // answer stays recognizable.
            let distance = self::distance(&logits(&target), &exact);
            // A delta rule also scales small keys to length 1, with their errors.
            let factor = if preset == Preset::TinyHybrid { 7.0 } else { 5.0 };
            assert!(
                distance > 0.0 && distance < factor * bound,
                "{preset} {format}: relative distance {distance}"
            );
        }
        let again = quantize(
            &ModelSource::open(folder.path().join(format!("{preset}-q8"))).expect("a model"),
            &folder.path().join("x"),
            WeightFormat::Q4,
            &mut |_| (),
        );
        assert!(matches!(again, Err(ExportError::AlreadyQuantized { bits: 8, .. })));
    }
}

fn edit_config(dir: &Path, field: &str, value: serde_json::Value) {
    let file = dir.join("config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&file).expect("readable")).expect("JSON");
    config[field] = value;
    std::fs::write(file, config.to_string()).expect("writable");
}

#[test]
fn a_tied_model_may_have_a_head_of_its_own() {
    let folder = tempfile::tempdir().expect("a folder");
    let (source, target) = (folder.path().join("source"), folder.path().join("target"));
    synth(&source, &tiny(Preset::TinyMoe, 4));
    let own = logits(&source);
    edit_config(&source, "tie_word_embeddings", true.into());
    assert_eq!(logits(&source), own);
    quantize(&ModelSource::open(&source).expect("a model"), &target, WeightFormat::Q8, &mut |_| ())
        .expect("quantized");
    let distance = distance(&logits(&target), &own);
    assert!(distance < 0.04, "relative distance {distance}");

    // One that is equal to the embedding is not stored again.
    let twice = folder.path().join("twice");
    std::fs::create_dir(&twice).expect("a folder");
    std::fs::copy(source.join("config.json"), twice.join("config.json")).expect("copied");
    let (config, checkpoint) = (
        Config::read(&ModelSource::open(&source).expect("a model")).expect("valid"),
        Checkpoint::open(&source).expect("valid"),
    );
    let mut specs: Vec<_> = tensor_specs(&config).map(|spec| (spec.name.clone(), spec)).collect();
    specs.push(("lm_head.weight".to_owned(), specs[0].1.clone()));
    let stored = |(name, spec): &(String, TensorSpec)| checkpoint::TensorSpec {
        name: name.clone(),
        format: WeightFormat::Bf16,
        shape: spec.shape.clone(),
    };
    let stored: Vec<_> = specs.iter().map(stored).collect();
    let mut writer =
        CheckpointWriter::create(twice.join("model.safetensors"), &stored, &[]).expect("writable");
    for (name, spec) in &specs {
        let values = match spec.shape[..] {
            [rows, cols] => matrix(&source, &spec.name, rows, cols),
            _ => checkpoint.vector(&spec.name, spec.elements()).expect("present"),
        };
        writer.write(name, &values).expect("writable");
    }
    writer.finish().expect("complete");
    quantize(
        &ModelSource::open(&twice).expect("a model"),
        &folder.path().join("once"),
        WeightFormat::Q8,
        &mut |_| (),
    )
    .expect("quantized");
    let once = Checkpoint::open(folder.path().join("once")).expect("valid");
    assert!(
        Checkpoint::open(&twice).expect("valid").contains("lm_head.weight")
            && !once.contains("lm_head.weight")
    );
}

#[test]
fn sizes_beyond_the_weights_are_refused_before_anything_is_sized_by_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let huge = 1024;
    for (preset, fields, tensor) in [
        (Preset::Tiny, &["num_hidden_layers"][..], "model.layers.3.input_layernorm.weight"),
        (Preset::TinyMoe, &["num_experts"], "model.layers.0.mlp.experts.8.gate_proj.weight"),
        (
            Preset::Tiny,
            &["num_attention_heads", "num_key_value_heads"],
            "model.layers.0.self_attn.q_proj.weight",
        ),
    ] {
        let dir = folder.path().join(fields[0]);
        synth(&dir, &tiny(preset, 1));
        fields.iter().for_each(|field| edit_config(&dir, field, huge.into()));
        let options = ModelOptions::new(Isa::scalar());
        let error = Model::load(
            &ModelSource::open(&dir).expect("a model"),
            Arc::new(SoloComm::new()),
            &options,
            &|_| (),
        )
        .err()
        .expect("too few weights");
        assert!(error.to_string().contains(tensor), "{error}");
        let error = quantize(
            &ModelSource::open(&dir).expect("a model"),
            &folder.path().join("x"),
            WeightFormat::Q8,
            &mut |_| (),
        )
        .expect_err("too few");
        assert!(error.to_string().contains(tensor), "{error}");
    }
}

/// What two ranks say that load what is in these folders with these instruction sets.
fn load_pair(dirs: [&Path; 2], isas: [Isa; 2]) -> Vec<Option<String>> {
    thread::scope(|scope| {
        let ranks = ThreadComm::group(2).into_iter().zip(dirs.into_iter().zip(isas)).map(
            |(comm, (dir, isa))| {
                let load = move || {
                    Model::load(
                        &ModelSource::open(dir).expect("a model"),
                        Arc::new(comm),
                        &ModelOptions::new(isa),
                        &|_| (),
                    )
                };
                scope.spawn(move || load().err().map(|error| error.to_string()))
            },
        );
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().expect("no panic")).collect()
    })
}

#[test]
fn ranks_that_would_compute_something_else_are_found_at_the_start() {
    let folder = tempfile::tempdir().expect("a folder");
    for preset in [Preset::Tiny, Preset::TinyMoe] {
        let [first, second] =
            ["first", "second"].map(|name| folder.path().join(format!("{name}-{preset}")));
        let dirs = [&*first, &*second];
        dirs.iter().for_each(|dir| synth(dir, &tiny(preset, 1)));
        let (scalar, portable) = (Isa::scalar(), Isa::portable());
        assert_eq!(load_pair(dirs, [scalar; 2]), [None, None]);
        let other_isa = load_pair(dirs, [scalar, portable]);
        let expected = (preset == Preset::TinyMoe)
            .then_some("rank 1 computes with other instructions than rank 0, ");
        for said in other_isa {
            assert_eq!(said.is_some(), expected.is_some(), "{said:?}");
            assert!(said.is_none_or(|said| said.starts_with(expected.unwrap_or_default())));
        }
        // What rounds alike may differ.
        let vectors: Vec<_> = Isa::all().filter(|isa| isa.has_avx2()).collect();
        for isas in vectors.windows(2) {
            assert_eq!(load_pair(dirs, [isas[0], isas[1]]), [None, None], "{isas:?}");
        }
        let third = folder.path().join(format!("third-{preset}"));
        synth(&third, &tiny(preset, 8));
        for said in load_pair([&first, &third], [scalar; 2]) {
            assert!(
                said.as_ref()
                    .is_some_and(|s| s.starts_with("rank 1 has other weights than rank 0")),
                "{said:?}"
            );
        }
        edit_config(&second, "rms_norm_eps", 1e-5.into());
        for said in load_pair(dirs, [scalar; 2]) {
            assert!(
                said.as_ref()
                    .is_some_and(|s| s.starts_with("rank 1 has another configuration than rank 0")),
                "{said:?}"
            );
        }
    }
}

#[test]
fn a_folder_in_which_another_program_writes_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let other = std::fs::File::open(folder.path()).expect("a folder opens");
    other.lock().expect("the folder is free");
    let error = synthesize(folder.path(), &tiny(Preset::Tiny, 1), &mut |_| ())
        .expect_err("the folder is in use");
    assert!(error.to_string().contains("is being written there"), "{error}");
    drop(other);
    synth(folder.path(), &tiny(Preset::Tiny, 1));
}

#[test]
fn nothing_is_written_over() {
    let folder = tempfile::tempdir().expect("a folder");
    synth(folder.path(), &tiny(Preset::Tiny, 1));
    for result in [
        synthesize(folder.path(), &tiny(Preset::Tiny, 1), &mut |_| ()),
        quantize(
            &ModelSource::open(folder.path()).expect("a model"),
            folder.path(),
            WeightFormat::Q8,
            &mut |_| (),
        ),
    ] {
        let error = result.expect_err("a checkpoint is there already");
        assert!(matches!(error, ExportError::Exists { .. }), "{error}");
        assert!(error.to_string().contains("expected a folder without a checkpoint"), "{error}");
    }
}

#[test]
fn what_cannot_be_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let none = SynthOptions { layers: Some(0), ..tiny(Preset::Tiny, 1) };
    let error = synthesize(&folder.path().join("none"), &none, &mut |_| ()).expect_err("no layers");
    assert!(matches!(error, ExportError::Config(ConfigError::Range { .. })), "{error}");

    let file = folder.path().join("file");
    std::fs::write(&file, "").expect("writable");
    let error = synthesize(&file.join("inside"), &tiny(Preset::Tiny, 1), &mut |_| ())
        .expect_err("a file in the way");
    assert!(matches!(error, ExportError::Io { .. }), "{error}");

    let error = quantize(
        &ModelSource::open(folder.path()).expect("a folder"),
        &folder.path().join("x"),
        WeightFormat::Q8,
        &mut |_| (),
    );
    assert!(matches!(error, Err(ExportError::Document(_))));
    let error = quantize(
        &ModelSource::open(folder.path()).expect("a model"),
        &folder.path().join("x"),
        WeightFormat::Bf16,
        &mut |_| (),
    );
    assert!(matches!(error, Err(ExportError::Format { found: WeightFormat::Bf16 })));

    // Weights that are missing, and weights that no quantized format expresses.
    let source = folder.path().join("source");
    synth(&source, &tiny(Preset::Tiny, 1));
    std::fs::create_dir_all(folder.path().join("way/tokenizer.json")).expect("a folder");
    std::fs::write(source.join("tokenizer.json"), "{}").expect("writable");
    let error = quantize(
        &ModelSource::open(&source).expect("a model"),
        &folder.path().join("way"),
        WeightFormat::Q8,
        &mut |_| (),
    )
    .expect_err("in the way");
    assert!(
        matches!(&error, ExportError::Io { file, .. } if file.ends_with("way/tokenizer.json")),
        "{error}"
    );
    assert!(
        !folder.path().join("way/model.safetensors").exists(),
        "nor do weights without the rest"
    );
    let weights = source.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).expect("readable");
    let end = bytes.len();
    // The final norm is last; before it, the last layer's down_proj.
    bytes[end - 2 * 96 - 1] = 0x7f;
    for (low, read, found) in [(0xc0, false, "NaN"), (0x00, true, "17014118")] {
        bytes[end - 2 * 96 - 2] = low;
        std::fs::write(&weights, &bytes).expect("writable");
        let error = quantize(
            &ModelSource::open(&source).expect("a model"),
            &folder.path().join("nan"),
            WeightFormat::Q8,
            &mut |_| (),
        )
        .expect_err(found);
        let message = error.to_string();
        let expected = if read {
            matches!(error, ExportError::Write(_))
        } else {
            matches!(error, ExportError::Checkpoint(_))
        };
        assert!(expected && message.contains(found), "{message}");
        assert!(
            message.contains("model.layers.2.mlp.down_proj.weight") && message.contains("row 95"),
            "{message}"
        );
    }
    let left = std::fs::read_dir(folder.path().join("nan")).expect("a folder").count();
    assert_eq!(left, 0, "what is not finished does not stay");
    let error = quantize(
        &ModelSource::open(&source).expect("a model"),
        &file,
        WeightFormat::Q8,
        &mut |_| (),
    )
    .expect_err("a file in the way");
    assert!(matches!(error, ExportError::Exists { .. }), "{error}");

    // Weights of more layers than the configuration has.
    edit_config(&source, "num_hidden_layers", 2.into());
    let error = quantize(
        &ModelSource::open(&source).expect("a model"),
        &folder.path().join("y"),
        WeightFormat::Q8,
        &mut |_| (),
    )
    .expect_err("a third layer");
    assert!(matches!(error, ExportError::Config(ConfigError::Contradiction { .. })), "{error}");

    std::fs::remove_file(&weights).expect("removable");
    let error = quantize(
        &ModelSource::open(&source).expect("a model"),
        &folder.path().join("y"),
        WeightFormat::Q8,
        &mut |_| (),
    )
    .expect_err("no weights");
    assert!(matches!(error, ExportError::Checkpoint(_)), "{error}");
}

#[test]
fn companions_that_link_elsewhere_are_not_copied() {
    let folder = tempfile::tempdir().expect("a folder");
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "private").expect("writable");
    let quantized = |source: &Path, name: &str| {
        let target = folder.path().join(name);
        let source = ModelSource::open(source).expect("a model");
        quantize(&source, &target, WeightFormat::Q8, &mut |_| ()).map(|()| target)
    };
    let source = folder.path().join("source");
    synth(&source, &tiny(Preset::Tiny, 1));
    symlink(&secret, source.join("vocab.json")).expect("a link");
    let error = quantized(&source, "a").expect_err("a foreign link");
    assert!(
        matches!(&error, ExportError::ForeignLink { found, .. } if *found == secret),
        "{error}"
    );
    assert!(!folder.path().join("a/config.json").exists());

    // In a Hugging Face cache all files of a snapshot are links to blobs beside it.
    let cache = folder.path().join("models--a--b");
    let snapshot = cache.join("snapshots/1");
    synth(&snapshot, &tiny(Preset::Tiny, 1));
    std::fs::create_dir(cache.join("blobs")).expect("a folder");
    std::fs::write(cache.join("blobs/0"), "{}").expect("writable");
    symlink("../../blobs/0", snapshot.join("vocab.json")).expect("a link");
    let target = quantized(&snapshot, "b").expect("a link inside the cache");
    assert_eq!(std::fs::read(target.join("vocab.json")).expect("a copy"), b"{}");

    // A link in the way of a file that is written is replaced, and not followed.
    let target = folder.path().join("c");
    std::fs::create_dir(&target).expect("a folder");
    symlink(&secret, target.join("model.safetensors.part")).expect("a link");
    quantized(&snapshot, "c").expect("the link is in nobody's way");
    assert_eq!(std::fs::read(&secret).expect("still there"), b"private");
}
