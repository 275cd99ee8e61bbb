// Attention's Q, K and V in vector registers, bfloat16 or float32, and the exponential of their scores.

#pragma once

#include "native_vectors.h"

static inline AVX512_BF16 __m512 exponential(__m512 x);
static inline AVX512_BF16 __m512 power_of_two(__m512 x);

struct Bf16 {
    using Value = uint16_t;
    static constexpr int64_t PAIR = 2;          // values in a word, which is what a product takes of each lane
    static constexpr int64_t STEP = 2 * LANES;  // values in one product
    AVX512_BF16 static __m512 multiply(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    AVX512_BF16 static __m512 load(const Value* from) { return widen(from); }
    AVX512_BF16 static void store(Value* to, __m512 values) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
    }
    // e^(x factor - shift), to a precision that what is stored does not show.
    AVX512_BF16 static __m512 weight(__m512 x, float factor, float shift) {
        constexpr float LOG2_E = 1.44269504f;
        return power_of_two(_mm512_fmsub_ps(x, _mm512_set1_ps(factor * LOG2_E), _mm512_set1_ps(shift * LOG2_E)));
    }
};

struct Float32 {
    using Value = float;
    static constexpr int64_t PAIR = 1;
    static constexpr int64_t STEP = LANES;
    AVX512_BF16 static __m512 multiply(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    AVX512_BF16 static __m512 load(const Value* from) { return _mm512_loadu_ps(from); }
    AVX512_BF16 static void store(Value* to, __m512 values) { _mm512_storeu_ps(to, values); }
    AVX512_BF16 static __m512 weight(__m512 x, float factor, float shift) {
        return exponential(_mm512_fmsub_ps(x, _mm512_set1_ps(factor), _mm512_set1_ps(shift)));
    }
};

// e^x to float32's precision; 0 where x is below the smallest normal number's logarithm, NaN where x is: a row of NaN
// has to be noticed.
static inline AVX512_BF16 __m512 exponential(__m512 x) {
    const __mmask16 is_normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLE_UQ);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_maskz_scalef_ps(is_normal, p, n);
}

// 2^x within 4e-6 of itself, with 0 and NaN as above.
static inline AVX512_BF16 __m512 power_of_two(__m512 x) {
    const __mmask16 is_normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLE_UQ);
    const __m512 n = _mm512_roundscale_ps(x, 0);
    const __m512 r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(9.6181e-3f);  // the first terms of e^(r ln 2)
    for (const float c : {5.5504e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_maskz_scalef_ps(is_normal, p, n);
}

// A score bounded as softcap * tanh(score / softcap) bounds it.
static inline AVX512_BF16 __m512 bounded(__m512 x, float softcap) {
    // c tanh(x / c) = c - 2 c / (e^(2 x / c) + 1); the exponent is bounded, where tanh is 1 long since; a NaN stays
    // one, as the second of two.
    const __m512 cap = _mm512_set1_ps(softcap), one = _mm512_set1_ps(1);
    const __m512 twice = _mm512_min_ps(_mm512_set1_ps(80), _mm512_div_ps(_mm512_add_ps(x, x), cap));
    const __m512 share = _mm512_div_ps(_mm512_set1_ps(2), _mm512_add_ps(exponential(twice), one));
    return _mm512_mul_ps(cap, _mm512_sub_ps(one, share));
}
