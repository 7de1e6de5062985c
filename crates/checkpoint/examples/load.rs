//! Loads all matrices of a checkpoint folder into packed form and says how fast:
//! `cargo run --release -p checkpoint --example load -- FOLDER [FORMAT] [THREADS]`.

use std::{error::Error, time::Instant};

use checkpoint::{Checkpoint, Matrix};
use tensor::{PackedMatrix, PanelChunk, WeightFormat, split_range};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let folder = arguments.next().ok_or("usage: load FOLDER [FORMAT] [THREADS]")?;
    let format: Option<WeightFormat> = arguments.next().map(|name| name.parse()).transpose()?;
    let threads: usize = arguments.next().map_or(Ok(2), |count| count.parse())?;
    if threads == 0 {
        return Err("0 threads load nothing".into());
    }

    let start = Instant::now();
    let checkpoint = Checkpoint::open(&folder)?;
    let mut matrices: Vec<Matrix> = Vec::new();
    for name in checkpoint.names() {
        if let Some(&[rows, cols]) = checkpoint.shape(name) {
            matrices.push(checkpoint.matrix(name, rows, cols)?);
        }
    }
    let mut packed: Vec<PackedMatrix> = matrices
        .iter()
        .map(|matrix| {
            PackedMatrix::allocate(format.unwrap_or(matrix.format()), matrix.rows(), matrix.cols())
        })
        .collect();

    // Each thread fills the same share of every matrix, which is the share it will read when it
    // computes.
    let mut shares: Vec<Vec<(PanelChunk<'_>, &Matrix)>> =
        (0..threads).map(|_| Vec::new()).collect();
    for (packed, matrix) in packed.iter_mut().zip(&matrices) {
        let panels = packed.panel_count();
        let cuts: Vec<_> =
            (0..threads).map(|thread| split_range(panels, threads, thread)).collect();
        for (share, chunk) in shares.iter_mut().zip(packed.split_panels(&cuts)) {
            share.push((chunk, matrix));
        }
    }
    std::thread::scope(|scope| {
        let loading: Vec<_> = shares
            .into_iter()
            .map(|share| {
                scope.spawn(|| {
                    share.into_iter().try_for_each(|(chunk, matrix)| {
                        chunk.load(std::slice::from_ref(matrix)).map(drop)
                    })
                })
            })
            .collect();
        loading.into_iter().try_for_each(|thread| thread.join().expect("loading does not panic"))
    })?;

    let seconds = start.elapsed().as_secs_f64();
    let weights: usize = packed.iter().map(|packed| packed.rows() * packed.cols()).sum();
    let bytes: usize = packed.iter().map(PackedMatrix::bytes).sum();
    println!(
        "{} matrices, {:.1} million weights: read {:.1} MB, keep {:.1} MB, {seconds:.3} s on {threads} threads, {:.2} GB/s",
        packed.len(),
        weights as f64 / 1e6,
        checkpoint.bytes_read() as f64 / 1e6,
        bytes as f64 / 1e6,
        checkpoint.bytes_read() as f64 / 1e9 / seconds,
    );
    Ok(())
}
