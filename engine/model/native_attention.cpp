// Attention of a decode step over slots: each row is one new token of a sequence, which sees what its slot holds.
// Called by native_kernels.py, and by compiled steps through native_shims.cpp; the twin is attend_flat of attention.py.
//
// Why: called through Python, a layer of a step of one row takes 100 microseconds, of which 10 are arithmetic.

#include "native_attention.h"

#include <cmath>
#include <vector>

#include "native_vectors.h"

namespace {

// What is read of K, V and Q, whatever it is made of.
struct Bf16 {
    using Value = uint16_t;
    static constexpr int64_t STEP = 2 * LANES;  // values in one product
    AVX512_BF16 static __m512 multiply(__m512 sum, const Value* a, const Value* b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_loadu_si512(a)),
                                reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)));
    }
    AVX512_BF16 static __m512 load(const Value* from) { return widen(from); }
    AVX512_BF16 static void store(Value* to, __m512 values) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
    }
};

struct Float32 {
    using Value = float;
    static constexpr int64_t STEP = LANES;
    AVX512_BF16 static __m512 multiply(__m512 sum, const Value* a, const Value* b) {
        return _mm512_fmadd_ps(_mm512_loadu_ps(a), _mm512_loadu_ps(b), sum);
    }
    AVX512_BF16 static __m512 load(const Value* from) { return _mm512_loadu_ps(from); }
    AVX512_BF16 static void store(Value* to, __m512 values) { _mm512_storeu_ps(to, values); }
};

// e^x to float32's precision; 0 where x is below the smallest normal number's logarithm, NaN where x is: a row of NaN
// has to be noticed.
AVX512_BF16 inline __m512 exponential(__m512 x) {
    const __mmask16 is_normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLE_UQ);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_maskz_scalef_ps(is_normal, p, n);
}

// Scores of one query over keys that lie one after the other; `scores` has room for a multiple of LANES of them.
template <typename T>
AVX512_BF16 void score(const typename T::Value* query, const typename T::Value* keys, int64_t num_keys, int64_t dim,
                       float scaling, float* scores) {
    int64_t key = 0;
    for (; key + 4 <= num_keys; key += 4) {
        const typename T::Value* k = keys + key * dim;
        __m512 sum[4];
        for (int i = 0; i < 4; i++) sum[i] = _mm512_setzero_ps();
        for (int64_t d = 0; d < dim; d += T::STEP)
            for (int i = 0; i < 4; i++) sum[i] = T::multiply(sum[i], query + d, k + i * dim + d);
        _mm_storeu_ps(scores + key, _mm_mul_ps(sum_lanes(sum[0], sum[1], sum[2], sum[3]), _mm_set1_ps(scaling)));
    }
    for (; key < num_keys; key++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < dim; d += T::STEP) sum = T::multiply(sum, query + d, keys + key * dim + d);
        scores[key] = _mm512_reduce_add_ps(sum) * scaling;
    }
}

// Scores become weights, not yet divided by what is returned: their sum. Places up to a multiple of LANES become 0.
AVX512_BF16 float weigh(float* scores, int64_t num_keys, float softcap, const float* sink) {
    const int64_t stop = (num_keys + LANES - 1) / LANES * LANES;
    std::fill(scores + num_keys, scores + stop, -INFINITY);
    __m512 largest = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < stop; i += LANES) {
        __m512 x = _mm512_loadu_ps(scores + i);
        if (softcap > 0) {
            // c tanh(x / c) = c - 2 c / (e^(2 x / c) + 1); the exponent is bounded, where tanh is 1 long
            // since; a NaN stays one, as the second of two.
            const __m512 cap = _mm512_set1_ps(softcap), one = _mm512_set1_ps(1);
            const __m512 twice = _mm512_min_ps(_mm512_set1_ps(80), _mm512_div_ps(_mm512_add_ps(x, x), cap));
            const __m512 share = _mm512_div_ps(_mm512_set1_ps(2), _mm512_add_ps(exponential(twice), one));
            x = _mm512_mul_ps(cap, _mm512_sub_ps(one, share));
            if (i + LANES > num_keys)
                x = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), (1 << (num_keys - i)) - 1, x);
            _mm512_storeu_ps(scores + i, x);
        }
        largest = _mm512_max_ps(largest, x);
    }
    float most = _mm512_reduce_max_ps(largest);
    if (sink) most = std::max(most, *sink);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < stop; i += LANES) {
        const __m512 e = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), _mm512_set1_ps(most)));
        _mm512_storeu_ps(scores + i, e);
        sum = _mm512_add_ps(sum, e);
    }
    return _mm512_reduce_add_ps(sum) + (sink ? std::exp(*sink - most) : 0.0f);
}

// The weighted sum of values, for G queries at once and the D * LANES dimensions from `first`.
template <typename T, int G, int D>
AVX512_BF16 void mix(const float* weights, int64_t room, const float* sums, const typename T::Value* values,
                     int64_t num_keys, int64_t dim, int64_t first, typename T::Value* out) {
    __m512 sum[G][D];
    for (int g = 0; g < G; g++)
        for (int d = 0; d < D; d++) sum[g][d] = _mm512_setzero_ps();
    const typename T::Value* value = values + first;
    for (int64_t key = 0; key < num_keys; key++, value += dim) {
        __m512 v[D];
        for (int d = 0; d < D; d++) v[d] = T::load(value + d * LANES);
        for (int g = 0; g < G; g++) {
            const __m512 weight = _mm512_set1_ps(weights[g * room + key]);
            for (int d = 0; d < D; d++) sum[g][d] = _mm512_fmadd_ps(weight, v[d], sum[g][d]);
        }
    }
    for (int g = 0; g < G; g++)
        for (int d = 0; d < D; d++)
            T::store(out + g * dim + first + d * LANES, _mm512_div_ps(sum[g][d], _mm512_set1_ps(sums[g])));
}

template <typename T, int G>
AVX512_BF16 void mix_all(const float* weights, int64_t room, const float* sums, const typename T::Value* values,
                         int64_t num_keys, int64_t dim, typename T::Value* out) {
    int64_t d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) mix<T, G, 4>(weights, room, sums, values, num_keys, dim, d, out);
    for (; d < dim; d += LANES) mix<T, G, 1>(weights, room, sums, values, num_keys, dim, d, out);
}

// One row's attention over one KV head, which its new K and V join first.
template <typename T>
AVX512_BF16 void attend_head(const AttentionCall& call, const StepRow& row, int64_t index, int64_t head) {
    using Value = typename T::Value;
    const int64_t group = call.num_heads / call.num_kv_heads;
    const int64_t place = (row.slot * call.num_kv_heads + head) * row.capacity;
    Value* keys = reinterpret_cast<Value*>(row.pointers[2 * call.layer]) + place * call.key_dim;
    Value* values = reinterpret_cast<Value*>(row.pointers[2 * call.layer + 1]) + place * call.value_dim;
    const auto at = [&](const Strided& t, int64_t h) {
        return static_cast<const Value*>(t.data) + h * t.head_stride + index * t.row_stride;
    };
    const int64_t last = row.length - 1;
    std::memcpy(keys + last * call.key_dim, at(call.key, head), call.key_dim * sizeof(Value));
    std::memcpy(values + last * call.value_dim, at(call.value, head), call.value_dim * sizeof(Value));
    const int64_t first = call.window > 0 ? std::max<int64_t>(0, row.length - call.window) : 0;
    const int64_t num_keys = row.length - first;
    const int64_t room = (num_keys + LANES - 1) / LANES * LANES;
    static thread_local std::vector<float> scores;
    if (static_cast<int64_t>(scores.size()) < 4 * room) scores.resize(4 * room);
    keys += first * call.key_dim;
    values += first * call.value_dim;
    Value* out = static_cast<Value*>(call.out) + (index * call.num_heads + head * group) * call.value_dim;
    for (int64_t g = 0; g < group;) {
        const int64_t count = std::min<int64_t>(4, group - g);
        float sums[4];
        for (int64_t i = 0; i < count; i++) {
            const int64_t query_head = head * group + g + i;
            score<T>(at(call.query, query_head), keys, num_keys, call.key_dim, call.scaling, scores.data() + i * room);
            const float* sink = call.sinks ? call.sinks + query_head : nullptr;
            sums[i] = weigh(scores.data() + i * room, num_keys, call.softcap, sink);
        }
        Value* to = out + g * call.value_dim;
        switch (count) {
            case 4: mix_all<T, 4>(scores.data(), room, sums, values, num_keys, call.value_dim, to); break;
            case 3: mix_all<T, 3>(scores.data(), room, sums, values, num_keys, call.value_dim, to); break;
            case 2: mix_all<T, 2>(scores.data(), room, sums, values, num_keys, call.value_dim, to); break;
            case 1: mix_all<T, 1>(scores.data(), room, sums, values, num_keys, call.value_dim, to); break;
        }
        g += count;
    }
}

template <typename T>
AVX512_BF16 void attend_rows(const AttentionCall& call, const Step& step) {
    const int64_t size = call.num_heads * call.value_dim;
    auto* out = static_cast<typename T::Value*>(call.out);
    std::fill(out + step.num_rows * size, out + call.num_rows * size, typename T::Value{});
    const int64_t num_items = step.num_rows * call.num_kv_heads;
    int64_t work = 0;
    for (int64_t i = 0; i < step.num_rows; i++) work += step.rows[i].length;
    work *= call.num_heads * (call.key_dim + call.value_dim);
    // Some 10 microseconds of one thread's work, below which it is not worth waking others.
    const bool is_shared = step.num_threads > 1 && num_items > 1 && work > 200'000;
#pragma omp parallel for num_threads(step.num_threads) if (is_shared) schedule(dynamic)
    for (int64_t item = 0; item < num_items; item++) {
        const int64_t row = item / call.num_kv_heads;
        attend_head<T>(call, step.rows[row], row, item % call.num_kv_heads);
    }
}

}  // namespace

const Step*& current_step() {
    static thread_local const Step* step = nullptr;
    return step;
}

bool attend_slots(const AttentionCall& call) {
    const Step* step = current_step();
    if (!step || step->num_rows > call.num_rows || call.layer >= step->num_layers) return false;
    call.is_bf16 ? attend_rows<Bf16>(call, *step) : attend_rows<Float32>(call, *step);
    return true;
}

// The step that attention of this thread refers to from here on; null for none.
extern "C" void set_step(const Step* step) { current_step() = step; }

// The same for callers in other languages.
extern "C" int attend_call(const AttentionCall* call) { return attend_slots(*call); }
