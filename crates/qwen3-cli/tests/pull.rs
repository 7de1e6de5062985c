//! `pull` against a small hub in this process: downloads, resumption, hashes and names.
#![cfg(feature = "pull")]

mod program;

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use program::{AUSTEN, Run, assert_one_line, program, run_with};
use serde_json::json;
use sha2::{Digest as _, Sha256};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the hub serves, and what it was asked for.
#[derive(Default)]
struct Hub {
    files: HashMap<String, Vec<u8>>,
    /// Files of which the connection breaks after so many bytes.
    cut: HashMap<String, usize>,
    /// Files whose stated hash is not theirs.
    damaged: Option<String>,
    /// A name in the list that has no file.
    listed: Option<String>,
    /// The first bytes of requests for files, and the headers `authorization`.
    ranges: Vec<(String, usize)>,
    tokens: Vec<String>,
}

/// Serves `hub` until the test's process ends; returns the address.
fn serve(hub: Hub) -> (Arc<Mutex<Hub>>, String) {
    let hub = Arc::new(Mutex::new(hub));
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let served = Arc::clone(&hub);
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let hub = Arc::clone(&served);
            // A client that goes away is none of the hub's concern.
            thread::spawn(move || answer(&stream, &hub).ok());
        }
    });
    (hub, url)
}

fn answer(mut stream: &TcpStream, hub: &Mutex<Hub>) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut start = None;
    let mut hub_token = None;
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(": ") else { break };
        match &*name.to_lowercase() {
            "range" => {
                let from = value.trim_start_matches("bytes=").split('-').next().unwrap_or("");
                start = Some((from.parse().unwrap_or(0), value.ends_with("-0")));
            }
            "authorization" => hub_token = Some(value.to_owned()),
            _ => {}
        }
    }
    let mut hub = hub.lock().unwrap();
    hub.tokens.extend(hub_token);
    let path = first.split(' ').nth(1).unwrap_or_default();
    if path.starts_with("/api/models/") {
        let names = hub.files.keys().chain(&hub.listed);
        let files: Vec<_> = names.map(|name| json!({ "rfilename": name })).collect();
        let body = json!({ "sha": COMMIT, "siblings": files }).to_string();
        return write!(
            stream,
            "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
    }
    let name = path.split_once("/resolve/main/").map_or("", |(_, name)| name).to_owned();
    let Some(content) = hub.files.get(&name).cloned() else {
        return write!(
            stream,
            "HTTP/1.1 401 Unauthorized\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        );
    };
    let (from, one) = start.unwrap_or((0, false));
    let end = if one { content.len().min(1) } else { content.len() };
    let part = &content[from.min(end)..end];
    let hashed = if hub.damaged.as_ref() == Some(&name) { &b"other"[..] } else { &content };
    let etag: String = Sha256::digest(hashed).iter().map(|byte| format!("{byte:02x}")).collect();
    write!(
        stream,
        "HTTP/1.1 206 Partial Content\r\nconnection: close\r\ncontent-length: {}\r\n\
         content-range: bytes {from}-{}/{}\r\netag: \"{etag}\"\r\nx-repo-commit: {COMMIT}\r\n\r\n",
        part.len(),
        end.saturating_sub(1),
        content.len()
    )?;
    if one {
        return stream.write_all(part);
    }
    hub.ranges.push((name.clone(), from));
    let cut = hub.cut.remove(&name).unwrap_or(part.len());
    stream.write_all(&part[..cut])
}

fn pull(url: &str, home: &Path, args: &[&str]) -> Run {
    let mut command = program(&[&["pull"], args].concat());
    command.env("HF_ENDPOINT", url).env("HF_HOME", home).env("HF_TOKEN", "hf_secret");
    command.env_remove("HF_HUB_CACHE").env_remove("HUGGINGFACE_HUB_CACHE");
    run_with(command, "")
}

fn austen() -> Hub {
    let names = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"];
    let read = |name: &str| (name.to_owned(), fs::read(format!("{AUSTEN}/{name}")).unwrap());
    let mut files: HashMap<_, _> = names.into_iter().map(read).collect();
    files.insert("README.md".to_owned(), b"not downloaded".to_vec());
    Hub { files, ..Hub::default() }
}

#[test]
fn a_model_is_downloaded_once_resumed_and_found_by_its_name() {
    let mut hub = austen();
    hub.cut.insert("model.safetensors".to_owned(), 1000);
    let (hub, url) = serve(hub);
    let home = tempfile::tempdir().unwrap();
    let broken = pull(&url, home.path(), &["me/austen"]);
    assert_one_line(&broken, &["me/austen/model.safetensors"]);
    let whole = pull(&url, home.path(), &["me/austen"]);
    assert!(whole.success, "{whole:?}");
    let folder = Path::new(whole.stdout.trim());
    assert!(folder.starts_with(home.path().join("hub/models--me--austen/snapshots")), "{whole:?}");
    assert!(!folder.join("README.md").exists());
    let original = fs::read(format!("{AUSTEN}/model.safetensors")).unwrap();
    assert!(fs::read(folder.join("model.safetensors")).unwrap() == original);
    let ranges = hub.lock().unwrap().ranges.clone();
    let weights: Vec<usize> =
        ranges.iter().filter(|(name, _)| name == "model.safetensors").map(|own| own.1).collect();
    assert_eq!(weights, [0, 1000], "the second download goes on where the first stopped");
    assert_eq!(ranges.last().unwrap().0, "config.json");
    // Nothing is downloaded twice.
    assert!(pull(&url, home.path(), &["me/austen"]).success);
    assert_eq!(hub.lock().unwrap().ranges.len(), ranges.len());
    assert!(hub.lock().unwrap().tokens.iter().all(|token| token == "Bearer hf_secret"));
    let mut generate = program(&["tokenize", "--model", "me/austen", "--text", "sea"]);
    generate.env("HF_HOME", home.path()).env_remove("HF_HUB_CACHE");
    assert!(run_with(generate, "").success);
    // A file that was damaged on this disk is noticed by the next pull.
    let blob = folder.join("model.safetensors").canonicalize().unwrap();
    fs::write(&blob, b"short").unwrap();
    assert_one_line(&pull(&url, home.path(), &["me/austen"]), &["SHA-256", "was removed"]);
    assert!(pull(&url, home.path(), &["me/austen"]).success);
}

#[test]
fn a_file_of_another_hash_is_removed() {
    let (_, url) = serve(Hub { damaged: Some("model.safetensors".to_owned()), ..austen() });
    let home = tempfile::tempdir().unwrap();
    let refused = pull(&url, home.path(), &["me/austen"]);
    assert_one_line(&refused, &["model.safetensors", "SHA-256", "was removed"]);
    let snapshot = home.path().join("hub/models--me--austen/snapshots").join(COMMIT);
    assert!(!snapshot.join("model.safetensors").exists());
    assert!(!snapshot.join("config.json").exists());
}

#[test]
fn names_files_and_refusals_are_named_and_the_token_is_not() {
    let evil = "../../evil.json".to_owned();
    let (_, url) = serve(Hub { listed: Some(evil), ..austen() });
    let home = tempfile::tempdir().unwrap();
    assert_one_line(&pull(&url, home.path(), &["me/austen"]), &["../../evil.json", "within"]);
    for name in ["../x", "/etc/passwd", "a/../b", "x", ""] {
        assert_one_line(&pull(&url, home.path(), &[name]), &["is not the name of a model"]);
    }
    let (_, url) = serve(Hub { listed: Some("secret.json".to_owned()), ..austen() });
    let refused = pull(&url, home.path(), &["me/austen"]);
    assert_one_line(&refused, &["me/austen/secret.json", "401"]);
    assert!(!refused.stderr.contains("hf_secret"), "{refused:?}");
    assert_one_line(&pull(&url, home.path(), &["me/austen", "--file", "x.gguf"]), &["x.gguf"]);
    assert_one_line(&pull("http://127.0.0.1:1", home.path(), &["me/austen"]), &["me/austen"]);
    let files = [("a.gguf".to_owned(), vec![1]), ("b.gguf".to_owned(), vec![2])];
    let (_, url) = serve(Hub { files: files.into(), ..Hub::default() });
    assert_one_line(&pull(&url, home.path(), &["me/gguf"]), &["--file", "a.gguf", "b.gguf"]);
    assert!(pull(&url, home.path(), &["me/gguf", "--file", "b.gguf"]).success);
}
