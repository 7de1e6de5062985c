//! What a path may be: a model, a place that leads to one, or one of the mistakes that users make.
//! What a model's small files may be.

mod folder;

use std::{fs, os::unix::fs::symlink, path::Path, process::Command, sync::Arc, thread};

use checkpoint::{DocumentError, ModelSource, OpenError};
use folder::Folder;

macro_rules! assert_error {
    ($result:expr, $pattern:pat, $($part:expr),+) => {
        let error = $result.expect_err("a mistake");
        assert!(matches!(error, $pattern), "{error:?}");
        let text = error.to_string();
        $(assert!(text.contains($part), "{text}");)+
        assert!(!text.contains('\n'), "{text}");
    };
}

fn pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().expect("mkfifo").success());
}

#[test]
fn paths_that_are_not_models_are_explained() {
    let folder = Folder::new();
    let path = |name: &str| folder.path().join(name);
    folder.file("model.safetensors", b"12345678");
    folder.file("notes.txt", b"x");
    symlink(path("gone"), path("dangling")).unwrap();
    pipe(&path("pipe"));

    assert_error!(ModelSource::open(path("no")), OpenError::Missing { .. }, "no does not exist");
    assert_error!(
        ModelSource::open(path("missing.gguf")),
        OpenError::Missing { .. },
        "missing.gguf does not exist"
    );
    assert_error!(ModelSource::open("~/models/q"), OpenError::Tilde { .. }, "~", "$HOME");
    assert_error!(
        ModelSource::open(path("dangling")),
        OpenError::DanglingLink { .. },
        "dangling is a link to",
        "gone, which does not exist"
    );
    assert_error!(
        ModelSource::open("No-such-owner/No-such-model"),
        OpenError::HubName { .. },
        "neither a folder nor in the local cache",
        "hf download No-such-owner/No-such-model"
    );
    assert_error!(
        ModelSource::open(path("model.safetensors")),
        OpenError::FileOfModel { .. },
        "one file of a model",
        folder.path().to_str().unwrap()
    );
    assert_error!(ModelSource::open(path("pipe")), OpenError::NotRegular { .. }, "regular file");
    assert_error!(ModelSource::open(path("notes.txt")), OpenError::NotModel { .. }, "notes.txt");
}

#[test]
fn the_cache_of_hugging_face() {
    let folder = Folder::new();
    let hub = folder.path().join("hub");
    let model = hub.join("models--Qwen--Qwen3-0.6B");
    for snapshot in ["aaa", "bbb"] {
        fs::create_dir_all(model.join("snapshots").join(snapshot)).unwrap();
        fs::write(model.join("snapshots").join(snapshot).join("config.json"), snapshot).unwrap();
    }
    for root in [folder.path(), &hub] {
        assert_error!(
            ModelSource::open(root),
            OpenError::CacheRoot { .. },
            "cache of many models",
            "models--Qwen--Qwen3-0.6B"
        );
    }
    assert_error!(
        ModelSource::open(&model),
        OpenError::Snapshots { .. },
        "aaa",
        "bbb",
        "refs/main"
    );
    fs::create_dir(model.join("refs")).unwrap();
    fs::write(model.join("refs/main"), "bbb\n").unwrap();
    let source = ModelSource::open(&model).unwrap();
    assert_eq!(source.config().unwrap().bytes, b"bbb");
    assert_eq!(source.path(), model);
    assert_eq!(source.folder(), model.join("snapshots/bbb"));
    fs::remove_file(model.join("refs/main")).unwrap();
    fs::remove_dir_all(model.join("snapshots/bbb")).unwrap();
    assert_eq!(ModelSource::open(&model).unwrap().config().unwrap().bytes, b"aaa");
}

#[test]
fn documents_are_regular_files_of_bounded_size() {
    let folder = Folder::new();
    let path = |name: &str| folder.path().join(name);
    let open = || ModelSource::open(folder.path()).unwrap();
    assert_error!(open().config(), DocumentError::NoConfig { .. }, "has no config.json");
    assert_error!(open().tokenizer(), DocumentError::NoTokenizer { .. }, "tokenizer.json");
    assert!(open().generation_config().unwrap().is_none());
    assert!(!open().has_tokenizer());

    // Opening a pipe would wait for a writer, and reading a device would never end.
    pipe(&path("config.json"));
    assert_error!(open().config(), DocumentError::Read { .. }, "config.json", "not a regular file");
    symlink("/dev/zero", path("tokenizer.json")).unwrap();
    assert_error!(open().tokenizer(), DocumentError::Read { .. }, "not a regular file");
    assert_error!(open().find_tokenizer(), DocumentError::Read { .. }, "not a regular file");
    symlink(path("gone"), path("generation_config.json")).unwrap();
    assert_error!(
        open().generation_config(),
        DocumentError::Read { .. },
        "generation_config.json",
        "a link to",
        "does not exist"
    );
    // A hole takes no space on disk.
    fs::File::create(path("tokenizer_config.json")).unwrap().set_len(1 << 40).unwrap();
    assert_error!(
        open().tokenizer_config(),
        DocumentError::TooLarge { .. },
        "tokenizer_config.json has 1099511627776 bytes",
        "at most"
    );
    fs::create_dir(path("additional_chat_templates")).unwrap();
    for index in 0..65 {
        fs::write(path(&format!("additional_chat_templates/{index}.jinja")), "x").unwrap();
    }
    assert!(open().chat_templates().unwrap().is_empty(), "there is no main template");
    folder.file("chat_template.jinja", b"main");
    assert_error!(open().chat_templates(), DocumentError::TooMany { .. }, "65 files", "at most 64");
    fs::remove_file(path("additional_chat_templates/64.jinja")).unwrap();
    let source = open();
    let templates = source.chat_templates().unwrap();
    assert_eq!((templates.len(), templates[0].0.as_str()), (65, "default"));
    assert_eq!((templates[1].0.as_str(), &*templates[1].1.bytes), ("0", &b"x"[..]));
}

#[test]
fn each_file_is_read_once_however_many_ranks_ask() {
    let folder = Folder::matrix("F32", 2, 3, &[1.0; 6]);
    folder.file("config.json", b"{}");
    let source = ModelSource::open(folder.path()).unwrap();
    let all: Vec<_> = thread::scope(|scope| {
        let ranks: Vec<_> = (0..5)
            .map(|_| {
                let source = Arc::clone(&source);
                scope.spawn(move || {
                    let config = source.config().unwrap().bytes.as_ptr() as usize;
                    (config, std::ptr::from_ref(source.weights().unwrap()) as usize)
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert!(all.iter().all(|same| *same == all[0]), "{all:?}");
    let header = source.weights().unwrap().bytes_read();
    let file = fs::metadata(folder.path().join("model.safetensors")).unwrap().len();
    assert_eq!(header, file - 24);
    // Even if the file changes: it was read.
    folder.file("config.json", b"[]");
    assert_eq!(source.config().unwrap().bytes, b"{}");
}

#[test]
fn a_million_tensors_are_too_many() {
    let folder = Folder::new();
    let entry =
        |index: usize| format!(r#""{index}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#);
    let header = (0..1_000_000).map(entry).collect::<Vec<_>>().join(",");
    folder.safetensors("model.safetensors", &format!("{{{header}}}"), &[]);
    let source = ModelSource::open(folder.path()).unwrap();
    let error = source.weights().expect_err("too many").to_string();
    assert!(error.contains("more than 262144 entries"), "{error}");
}

#[test]
fn prefixes_of_names_and_dots_of_an_index_do_not_matter() {
    for prefix in ["", "model.language_model.", "module.model."] {
        let folder = Folder::new();
        let names = ["embed_tokens.weight", "norm.weight"];
        for (index, name) in names.iter().enumerate() {
            let header = format!(
                r#"{{"{prefix}{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#
            );
            let value = (index as f32 + 1.0).to_le_bytes();
            folder.safetensors(&format!("{index}.safetensors"), &header, &value);
        }
        let map = format!(
            r#"{{"weight_map":{{"{prefix}{}":"./0.safetensors","{prefix}{}":"1.safetensors"}}}}"#,
            names[0], names[1]
        );
        folder.file("model.safetensors.index.json", map.as_bytes());
        let source = ModelSource::open(folder.path()).unwrap();
        let weights = source.weights().unwrap();
        assert_eq!(weights.vector("model.embed_tokens.weight", 1).unwrap(), [1.0], "{prefix}");
        assert_eq!(weights.vector("model.norm.weight", 1).unwrap(), [2.0], "{prefix}");
    }
}
