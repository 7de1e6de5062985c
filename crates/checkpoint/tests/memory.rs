//! Resident memory while loading and after it. Alone in its process, because the figures are the
//! whole process's.
#![cfg(target_os = "linux")]

mod folder;

use checkpoint::{Checkpoint, CheckpointWriter, TensorSpec};
use folder::{Folder, weights};
use tensor::{PackedMatrix, WeightFormat, split_range};

/// A field of /proc/self/status, in bytes.
fn status(field: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status
        .lines()
        .find(|line| line.starts_with(field))
        .expect("a field of every Linux since 4.5");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<usize>().ok()).expect("kB") * 1024
}

#[test]
fn what_is_kept_and_the_peak_before_it() {
    // Large, middling and small matrices, and sizes that are no multiple of a page: 48 MB in bf16.
    let mut shapes = vec![(8000, 1024)];
    shapes.extend([[(515, 1024), (1024, 515), (300, 1000)]; 9].concat());
    shapes.extend([(40, 65); 100]);
    let folder = Folder::new();
    let specs: Vec<TensorSpec> = shapes
        .iter()
        .enumerate()
        .map(|(index, &(rows, cols))| TensorSpec {
            name: format!("w{index}"),
            format: WeightFormat::Bf16,
            shape: vec![rows, cols],
        })
        .collect();
    let mut writer =
        CheckpointWriter::create(folder.path().join("model.safetensors"), &specs, &[]).unwrap();
    let row = weights(1024, 1);
    for (spec, &(rows, cols)) in specs.iter().zip(&shapes) {
        for _ in 0..rows {
            writer.write(&spec.name, &row[..cols]).unwrap();
        }
    }
    writer.finish().unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();

    for format in WeightFormat::ALL {
        let before = status("RssAnon:");
        // Writing 5 resets the peak to what is resident now.
        std::fs::write("/proc/self/clear_refs", "5").expect("a process may reset its own peak");
        let base = status("VmHWM:");
        let packed: Vec<PackedMatrix> = specs
            .iter()
            .zip(&shapes)
            .map(|(spec, &(rows, cols))| {
                let matrix = checkpoint.matrix(&spec.name, rows, cols).unwrap();
                let mut packed = PackedMatrix::allocate(format, rows, cols);
                let panels = packed.panel_count();
                std::thread::scope(|scope| {
                    for chunk in
                        packed.split_panels(&[split_range(panels, 2, 0), split_range(panels, 2, 1)])
                    {
                        scope.spawn(|| chunk.load(std::slice::from_ref(&matrix)).unwrap());
                    }
                });
                packed
            })
            .collect();
        let bytes: usize = packed.iter().map(PackedMatrix::bytes).sum();
        let kept = status("RssAnon:") - before;
        let peak = status("VmHWM:") - base;
        // The rest of one huge page, and what the threads' stacks and the allocator hold back.
        let slack = 3 << 20;
        println!("{format}: {bytes} bytes, kept {kept}, peak {peak}");
        assert!(kept >= bytes * 99 / 100, "{format}: {kept} bytes resident cannot hold {bytes}");
        assert!(kept <= bytes * 105 / 100 + slack, "{format}: {kept} bytes resident for {bytes}");
        assert!(peak <= bytes * 130 / 100 + slack, "{format}: a peak of {peak} bytes for {bytes}");
    }
}
