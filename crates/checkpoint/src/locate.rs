//! What the path of a model is: the model's folder, a place that leads to one, or something that
//! users give by mistake.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::OpenError;

/// Where the files of a model are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A folder as published on Hugging Face.
    Folder(PathBuf),
    /// A GGUF file, or the first of several.
    Gguf(PathBuf),
}

/// The name of a part of a split GGUF model: `BASE-00001-of-00003.gguf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Split {
    base: String,
    pub(crate) part: usize,
    pub(crate) count: usize,
}

impl Split {
    pub(crate) fn of(name: &str) -> Option<Self> {
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (base, part) = rest.rsplit_once('-')?;
        let number = |text: &str| (text.len() == 5).then(|| text.parse().ok()).flatten();
        Some(Self { base: base.to_owned(), part: number(part)?, count: number(count)? })
    }

    pub(crate) fn name(&self, part: usize) -> String {
        format!("{}-{part:05}-of-{:05}.gguf", self.base, self.count)
    }
}

/// Names shown of many.
const SHOWN: usize = 5;

/// Finds the files of the model at `path`.
pub(crate) fn locate(path: &Path) -> Result<Place, OpenError> {
    let metadata = match fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return locate_missing(path),
        Err(source) => {
            return Err(OpenError::Read { path: path.to_owned(), source: Arc::new(source) });
        }
    };
    if metadata.is_dir() {
        return locate_in_folder(path);
    }
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    if !metadata.is_file() {
        return Err(OpenError::NotRegular { path: path.to_owned() });
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if name.ends_with(".gguf") {
        return match Split::of(&name) {
            Some(split) if split.part != 1 => Err(OpenError::LaterPart {
                path: path.to_owned(),
                first: path.with_file_name(split.name(1)),
            }),
            _ => Ok(Place::Gguf(path.to_owned())),
        };
    }
    let of_folder = [".safetensors", ".json", ".jinja", ".bin", ".pth", ".pt"];
    if of_folder.iter().any(|ending| name.ends_with(ending)) {
        return Err(OpenError::FileOfModel { path: path.to_owned(), folder });
    }
    Err(OpenError::NotModel { path: path.to_owned() })
}

/// A path at which there is nothing.
fn locate_missing(path: &Path) -> Result<Place, OpenError> {
    let text = path.to_string_lossy();
    if let Ok(target) = fs::read_link(path) {
        return Err(OpenError::DanglingLink { path: path.to_owned(), target });
    }
    if text == "~" || text.starts_with("~/") {
        return Err(OpenError::Tilde { path: path.to_owned() });
    }
    if text.ends_with(".gguf") || text.ends_with(".safetensors") {
        return Err(OpenError::Missing { path: path.to_owned() });
    }
    if is_hub_name(&text) {
        let cache = hub_folder();
        let folder = cache.join(format!("models--{}", text.replace('/', "--")));
        return match fs::metadata(&folder) {
            Ok(metadata) if metadata.is_dir() => locate_in_folder(&folder),
            _ => Err(OpenError::HubName { name: text.into_owned(), cache }),
        };
    }
    Err(OpenError::Missing { path: path.to_owned() })
}

/// Whether `text` looks like `organisation/model` on the Hugging Face hub.
fn is_hub_name(text: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    text.split_once('/').is_some_and(|(owner, name)| plain(owner) && plain(name))
}

/// The folder in which Hugging Face's tools keep the models that they download.
pub fn hub_folder() -> PathBuf {
    hub_cache(|name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from))
}

/// The folder in which Hugging Face's programs keep what they downloaded; `variable` reads the
/// environment.
fn hub_cache(variable: impl Fn(&str) -> Option<PathBuf>) -> PathBuf {
    let home = || variable("HOME").unwrap_or_default();
    variable("HF_HUB_CACHE")
        .or_else(|| variable("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(variable("HF_HOME")?.join("hub")))
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("huggingface/hub")))
        .unwrap_or_else(|| home().join(".cache/huggingface/hub"))
}

fn locate_in_folder(folder: &Path) -> Result<Place, OpenError> {
    if folder.join("config.json").symlink_metadata().is_ok() {
        return Ok(Place::Folder(folder.to_owned()));
    }
    if folder.join("snapshots").is_dir() {
        return locate_snapshot(folder);
    }
    let weights = folder.join("model.safetensors").symlink_metadata().is_ok();
    let is_first =
        |name: &str| name.ends_with(".gguf") && Split::of(name).is_none_or(|split| split.part == 1);
    let mut gguf = names(folder, is_first)?;
    match gguf.len() {
        1 if !weights => return Ok(Place::Gguf(folder.join(&gguf[0]))),
        2.. if !weights => {
            gguf.truncate(SHOWN);
            return Err(OpenError::SeveralGguf { path: folder.to_owned(), found: gguf });
        }
        _ => {}
    }
    // The cache itself, or the folder that holds it.
    for cache in [folder.to_owned(), folder.join("hub")] {
        let models = names(&cache, |name| name.starts_with("models--"))?;
        if !models.is_empty() {
            let models = models.into_iter().map(|name| cache.join(name)).take(SHOWN).collect();
            return Err(OpenError::CacheRoot { path: folder.to_owned(), models });
        }
    }
    // The file that is wanted first says what is missing.
    Ok(Place::Folder(folder.to_owned()))
}

/// A folder `models--…` of Hugging Face's cache: the snapshot that `refs/main` names, or the only
/// one.
fn locate_snapshot(folder: &Path) -> Result<Place, OpenError> {
    let snapshots = names(&folder.join("snapshots"), |_| true)?;
    let main = fs::metadata(folder.join("refs/main"))
        .ok()
        .filter(|metadata| metadata.is_file() && metadata.len() < 1024)
        .and_then(|_| fs::read_to_string(folder.join("refs/main")).ok());
    let main = main.as_deref().map(str::trim);
    let found = match (&snapshots[..], main) {
        (_, Some(main)) if snapshots.iter().any(|name| name == main) => main,
        ([only], _) => only,
        _ => return Err(OpenError::Snapshots { path: folder.to_owned(), found: snapshots }),
    };
    Ok(Place::Folder(folder.join("snapshots").join(found)))
}

/// The names in a folder that are `wanted`, sorted; none if there is no such folder.
fn names(folder: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<String>, OpenError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            return Ok(Vec::new());
        }
        Err(source) => {
            return Err(OpenError::Read { path: folder.to_owned(), source: Arc::new(source) });
        }
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| wanted(name))
        .collect();
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_hub() {
        for name in ["Qwen/Qwen3-0.6B", "a/b.c_d"] {
            assert!(is_hub_name(name), "{name}");
        }
        for path in ["models", "/a/b", "./a", "../a", "a/b/c", "a/", "/a", "a/.b", "a b/c", "~/m"] {
            assert!(!is_hub_name(path), "{path}");
        }
    }

    #[test]
    fn the_cache_is_where_the_environment_says() {
        let cache = |set: &[(&str, &str)]| {
            hub_cache(|name| {
                let value = set.iter().find(|(other, _)| *other == name)?.1;
                Some(PathBuf::from(value))
            })
        };
        let home = ("HOME", "/home/u");
        assert_eq!(cache(&[home]), Path::new("/home/u/.cache/huggingface/hub"));
        assert_eq!(cache(&[home, ("HF_HOME", "/d")]), Path::new("/d/hub"));
        assert_eq!(cache(&[("HF_HOME", "/d"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        assert_eq!(cache(&[home, ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
    }
}
