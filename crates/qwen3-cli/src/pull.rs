//! `qwen3 pull`: downloads a model from the Hugging Face hub into the local cache.

use std::fs::File;
use std::io::{self, IsTerminal as _};
use std::path::{Component, Path, PathBuf};

use clap::Args;
use hf_hub::Cache;
use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use indicatif::{ProgressBar, ProgressStyle};
use qwen3_model::checkpoint::hub_folder;
use ranks::{Rank, one_line};
use sha2::{Digest, Sha256};

use crate::failure::CliError;

/// The endings of the files that a model folder consists of.
const WANTED: [&str; 3] = ["safetensors", "json", "jinja"];
/// Most characters of a model's name.
const LONGEST_NAME: usize = 96;

/// Download a model from the Hugging Face hub into the local cache, where --model finds its name
///
/// A download that was interrupted goes on where it stopped. The SHA-256 of each large file is
/// checked, also of those that are there already. HF_HOME (or HF_HUB_CACHE), HF_ENDPOINT and
/// HF_TOKEN mean what they mean to the hub's own tools.
#[derive(Args, Clone, Debug)]
pub struct PullArgs {
    /// The model's name, for example Qwen/Qwen3-0.6B
    #[arg(value_name = "NAME")]
    name: String,

    /// Download only this file of the model, such as one of several GGUF files (repeatable)
    /// [default: the configuration, tokenizer, templates and safetensors]
    #[arg(long, value_name = "FILE")]
    file: Vec<String>,
}

/// Why a model cannot be downloaded.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The name cannot be that of a model.
    #[error("{name:?} is not the name of a model, expected one such as Qwen/Qwen3-0.6B")]
    Name {
        /// What was given.
        name: String,
    },
    /// The hub names a file that would lie outside of the model's folder.
    #[error("{name}: the hub lists the file {file:?}, expected a path within the model's folder")]
    FileName {
        /// The model.
        name: String,
        /// The file.
        file: String,
    },
    /// The model has no file of this name, or none of the default ones.
    #[error("{name}: has no {wanted}, expected one of {found}")]
    NoFile {
        /// The model.
        name: String,
        /// What was looked for.
        wanted: String,
        /// The model's files.
        found: String,
    },
    /// The hub does not answer, or refuses.
    #[error("{what}: {reason}")]
    Hub {
        /// The model, or one of its files.
        what: String,
        /// The reason, in one line.
        reason: String,
    },
    /// A file was damaged on its way. It has been removed.
    #[error(
        "{}: the SHA-256 of the content is {found}, expected {expected}; the file was removed",
        file.display()
    )]
    Hash {
        /// The file.
        file: PathBuf,
        /// Its hash.
        found: String,
        /// The hash that the hub states.
        expected: String,
    },
}

impl PullArgs {
    /// Runs the command.
    pub fn run(&self, rank: &Rank) -> Result<(), CliError> {
        check_name(&self.name)?;
        self.file.iter().try_for_each(|file| check_file(&self.name, file))?;
        let cache = Cache::new(hub_folder());
        let token = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty());
        let mut builder = ApiBuilder::from_env().with_progress(false);
        if token.is_some() {
            builder = builder.with_token(token);
        }
        let api = builder.with_cache_dir(cache.path().clone()).build();
        let api = api.map_err(|error| self.failed(&self.name, &error))?;
        let model = api.model(self.name.clone());
        let info = model.info().map_err(|error| self.failed(&self.name, &error))?;
        let listed: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
        let repository = format!("models--{}", self.name.replace('/', "--"));
        let reference = cache.path().join(repository).join("refs/main");
        let mut folder = None;
        for file in self.choose(&listed)? {
            // Files of an older commit are in another folder and would not be those of the hub.
            let current = std::fs::read_to_string(&reference).is_ok_and(|own| own == info.sha);
            let cached = current.then(|| cache.model(self.name.clone()).get(file)).flatten();
            let path = self.download(&model, file, cached)?;
            let depth = Path::new(file).components().count();
            folder = path.ancestors().nth(depth).map(Path::to_owned);
        }
        let folder = folder.unwrap_or_else(|| cache.path().clone());
        Ok(rank.print(&format!("{}\n", folder.display()))?)
    }

    /// The files to download. `config.json` comes last, so that an incomplete model is not taken
    /// for a complete one.
    fn choose<'a>(&self, listed: &'a [String]) -> Result<Vec<&'a str>, PullError> {
        listed.iter().try_for_each(|file| check_file(&self.name, file))?;
        let no_file = |wanted: &str| PullError::NoFile {
            name: self.name.clone(),
            wanted: wanted.to_owned(),
            found: listed.iter().take(32).cloned().collect::<Vec<_>>().join(", "),
        };
        if !self.file.is_empty() {
            let find = |wanted: &String| {
                listed.iter().find(|file| *file == wanted).ok_or_else(|| no_file(wanted))
            };
            return self.file.iter().map(|wanted| find(wanted).map(String::as_str)).collect();
        }
        let ends = |file: &str, end: &str| Path::new(file).extension().is_some_and(|e| e == end);
        let files = listed.iter().map(String::as_str);
        let mut chosen: Vec<&str> =
            files.clone().filter(|file| WANTED.iter().any(|end| ends(file, end))).collect();
        if !chosen.iter().any(|file| ends(file, "safetensors")) {
            let gguf: Vec<&str> = files.filter(|file| ends(file, "gguf")).collect();
            match gguf[..] {
                [one] => chosen.push(one),
                [] => return Err(no_file("*.safetensors")),
                // Each is a model of its own.
                _ => return Err(no_file("*.safetensors (--file takes one of its GGUF files)")),
            }
        }
        chosen.sort_by_key(|file| *file == "config.json");
        Ok(chosen)
    }

    /// Downloads a file unless it is `cached`, and checks it.
    fn download(
        &self,
        model: &ApiRepo,
        file: &str,
        cached: Option<PathBuf>,
    ) -> Result<PathBuf, CliError> {
        let what = format!("{}/{file}", self.name);
        let path = match cached {
            Some(path) => path,
            None => {
                let bar = Bar::new();
                let path = model.download_with_progress(file, bar);
                path.map_err(|error| self.failed(&what, &error))?
            }
        };
        check_hash(&path)?;
        Ok(path)
    }

    fn failed(&self, what: &str, error: &ApiError) -> PullError {
        let reason = one_line(&error.to_string());
        PullError::Hub { what: what.to_owned(), reason }
    }
}

/// OWNER/NAME of letters, digits, `-`, `_` and `.`, as --model looks for it.
fn check_name(name: &str) -> Result<(), PullError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(allowed)
            && !part.contains("..")
    };
    let parts: Vec<&str> = name.split('/').collect();
    if name.len() <= LONGEST_NAME && parts.len() == 2 && parts.iter().all(|own| part(own)) {
        return Ok(());
    }
    Err(PullError::Name { name: name.to_owned() })
}

/// A file of the model is a relative path without `..`.
fn check_file(name: &str, file: &str) -> Result<(), PullError> {
    let normal = |part| matches!(part, Component::Normal(_));
    if !file.is_empty()
        && Path::new(file).components().all(normal)
        && !file.contains(|c: char| c.is_control() || c == '\\')
    {
        return Ok(());
    }
    Err(PullError::FileName { name: name.to_owned(), file: file.to_owned() })
}

/// Checks a file whose name in the cache is its SHA-256, as those of large files are. A file with
/// another content is removed.
fn check_hash(path: &Path) -> Result<(), CliError> {
    let failed = |source| CliError::file(path, source);
    let stored = path.canonicalize().map_err(failed)?;
    let expected = stored.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if expected.len() != 64 || !expected.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(());
    }
    let mut hash = Sha256::new();
    io::copy(&mut File::open(&stored).map_err(failed)?, &mut hash).map_err(failed)?;
    let found: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if found == expected.to_lowercase() {
        return Ok(());
    }
    for file in [path, &stored] {
        std::fs::remove_file(file).map_err(failed)?;
    }
    Err(PullError::Hash { file: path.to_owned(), found, expected }.into())
}

/// How much of a file has come, on a terminal.
struct Bar(ProgressBar);

impl Bar {
    fn new() -> Self {
        let bar =
            if io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
        let style = "{msg} {bar:24} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        Self(bar.with_style(ProgressStyle::with_template(style).expect("the template is valid")))
    }
}

impl Progress for Bar {
    fn init(&mut self, size: usize, filename: &str) {
        self.0.reset();
        self.0.set_length(size as u64);
        self.0.set_message(filename.to_owned());
    }

    fn update(&mut self, size: usize) {
        self.0.inc(size as u64);
    }

    fn finish(&mut self) {
        self.0.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_within_the_cache() {
        for name in ["Qwen/Qwen3-0.6B", "a_b/c.d-e"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in [
            "",
            "gpt2",
            "/",
            "..",
            "../x",
            "a/..",
            "a/../b",
            "/etc/passwd",
            "a//b",
            "a/b/c",
            "a/.b",
            "a/b..c",
            "C:\\x",
            "a b",
            "-x/y",
            "a\n",
            &"a".repeat(97),
        ] {
            assert!(check_name(name).is_err(), "{name}");
        }
        for file in ["../x", "/x", "a/../b", "", "a\\b", "a\u{1b}"] {
            assert!(check_file("m", file).is_err(), "{file:?}");
        }
        assert!(check_file("m", "1_Pooling/config.json").is_ok());
    }
}
