/* Weights in the checkpoint's own format (float32, float16 or bfloat16), read as float32. */
#pragma once
#include "vectors.h"

#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { F32 = 0, F16 = 1, BF16 = 2 };
INLINE long size_of(int type) { return type == F32 ? 4 : 2; }

INLINE float half_bits(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    _Float16 f;
    memcpy(&f, &h, 2);
    return (float)f;
#endif
}

INLINE float weight_at(const void *w, int type, long i) {
    if (type == F32) return ((const float *)w)[i];
    uint16_t h = ((const uint16_t *)w)[i];
    if (type == F16) return half_bits(h);
    uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE vf weights_at(const void *w, int type, long i) {
    if (type == F32) return load((const float *)w + i);
    const uint16_t *h = (const uint16_t *)w + i;
#if defined(__AVX512F__)
    __m256i bits = _mm256_loadu_si256((const __m256i *)h);
    return type == BF16 ? (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16) : (vf)_mm512_cvtph_ps(bits);
#elif defined(__AVX2__) && defined(__F16C__)
    __m128i bits = _mm_loadu_si128((const __m128i *)h);
    return type == BF16 ? (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16) : (vf)_mm256_cvtph_ps(bits);
#else
    if (type == BF16) return (vf)(__builtin_convertvector(*(const vh *)h, vu) << 16);
    vf v;
    for (int lane = 0; lane < LANES; lane++) v[lane] = half_bits(h[lane]);
    return v;
#endif
}
