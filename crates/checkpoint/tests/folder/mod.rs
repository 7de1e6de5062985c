//! Checkpoint folders for tests, well formed or not, written byte by byte.
#![allow(dead_code)] // each test binary uses its part

use std::path::{Path, PathBuf};

use half::{bf16, f16};
use tempfile::TempDir;

/// A folder that is removed with this value.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Writes a file of any bytes.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, bytes).expect("a file in a temporary folder");
        path
    }

    /// Writes a safetensors file from its header's JSON and its data.
    pub fn safetensors(&self, name: &str, header: &str, data: &[u8]) -> PathBuf {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        self.file(name, &bytes)
    }

    /// A folder with one `model.safetensors`.
    pub fn single(header: &str, data: &[u8]) -> Self {
        let folder = Self::new();
        folder.safetensors("model.safetensors", header, data);
        folder
    }

    /// A folder with one matrix named `w`, stored as `dtype` (F32, BF16 or F16).
    pub fn matrix(dtype: &str, rows: usize, cols: usize, values: &[f32]) -> Self {
        assert_eq!(values.len(), rows * cols);
        let data = stored(dtype, values);
        let header = format!(
            r#"{{"w":{{"dtype":"{dtype}","shape":[{rows},{cols}],"data_offsets":[0,{}]}}}}"#,
            data.len()
        );
        Self::single(&header, &data)
    }
}

/// Bytes of `values` in a safetensors dtype.
pub fn stored(dtype: &str, values: &[f32]) -> Vec<u8> {
    match dtype {
        "F32" => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        "BF16" => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        "F16" => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        other => panic!("dtype {other} in a test"),
    }
}

/// The values after a trip through a dtype or a weight format's elements.
pub fn rounded(dtype: &str, value: f32) -> f32 {
    match dtype {
        "BF16" => bf16::from_f32(value).to_f32(),
        "F16" => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// Pseudorandom weights, roughly normal with a standard deviation of 0.02, the same for the same
/// seed.
pub fn weights(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
    };
    (0..len).map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 0.028).collect()
}
