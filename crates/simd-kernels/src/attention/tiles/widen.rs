//! Tiles of keys and values as f32, in the order in which the kernels of many rows read them.

use super::kernels::Element;
use crate::kv::{BLOCK, KV_GROUP, KvFormat, KvHead};
use std::arch::x86_64::*;

/// `count` blocks of keys from block `first` on, as [block][head_dim][16].
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn keys(kv: &KvHead, first: usize, count: usize, out: &mut [[f32; BLOCK]]) {
    for (b, out) in out.chunks_exact_mut(kv.head_dim()).take(count).enumerate() {
        match kv.format() {
            KvFormat::F32 => copy(kv.key_block::<f32>(first + b), out),
            KvFormat::F16 => copy(kv.key_block::<u16>(first + b), out),
            KvFormat::Q8 => {
                let codes = kv.key_block::<i8>(first + b).chunks(KV_GROUP);
                for ((out, codes), scale) in out.chunks_mut(KV_GROUP).zip(codes).zip(kv.key_scales(first + b)) {
                    // SAFETY: the target features of this function are those that `widen` needs, here and below.
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
}

/// `count` blocks of values from block `first` on, as [chunk of 16 elements][key][16] with room for `room` keys.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn values(kv: &KvHead, first: usize, count: usize, out: &mut [[f32; BLOCK]], room: usize) {
    for (c, out) in out.chunks_exact_mut(room).take(kv.width() / BLOCK).enumerate() {
        for (b, out) in out.chunks_exact_mut(BLOCK).take(count).enumerate() {
            match kv.format() {
                KvFormat::F32 => copy(&kv.value_block::<f32>(first + b)[c * BLOCK..], out),
                KvFormat::F16 => copy(&kv.value_block::<u16>(first + b)[c * BLOCK..], out),
                KvFormat::Q8 => {
                    let codes = &kv.value_block::<i8>(first + b)[c * BLOCK..];
                    let scales = &kv.value_scales(first + b)[c * BLOCK / KV_GROUP];
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
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn copy<T: Element>(block: &[[T; BLOCK]], out: &mut [[f32; BLOCK]]) {
    for (out, x) in out.iter_mut().zip(block) {
        // SAFETY: the target features of this function are those that `widen` needs.
        put(out, unsafe { T::widen(x) });
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn put(out: &mut [f32; BLOCK], [low, high]: [__m256; 2]) {
    // SAFETY: the array is 64 writable bytes.
    unsafe {
        _mm256_storeu_ps(out.as_mut_ptr(), low);
        _mm256_storeu_ps(out.as_mut_ptr().add(8), high);
    }
}

/// One half-precision number.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn half(bits: u16) -> f32 {
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))))
}
