// What the native kernels share: bfloat16 in the vectors of CPUs with AVX512-BF16.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,fma")))

constexpr int64_t LANES = 16;  // float32 values in a register

static inline AVX512_BF16 __m512 widen(const uint16_t* bf16) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

static inline AVX512_BF16 __m512bh broadcast_pair(const uint16_t* bf16) {
    int32_t pair;
    std::memcpy(&pair, bf16, sizeof pair);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
}

// The sum over the lanes of each of four vectors.
static inline AVX512_BF16 __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
    const __m512 quarters =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    const __m256d upper = _mm512_extractf64x4_pd(_mm512_castps_pd(quarters), 1);
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm256_castpd_ps(upper));
    return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}
