//! Blocks of keys and values as f32, in the order in which they are stored.

use super::kernels::{Element, put};
use crate::kv::{BLOCK, KV_GROUP, KvFormat, KvHead};
use std::arch::x86_64::*;

/// Block `b` of keys; out: [head_dim][16].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn keys(kv: &KvHead<'_>, b: usize, out: &mut [[f32; BLOCK]]) {
    match kv.format() {
        KvFormat::F32 => copy(kv.key_block::<f32>(b), out),
        KvFormat::F16 => copy(kv.key_block::<u16>(b), out),
        KvFormat::Q8 => {
            let codes = kv.key_block::<i8>(b).chunks(KV_GROUP);
            for ((out, codes), scale) in out.chunks_mut(KV_GROUP).zip(codes).zip(kv.key_scales(b)) {
                // SAFETY: the target features of this function are those that `widen` needs, here
                // and below.
                let scale = unsafe { u16::widen(scale) };
                for (out, codes) in out.iter_mut().zip(codes) {
                    // SAFETY: see above.
                    let [low, high] = unsafe { i8::widen(codes) };
                    put(out, [_mm256_mul_ps(low, scale[0]), _mm256_mul_ps(high, scale[1])]);
                }
            }
        }
    }
}

/// Block `b` of values; out: [chunk of 16 elements][16 keys][16].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn values(kv: &KvHead<'_>, b: usize, out: &mut [[f32; BLOCK]]) {
    match kv.format() {
        KvFormat::F32 => copy(kv.value_block::<f32>(b), out),
        KvFormat::F16 => copy(kv.value_block::<u16>(b), out),
        KvFormat::Q8 => {
            let codes = kv.value_block::<i8>(b).chunks_exact(BLOCK);
            for (c, (out, codes)) in out.chunks_exact_mut(BLOCK).zip(codes).enumerate() {
                let scales = &kv.value_scales(b)[c * BLOCK / KV_GROUP];
                for ((out, codes), &scale) in out.iter_mut().zip(codes).zip(scales) {
                    let scale = _mm256_set1_ps(half(scale));
                    // SAFETY: the target features of this function are those that `widen` needs.
                    let [low, high] = unsafe { i8::widen(codes) };
                    put(out, [_mm256_mul_ps(low, scale), _mm256_mul_ps(high, scale)]);
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn copy<T: Element>(block: &[[T; BLOCK]], out: &mut [[f32; BLOCK]]) {
    for (out, x) in out.iter_mut().zip(block) {
        // SAFETY: the target features of this function are those that `widen` needs.
        put(out, unsafe { T::widen(x) });
    }
}

/// One half-precision number.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn half(bits: u16) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
}
