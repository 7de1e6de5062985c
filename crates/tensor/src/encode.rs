//! Rows of f32 to the bytes that a checkpoint stores, and back.

use half::{
    bf16, f16,
    slice::{HalfBitsSliceExt, HalfFloatSliceExt},
};

use crate::{
    GROUP, WeightFormat,
    quantize::{
        dequantize_q4, dequantize_q8, quantize_group_q4, quantize_group_q8, store_q4, store_q8,
    },
};

/// A weight that a format cannot express: in Q8 and Q4 one that is not finite, or beyond 127 and 7
/// times 65504; in F16 a finite one from 65520 on, which would round to infinity.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
#[error("row {row}: {found} cannot be stored as {format}")]
pub struct EncodeError {
    /// Row among those given.
    pub row: usize,
    /// The weight.
    pub found: f32,
    /// The format.
    pub format: WeightFormat,
}

/// Appends rows of `cols` weights to `out` in the stored form of `format`: little-endian elements
/// or, when quantized, groups of 32 with their scales (the last group of a row filled up with
/// zeros).
///
/// Rows are independent: threads may encode different rows, whose bytes then follow each other in
/// the file.
///
/// # Errors
///
/// If a weight cannot be expressed; `out` then holds some of the rows.
///
/// # Panics
///
/// If `values` are no whole number of rows.
pub fn encode_rows(
    format: WeightFormat,
    cols: usize,
    values: &[f32],
    out: &mut Vec<u8>,
) -> Result<(), EncodeError> {
    assert!(
        if cols == 0 { values.is_empty() } else { values.len().is_multiple_of(cols) },
        "{} values are no rows of {cols}",
        values.len()
    );
    let start = out.len();
    match format {
        WeightFormat::F32 => out.extend_from_slice(bytemuck::cast_slice(values)),
        WeightFormat::Bf16 => encode_16(values, out, |part, bits| {
            bits.reinterpret_cast_mut::<bf16>().convert_from_f32_slice(part);
        }),
        WeightFormat::F16 => {
            encode_16(values, out, |part, bits| {
                bits.reinterpret_cast_mut::<f16>().convert_from_f32_slice(part)
            });
            let infinite = |bytes: &[u8; 2]| f16::from_le_bytes(*bytes).is_infinite();
            let written = out[start..].as_chunks::<2>().0;
            let lost = |(value, bytes): (&f32, &[u8; 2])| value.is_finite() && infinite(bytes);
            if let Some(index) = values.iter().zip(written).position(lost) {
                return Err(EncodeError { row: index / cols, found: values[index], format });
            }
        }
        WeightFormat::Q8 | WeightFormat::Q4 => {
            let mut block = [0; 2 + GROUP];
            let block = &mut block[..format.group_bytes().expect("a quantized format")];
            for (index, group) in
                values.chunks(cols.max(1)).flat_map(|row| row.chunks(GROUP)).enumerate()
            {
                let mut weights = [0.0; GROUP];
                weights[..group.len()].copy_from_slice(group);
                let stored = match format {
                    WeightFormat::Q8 => {
                        quantize_group_q8(&weights).map(|group| store_q8(&group, block))
                    }
                    _ => quantize_group_q4(&weights).map(|group| store_q4(&group, block)),
                };
                if stored.is_none() {
                    let largest = weights.into_iter().max_by(|a, b| a.abs().total_cmp(&b.abs()));
                    let found = largest.unwrap_or_default();
                    return Err(EncodeError { row: index / cols.div_ceil(GROUP), found, format });
                }
                out.extend_from_slice(block);
            }
        }
    }
    Ok(())
}

/// Reads one row back from its stored form, the inverse of [`encode_rows`]: `bytes` has
/// [`WeightFormat::stored_row_bytes`] for the `out.len()` weights.
///
/// # Panics
///
/// If `bytes` is shorter.
pub fn decode_row(format: WeightFormat, bytes: &[u8], out: &mut [f32]) {
    let needed = format.stored_row_bytes(out.len());
    assert!(needed.is_some_and(|needed| needed <= bytes.len()), "{} bytes of a row", bytes.len());
    match format {
        WeightFormat::F32 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_le_bytes(*bytes);
            }
        }
        WeightFormat::Bf16 => {
            for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
        WeightFormat::F16 => decode_f16(bytes, out),
        WeightFormat::Q8 | WeightFormat::Q4 => {
            let size = format.group_bytes().expect("a quantized format");
            for (out, block) in out.chunks_mut(GROUP).zip(bytes.chunks_exact(size)) {
                let values = match format {
                    WeightFormat::Q8 => dequantize_q8(block),
                    _ => dequantize_q4(block),
                };
                out.copy_from_slice(&values[..out.len()]);
            }
        }
    }
}

/// Half precision in pieces, for which the library has vector instructions.
fn decode_f16(bytes: &[u8], out: &mut [f32]) {
    let mut bits = [0_u16; 256];
    for (out, bytes) in out.chunks_mut(bits.len()).zip(bytes.chunks(2 * bits.len())) {
        let bits = &mut bits[..out.len()];
        bytemuck::cast_slice_mut(bits).copy_from_slice(&bytes[..2 * out.len()]);
        bits.reinterpret_cast::<f16>().convert_to_f32_slice(out);
    }
}

/// 16-bit elements, converted in pieces that stay in the cache.
fn encode_16(values: &[f32], out: &mut Vec<u8>, convert: impl Fn(&[f32], &mut [u16])) {
    let mut bits = [0_u16; 1024];
    for part in values.chunks(bits.len()) {
        let bits = &mut bits[..part.len()];
        convert(part, bits);
        out.extend_from_slice(bytemuck::cast_slice(bits));
    }
}
