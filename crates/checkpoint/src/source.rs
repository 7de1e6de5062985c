//! A model on disk, opened once and shared by everything that reads a part of it.

use std::{
    collections::HashMap,
    fs,
    path::{Component, Path, PathBuf},
    sync::{Arc, OnceLock, atomic::AtomicU64},
};

use crate::{
    Checkpoint, CheckpointError, Document, DocumentError, OpenError,
    file::WeightFile,
    gguf::{self, GgufTensor, Value},
    gguf_model::GgufModel,
    locate::{Place, Split, locate},
    quantization::Quantization,
};

// Limits on the sizes of files, several times those of the largest published models.
const MAX_CONFIG: u64 = 4 << 20;
const MAX_TOKENIZER: u64 = 128 << 20;
const MAX_TOKENIZER_CONFIG: u64 = 16 << 20;
const MAX_TEMPLATE: u64 = 4 << 20;
/// Files that `additional_chat_templates` may hold.
const MAX_TEMPLATES: usize = 64;

type Kept<T> = OnceLock<Result<T, DocumentError>>;

/// A model on disk. Opening it finds out what the path is; each file is read when it is first asked
/// for, and only once, however many ranks of the process ask.
#[derive(Debug)]
pub struct ModelSource {
    path: PathBuf,
    place: Place,
    config: Kept<Document>,
    generation_config: Kept<Option<Document>>,
    tokenizer_config: Kept<Option<Document>>,
    templates: Kept<Vec<(String, Document)>>,
    gguf: OnceLock<Result<GgufFiles, CheckpointError>>,
    weights: OnceLock<Result<Checkpoint, CheckpointError>>,
}

impl ModelSource {
    /// Opens the model at `path`: a folder as published on Hugging Face, a folder of its cache
    /// (`models--…` or a snapshot in it), the name of a model in the local cache, such as
    /// `Qwen/Qwen3-0.6B`, a GGUF file or the first part of one, or a folder with one GGUF file.
    ///
    /// # Errors
    ///
    /// [`OpenError`] says what the path is instead of a model.
    pub fn open(path: impl AsRef<Path>) -> Result<Arc<Self>, OpenError> {
        let path = path.as_ref();
        let place = locate(path)?;
        Ok(Arc::new(Self {
            path: path.to_owned(),
            place,
            config: OnceLock::new(),
            generation_config: OnceLock::new(),
            tokenizer_config: OnceLock::new(),
            templates: OnceLock::new(),
            gguf: OnceLock::new(),
            weights: OnceLock::new(),
        }))
    }

    /// The path as given to [`open`](Self::open).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder that holds the files.
    pub fn folder(&self) -> &Path {
        match &self.place {
            Place::Folder(folder) => folder,
            Place::Gguf(file) => match file.parent() {
                Some(folder) if !folder.as_os_str().is_empty() => folder,
                _ => Path::new("."),
            },
        }
    }

    /// The headers of a GGUF model, read once.
    fn gguf(&self) -> Result<Option<&GgufFiles>, CheckpointError> {
        let Place::Gguf(file) = &self.place else { return Ok(None) };
        self.gguf.get_or_init(|| GgufFiles::open(file)).as_ref().map(Some).map_err(Clone::clone)
    }

    /// The metadata of a GGUF model.
    fn metadata(&self) -> Result<Option<GgufModel<'_>>, DocumentError> {
        let files = self.gguf().map_err(|error| DocumentError::Header(Arc::new(error)))?;
        Ok(files.map(GgufFiles::model))
    }

    /// `config.json`.
    ///
    /// # Errors
    ///
    /// If it is absent or cannot be read.
    pub fn config(&self) -> Result<&Document, DocumentError> {
        let read = || {
            if let Some(model) = self.metadata()? {
                let weights =
                    self.weights().map_err(|error| DocumentError::Header(Arc::new(error)))?;
                let rows = weights.shape("model.embed_tokens.weight").and_then(<[usize]>::first);
                let tied = !weights.contains("lm_head.weight");
                return model.config(tied, rows.copied().unwrap_or(0));
            }
            let file = self.folder().join("config.json");
            Document::read(&file, MAX_CONFIG)?
                .ok_or_else(|| DocumentError::NoConfig { folder: self.folder().to_owned() })
        };
        self.config.get_or_init(read).as_ref().map_err(Clone::clone)
    }

    /// `generation_config.json`, if there is one.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn generation_config(&self) -> Result<Option<&Document>, DocumentError> {
        let read = || match self.place {
            Place::Gguf(_) => Ok(None),
            Place::Folder(_) => {
                Document::read(&self.folder().join("generation_config.json"), MAX_CONFIG)
            }
        };
        kept(self.generation_config.get_or_init(read))
    }

    /// A small JSON file of the model's folder, such as `modules.json`, if there is one. It is read
    /// at each call. A GGUF file has none.
    ///
    /// # Errors
    ///
    /// If it cannot be read, or `name` leads out of the folder.
    pub fn document(&self, name: &str) -> Result<Option<Document>, DocumentError> {
        let Place::Folder(folder) = &self.place else { return Ok(None) };
        let inside = |part| matches!(part, Component::Normal(_) | Component::CurDir);
        if !Path::new(name).components().all(inside) {
            let (folder, name) = (folder.clone(), name.to_owned());
            return Err(DocumentError::Outside { folder, name });
        }
        Document::read(&folder.join(name), MAX_CONFIG)
    }

    /// `tokenizer_config.json`, if there is one.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn tokenizer_config(&self) -> Result<Option<&Document>, DocumentError> {
        let file = self.folder().join("tokenizer_config.json");
        let read = || match self.metadata()? {
            Some(model) => model.tokenizer_config().map(Some),
            None => Document::read(&file, MAX_TOKENIZER_CONFIG),
        };
        kept(self.tokenizer_config.get_or_init(read))
    }

    /// Whether the model has a tokenizer.
    pub fn has_tokenizer(&self) -> bool {
        if let Place::Gguf(_) = self.place {
            return self.metadata().is_ok_and(|model| model.is_some_and(|own| own.has_tokenizer()));
        }
        self.folder().join("tokenizer.json").symlink_metadata().is_ok()
    }

    /// Checks that the tokenizer is there and can be opened, without reading it.
    ///
    /// # Errors
    ///
    /// Those of [`tokenizer`](Self::tokenizer), except that the file may change in between.
    pub fn find_tokenizer(&self) -> Result<(), DocumentError> {
        if self.metadata()?.is_some_and(|model| model.has_tokenizer()) {
            return Ok(());
        }
        let file = self.folder().join("tokenizer.json");
        if Document::check(&file, MAX_TOKENIZER)? {
            Ok(())
        } else {
            Err(DocumentError::NoTokenizer { file })
        }
    }

    /// `tokenizer.json`. It is read at each call, since one rank needs it once, and it is large.
    ///
    /// # Errors
    ///
    /// If it is absent or cannot be read.
    pub fn tokenizer(&self) -> Result<Document, DocumentError> {
        if let Some(model) = self.metadata()? {
            return model.tokenizer();
        }
        let file = self.folder().join("tokenizer.json");
        Document::read(&file, MAX_TOKENIZER)?.ok_or(DocumentError::NoTokenizer { file })
    }

    /// The chat templates in files of their own: `chat_template.jinja` as `default`, then those of
    /// `additional_chat_templates` by name. Where there are none, a field of
    /// [`tokenizer_config`](Self::tokenizer_config) may hold templates.
    ///
    /// # Errors
    ///
    /// If one cannot be read, or there are more than 64.
    pub fn chat_templates(&self) -> Result<&[(String, Document)], DocumentError> {
        let read = || match self.metadata()? {
            Some(model) => model.templates(),
            None => read_templates(self.folder()),
        };
        let templates = self.templates.get_or_init(read);
        templates.as_deref().map_err(Clone::clone)
    }

    /// What the config says of quantized weights; nothing if it cannot be read, which is reported
    /// to those who ask for it.
    fn quantization(&self) -> Quantization {
        let config = self.config().ok().and_then(|own| serde_json::from_slice(&own.bytes).ok());
        config.as_ref().map_or_else(Quantization::default, Quantization::parse)
    }

    /// The weights: all headers read and checked.
    ///
    /// # Errors
    ///
    /// If an index or a header cannot be read or is wrong.
    pub fn weights(&self) -> Result<&Checkpoint, CheckpointError> {
        let open = || match self.gguf()? {
            Some(files) => files.checkpoint(),
            None => Checkpoint::open_folder(self.folder(), self.quantization()),
        };
        self.weights.get_or_init(open).as_ref().map_err(Clone::clone)
    }
}

/// The files of a GGUF model, and the metadata of the first.
#[derive(Debug)]
struct GgufFiles {
    path: PathBuf,
    metadata: HashMap<String, Value>,
    parts: Vec<(Arc<WeightFile>, Vec<GgufTensor>)>,
    bytes_read: Arc<AtomicU64>,
}

impl GgufFiles {
    /// Reads the headers of `path` and, if it is the first part of a split model, of the others.
    fn open(path: &Path) -> Result<Self, CheckpointError> {
        let bytes_read = Arc::<AtomicU64>::default();
        let open = |path: PathBuf| {
            let file = Arc::new(WeightFile::open(path, Arc::clone(&bytes_read))?);
            let gguf = gguf::read(&file)?;
            Ok::<_, CheckpointError>((file, gguf))
        };
        let (file, first) = open(path.to_owned())?;
        let mut parts = vec![(file, first.tensors)];
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if let Some(split) = Split::of(&name) {
            for part in 2..=split.count {
                let other = path.with_file_name(split.name(part));
                if !other.exists() {
                    let (file, count) = (path.to_owned(), split.count);
                    return Err(CheckpointError::GgufPart { file, count, missing: other });
                }
                let (file, gguf) = open(other)?;
                parts.push((file, gguf.tensors));
            }
        }
        Ok(Self { path: path.to_owned(), metadata: first.metadata, parts, bytes_read })
    }

    fn model(&self) -> GgufModel<'_> {
        GgufModel { file: &self.path, metadata: &self.metadata }
    }

    fn checkpoint(&self) -> Result<Checkpoint, CheckpointError> {
        Checkpoint::of_gguf(&self.path, &self.parts, Arc::clone(&self.bytes_read))
    }
}

fn kept(
    document: &Result<Option<Document>, DocumentError>,
) -> Result<Option<&Document>, DocumentError> {
    document.as_ref().map(Option::as_ref).map_err(Clone::clone)
}

fn read_templates(folder: &Path) -> Result<Vec<(String, Document)>, DocumentError> {
    let Some(main) = Document::read(&folder.join("chat_template.jinja"), MAX_TEMPLATE)? else {
        return Ok(Vec::new());
    };
    let mut templates = vec![("default".to_owned(), main)];
    let folder = folder.join("additional_chat_templates");
    let Ok(entries) = fs::read_dir(&folder) else { return Ok(templates) };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|file| file.extension().is_some_and(|extension| extension == "jinja"))
        .collect();
    if files.len() > MAX_TEMPLATES {
        return Err(DocumentError::TooMany { folder, found: files.len(), limit: MAX_TEMPLATES });
    }
    files.sort_unstable();
    for file in files {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(document) = Document::read(&file, MAX_TEMPLATE)? {
            templates.push((name, document));
        }
    }
    Ok(templates)
}
