// Attention of a step over slots: each run is a sequence's new tokens, which see what its slot holds. Single tokens are
// attended to here, longer runs by native_blocks.h.
// Called by native_kernels.py, and by compiled steps through native_shims.cpp; the twin is attend_flat of attention.py.
//
// Why: called through Python, a layer of a step of one row takes 100 microseconds, of which 10 are arithmetic.

#include "native_attention.h"

#include <cmath>
#include <vector>

#include "native_blocks.h"
#include "native_values.h"

namespace {

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
            for (int i = 0; i < 4; i++)
                sum[i] = T::multiply(sum[i], _mm512_loadu_si512(query + d), _mm512_loadu_si512(k + i * dim + d));
        _mm_storeu_ps(scores + key, _mm_mul_ps(sum_lanes(sum[0], sum[1], sum[2], sum[3]), _mm_set1_ps(scaling)));
    }
    for (; key < num_keys; key++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t d = 0; d < dim; d += T::STEP)
            sum = T::multiply(sum, _mm512_loadu_si512(query + d), _mm512_loadu_si512(keys + key * dim + d));
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
            x = bounded(x, softcap);
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

// One step's attention in one layer.
template <typename T>
struct Layer {
    using Value = typename T::Value;
    const AttentionCall& call;
    const Step& step;
    bool is_cross;

    int64_t group() const { return call.num_heads / call.num_kv_heads; }

    static const Value* at(const Strided& t, int64_t head, int64_t token) {
        return static_cast<const Value*>(t.data) + head * t.head_stride + token * t.row_stride;
    }

    Value* keys_of(const StepRun& run, int64_t head) const { return cached(run, head, 0, call.key_dim); }
    Value* values_of(const StepRun& run, int64_t head) const { return cached(run, head, 1, call.value_dim); }
    Value* cached(const StepRun& run, int64_t head, int64_t which, int64_t dim) const {
        const int64_t place = (run.slot * call.num_kv_heads + head) * run.capacity;
        return reinterpret_cast<Value*>(run.pointers[2 * call.layer + which]) + place * dim;
    }

    Value* out_of(int64_t token, int64_t head) const {
        return static_cast<Value*>(call.out) + (token * call.num_heads + head) * call.value_dim;
    }

    // A run's new K and V join its slot's.
    AVX512_BF16 void write(const StepRun& run, int64_t head) const {
        const int64_t start = run.length - run.num_tokens;
        Value* keys = keys_of(run, head) + start * call.key_dim;
        Value* values = values_of(run, head) + start * call.value_dim;
        for (int64_t i = 0; i < run.num_tokens; i++, keys += call.key_dim, values += call.value_dim) {
            std::memcpy(keys, at(call.key, head, run.first + i), call.key_dim * sizeof(Value));
            std::memcpy(values, at(call.value, head, run.first + i), call.value_dim * sizeof(Value));
        }
    }

    // A single token.
    AVX512_BF16 void attend_row(const StepRun& run, int64_t head) const {
        const int64_t first = call.window > 0 ? std::max<int64_t>(0, run.length - call.window) : 0;
        const int64_t num_keys = run.length - first;
        const int64_t room = (num_keys + LANES - 1) / LANES * LANES;
        static thread_local std::vector<float> scores;
        if (static_cast<int64_t>(scores.size()) < 4 * room) scores.resize(4 * room);
        const Value* keys = keys_of(run, head) + first * call.key_dim;
        const Value* values = values_of(run, head) + first * call.value_dim;
        for (int64_t g = 0; g < group();) {
            const int64_t count = std::min<int64_t>(4, group() - g), query_head = head * group() + g;
            float sums[4];
            for (int64_t i = 0; i < count; i++) {
                score<T>(at(call.query, query_head + i, run.first), keys, num_keys, call.key_dim, call.scaling,
                         scores.data() + i * room);
                const float* sink = call.sinks ? call.sinks + query_head + i : nullptr;
                sums[i] = weigh(scores.data() + i * room, num_keys, call.softcap, sink);
            }
            Value* to = out_of(run.first, query_head);
            switch (count) {
                case 4: mix_all<T, 4>(scores.data(), room, sums, values, num_keys, call.value_dim, to); break;
                case 3: mix_all<T, 3>(scores.data(), room, sums, values, num_keys, call.value_dim, to); break;
                case 2: mix_all<T, 2>(scores.data(), room, sums, values, num_keys, call.value_dim, to); break;
                case 1: mix_all<T, 1>(scores.data(), room, sums, values, num_keys, call.value_dim, to); break;
            }
            g += count;
        }
    }

    // `num_tokens` of a run from its `token` on.
    AVX512_BF16 void attend_tokens(const StepRun& run, int64_t head, int64_t token, int64_t num_tokens) const {
        for (int64_t g = 0; g < group(); g += BLOCK_ROWS) {
            const int64_t num_heads = std::min(BLOCK_ROWS, group() - g), query_head = head * group() + g;
            attend_block<T>({
                at(call.query, query_head, run.first + token), keys_of(run, head), values_of(run, head),
                call.query.row_stride, call.query.head_stride, call.key_dim, call.value_dim,
                out_of(run.first + token, query_head), call.num_heads * call.value_dim, call.value_dim,
                num_heads, num_tokens * num_heads, call.key_dim, call.value_dim,
                is_cross ? run.length : run.length - run.num_tokens + token + 1, !is_cross,
                call.window, call.scaling, call.softcap,
                call.sinks ? call.sinks + query_head : nullptr,
            });
        }
    }

    AVX512_BF16 void attend() const {
        const int64_t row_size = call.num_heads * call.value_dim;
        auto* out = static_cast<Value*>(call.out);
        std::fill(out + step.num_tokens * row_size, out + call.num_tokens * row_size, Value{});
        struct Item {
            const StepRun* run;
            int64_t head, token, num_tokens;
        };
        static thread_local std::vector<Item> items;
        items.clear();
        int64_t work = 0;
        const int64_t block = std::max<int64_t>(1, BLOCK_ROWS / group());
        for (int64_t i = step.num_runs - 1; i >= 0; i--) {  // the longest are the last, and are best begun first
            const StepRun& run = step.runs[i];
            work += run.length * run.num_tokens;
            for (int64_t head = 0; head < call.num_kv_heads; head++)
                for (int64_t token = run.num_tokens - 1; token >= 0; token -= block) {
                    const int64_t first = std::max<int64_t>(0, token + 1 - block);
                    items.push_back({&run, head, first, token + 1 - first});
                }
        }
        work *= call.num_heads * (call.key_dim + call.value_dim);
        const auto* all = items.data();
        const int64_t num_items = items.size(), num_writes = is_cross ? 0 : step.num_runs * call.num_kv_heads;
        // Some 10 microseconds of one thread's work, below which it is not worth waking others.
        const bool is_shared = step.num_threads > 1 && num_items > 1 && work > 200'000;
#pragma omp parallel num_threads(step.num_threads) if (is_shared)
        {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < num_writes; i++) write(step.runs[i / call.num_kv_heads], i % call.num_kv_heads);
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < num_items; i++) {
                const Item& item = all[i];
                if (item.run->num_tokens == 1) attend_row(*item.run, item.head);
                else attend_tokens(*item.run, item.head, item.token, item.num_tokens);
            }
        }
    }
};

template <typename T>
AVX512_BF16 void attend_sequences(const WholeCall& call) {
    using Value = typename T::Value;
    const int64_t group = call.num_heads / call.num_kv_heads, heads_at_once = std::min(BLOCK_ROWS, group);
    const int64_t block = BLOCK_ROWS / heads_at_once, num_blocks = (call.num_positions + block - 1) / block;
    const int64_t num_items = call.num_sequences * call.num_kv_heads * num_blocks;
    const auto at = [](const Strided& t, int64_t batch_stride, int64_t sequence, int64_t head, int64_t row) {
        return static_cast<const Value*>(t.data) + sequence * batch_stride + head * t.head_stride + row * t.row_stride;
    };
#pragma omp parallel for num_threads(call.num_threads) if (call.num_threads > 1) schedule(dynamic)
    for (int64_t item = 0; item < num_items; item++) {
        const int64_t first = item % num_blocks * block, num_rows = std::min(block, call.num_positions - first);
        const int64_t head = item / num_blocks % call.num_kv_heads, sequence = item / num_blocks / call.num_kv_heads;
        for (int64_t g = 0; g < group; g += heads_at_once) {
            const int64_t num_heads = std::min(heads_at_once, group - g), query_head = head * group + g;
            Value* out = static_cast<Value*>(call.out) +
                         ((sequence * call.num_positions + first) * call.num_heads + query_head) * call.value_dim;
            attend_block<T>({
                at(call.query, call.query_batch, sequence, query_head, first),
                at(call.key, call.key_batch, sequence, head, 0), at(call.value, call.value_batch, sequence, head, 0),
                call.query.row_stride, call.query.head_stride, call.key.row_stride, call.value.row_stride,
                out, call.num_heads * call.value_dim, call.value_dim,
                num_heads, num_rows * num_heads, call.key_dim, call.value_dim,
                call.num_positions, false, 0, call.scaling, 0, nullptr,
            });
        }
    }
}

}  // namespace

const Step*& current_step() {
    static thread_local const Step* step = nullptr;
    return step;
}

bool attend_slots(const AttentionCall& call) {
    const Step* step = current_step();
    if (!step || step->num_tokens > call.num_tokens || call.layer >= step->num_layers) return false;
    call.is_bf16 ? Layer<Bf16>{call, *step, false}.attend() : Layer<Float32>{call, *step, false}.attend();
    return true;
}

bool attend_sources(const AttentionCall& call, const Step& step) {
    if (step.num_tokens > call.num_tokens || call.layer >= step.num_layers) return false;
    call.is_bf16 ? Layer<Bf16>{call, step, true}.attend() : Layer<Float32>{call, step, true}.attend();
    return true;
}

void attend_whole(const WholeCall& call) {
    call.is_bf16 ? attend_sequences<Bf16>(call) : attend_sequences<Float32>(call);
}

// The step that attention of this thread refers to from here on; null for none.
extern "C" void set_step(const Step* step) { current_step() = step; }

// The same for callers in other languages.
extern "C" int attend_call(const AttentionCall* call) { return attend_slots(*call); }
extern "C" int attend_sources_call(const AttentionCall* call, const Step* step) { return attend_sources(*call, *step); }

extern "C" void attend_whole_call(const WholeCall* call) { attend_whole(*call); }
