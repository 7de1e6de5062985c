//! Memory that a large header takes. Alone in its process, because the figures are the whole
//! process's.
#![cfg(target_os = "linux")]

mod folder;

use std::fs;

use checkpoint::ModelSource;
use folder::Folder;

#[test]
fn a_header_of_72_megabytes_takes_little_more_memory_than_its_text() {
    let folder = Folder::new();
    let mut header = String::from("{");
    let mut count = 0;
    while header.len() < 72_000_000 {
        header += &format!(
            r#""layer.{count}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0],"note":[{}0]}},"#,
            "[],".repeat(100)
        );
        count += 1;
    }
    header.pop();
    header.push('}');
    folder.safetensors("model.safetensors", &header, &[]);
    drop(header);
    let peak = || {
        let status = fs::read_to_string("/proc/self/status").expect("procfs");
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("VmHWM");
        line.split_whitespace().nth(1).and_then(|kib| kib.parse::<usize>().ok()).expect("kB")
    };
    let before = peak();
    let source = ModelSource::open(folder.path()).unwrap();
    assert_eq!(source.weights().unwrap().names().len(), count);
    let grown = peak() - before;
    assert!(grown < 300 << 10, "{grown} KiB");
}
