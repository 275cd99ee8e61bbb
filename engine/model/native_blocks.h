// Attention of many queries over many keys, a block at a time: for prompts, and for encoders, which see everything.
//
// Why: as plain products of torch, half the time goes into scores that leave the cache and come back to be masked and
// exponentiated, and in short runs into the calls. Here scores of 6 queries over 256 keys are weighed where they were
// made, with the largest score and the sum of a row kept from block to block (Milakov and Gimelshein 2018, "Online
// normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention").

#pragma once

#include <cmath>
#include <cstdlib>
#include <memory>

#include "native_values.h"

constexpr int64_t TILE_ROWS = 6;     // of queries at a time: 6 x 4 accumulators of 32 registers
constexpr int64_t BLOCK_KEYS = 256;  // scores of a tile are 6 KB, packed keys of 64 values 32 KB: both stay near
constexpr int64_t BLOCK_ROWS = 256;  // queries times heads of a group that share what is packed

// Queries of `group` heads that share a KV head, the heads of one token side by side: row r is token r / group.
template <typename T>
struct Block {
    using Value = typename T::Value;
    const Value *query, *keys, *values;           // the first row's; the first key's
    int64_t query_token, query_head, key_row, value_row;  // strides, in values
    Value* out;
    int64_t out_token, out_head;
    int64_t group, num_rows, key_dim, value_dim;
    int64_t num_keys;  // of the first row's token; the next one sees one more where the block is causal
    bool is_causal;
    int64_t window;  // 0 for none
    float scaling, softcap;
    const float* sinks;  // of the group's heads, or null

    int64_t stop(int64_t row) const { return is_causal ? num_keys + row / group : num_keys; }
    int64_t first(int64_t row) const { return window > 0 ? std::max<int64_t>(0, stop(row) - window) : 0; }
    const Value* query_of(int64_t row) const { return query + row / group * query_token + row % group * query_head; }
};

// Room that a thread keeps from call to call, aligned to the cache's lines.
class Room {
   public:
    template <typename V>
    V* of(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(V) + 63) / 64 * 64;
        if (bytes > size_) {
            memory_.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
            size_ = memory_ ? bytes : 0;
            if (!memory_) std::abort();  // no exception may leave a parallel region
        }
        return reinterpret_cast<V*>(memory_.get());
    }

   private:
    struct Free {
        void operator()(char* memory) const { std::free(memory); }
    };
    std::unique_ptr<char, Free> memory_;
    size_t size_ = 0;
};

// C [TILE_ROWS, B * LANES] = or += A B: rows of A are words, each of which is multiplied with a row of B.
template <typename T, int B>
AVX512_BF16 void multiply_words(const int32_t* const* a, const int32_t* b, int64_t num_words, int64_t b_row, float* c,
                                int64_t c_row, bool adds) {
    __m512 sum[TILE_ROWS][B];
    for (int m = 0; m < TILE_ROWS; m++)
        for (int i = 0; i < B; i++) sum[m][i] = adds ? _mm512_loadu_ps(c + m * c_row + i * LANES) : _mm512_setzero_ps();
    for (int64_t k = 0; k < num_words; k++, b += b_row) {
        __m512i words[B];
        for (int i = 0; i < B; i++) words[i] = _mm512_loadu_si512(b + i * LANES);
        for (int m = 0; m < TILE_ROWS; m++) {
            const __m512i word = _mm512_set1_epi32(a[m][k]);
            for (int i = 0; i < B; i++) sum[m][i] = T::multiply(sum[m][i], words[i], word);
        }
    }
    for (int m = 0; m < TILE_ROWS; m++)
        for (int i = 0; i < B; i++) _mm512_storeu_ps(c + m * c_row + i * LANES, sum[m][i]);
}

// The same for any multiple of LANES columns.
template <typename T>
AVX512_BF16 void multiply_tile(const int32_t* const* a, const int32_t* b, int64_t num_words, int64_t b_row, float* c,
                               int64_t c_row, int64_t num_columns, bool adds) {
    int64_t i = 0;
    for (; i + 4 * LANES <= num_columns; i += 4 * LANES)
        multiply_words<T, 4>(a, b + i, num_words, b_row, c + i, c_row, adds);
    for (; i < num_columns; i += LANES) multiply_words<T, 1>(a, b + i, num_words, b_row, c + i, c_row, adds);
}

// 16 rows of 16 words each become columns.
static inline AVX512_BF16 void transpose_words(const __m512i* rows, int32_t* to, int64_t to_row) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    // b[4 i + c] has, in its quarter q, column 4 q + c of rows 4 i to 4 i + 3.
    for (int c = 0; c < 4; c++) {
        const auto store = [&](int row, __m512i half, __m512i other) AVX512_BF16 {
            _mm512_storeu_si512(to + row * to_row, _mm512_shuffle_i32x4(half, other, 0x88));
            _mm512_storeu_si512(to + (row + 8) * to_row, _mm512_shuffle_i32x4(half, other, 0xdd));
        };
        // Quarters 0 and 2 of both, then 1 and 3.
        store(c, _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88));
        store(4 + c, _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd), _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd));
    }
}

// Keys [n, dim] as words [dim / PAIR, BLOCK_KEYS]; up to a multiple of LANES keys become 0.
template <typename T>
AVX512_BF16 void pack_keys(const typename T::Value* keys, int64_t row, int64_t num_keys, int64_t dim, int32_t* packed) {
    for (int64_t key = 0; key < num_keys; key += LANES)
        for (int64_t d = 0; d < dim; d += T::STEP) {
            __m512i rows[LANES];
            for (int64_t i = 0; i < LANES; i++)
                rows[i] = key + i < num_keys ? _mm512_loadu_si512(keys + (key + i) * row + d) : _mm512_setzero_si512();
            transpose_words(rows, packed + d / T::PAIR * BLOCK_KEYS + key, BLOCK_KEYS);
        }
}

// Values [n, dim] as words [n / PAIR, dim], each of values of one column.
AVX512_BF16 inline void pack_values(const uint16_t* values, int64_t row, int64_t num_keys, int64_t dim,
                                    int32_t* packed) {
    for (int64_t key = 0; key < num_keys; key += 2, packed += dim)
        for (int64_t d = 0; d < dim; d += LANES) {
            const auto words = [&](int64_t k) AVX512_BF16 {
                const auto* from = reinterpret_cast<const __m256i*>(values + k * row + d);
                return _mm512_cvtepu16_epi32(_mm256_loadu_si256(from));
            };
            const __m512i second = key + 1 < num_keys ? _mm512_slli_epi32(words(key + 1), 16) : _mm512_setzero_si512();
            _mm512_storeu_si512(packed + d, _mm512_or_si512(words(key), second));
        }
}

// What a tile's rows have come to: their largest score, and of their weights the sum.
struct Running {
    float most = -INFINITY, sum = 0;
};

// Scores become weights of the keys [begin, end) of `num_keys`, 0 of the others; returns by what former sums change.
template <typename T>
AVX512_BF16 float weigh_block(float* scores, typename T::Value* weights, int64_t begin, int64_t end, int64_t num_keys,
                              float scaling, float softcap, Running& running) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const auto seen = [&](int64_t i, __m512 x) AVX512_BF16 {
        const __m512i places = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(i)));
        const __mmask16 is_seen = _mm512_cmpge_epi32_mask(places, _mm512_set1_epi32(static_cast<int>(begin))) &
                                  _mm512_cmplt_epi32_mask(places, _mm512_set1_epi32(static_cast<int>(end)));
        return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), is_seen, x);
    };
    __m512 largest = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < num_keys; i += LANES) {
        __m512 x = _mm512_loadu_ps(scores + i);
        const bool is_partly_seen = i < begin || i + LANES > end;
        if (softcap > 0) x = bounded(_mm512_mul_ps(x, _mm512_set1_ps(scaling)), softcap);
        if (is_partly_seen) x = seen(i, x);
        if (softcap > 0 || is_partly_seen) _mm512_storeu_ps(scores + i, x);
        largest = _mm512_max_ps(largest, x);
    }
    const float factor = softcap > 0 ? 1.0f : scaling, before = running.most;
    const float most = std::max(before, _mm512_reduce_max_ps(largest) * factor);
    // A block may hold nothing that a row sees: any finite number in the place of its largest gives weights of 0.
    const float shift = most == -INFINITY ? 0.0f : most;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < num_keys; i += LANES) {
        const __m512 e = T::weight(_mm512_loadu_ps(scores + i), factor, shift);
        T::store(weights + i, e);
        sum = _mm512_add_ps(sum, e);
    }
    const float change = before == -INFINITY ? 0.0f : std::exp(before - most);
    running.most = most;
    running.sum = running.sum * change + _mm512_reduce_add_ps(sum);
    return change;
}

// out = softmax(query keys^T) values for the block's rows.
template <typename T>
AVX512_BF16 void attend_block(const Block<T>& block) {
    using Value = typename T::Value;
    static thread_local Room key_room, value_room, sum_room;
    const int64_t dim = block.value_dim, last_row = block.num_rows - 1;
    const int64_t num_tiles = (block.num_rows + TILE_ROWS - 1) / TILE_ROWS;
    int32_t* packed_keys = key_room.of<int32_t>(block.key_dim / T::PAIR * BLOCK_KEYS);
    int32_t* packed_values = value_room.of<int32_t>(BLOCK_KEYS / T::PAIR * dim);
    float* sums = sum_room.of<float>(num_tiles * TILE_ROWS * dim);
    std::fill(sums, sums + num_tiles * TILE_ROWS * dim, 0.0f);
    Running running[BLOCK_ROWS + TILE_ROWS];
    if (block.sinks)  // a key that has a score and no value
        for (int64_t row = 0; row <= last_row; row++) running[row] = {block.sinks[row % block.group], 1.0f};
    alignas(64) float scores[TILE_ROWS * BLOCK_KEYS];
    alignas(64) Value weights[TILE_ROWS * BLOCK_KEYS];
    const int32_t* weight_words[TILE_ROWS];
    for (int64_t m = 0; m < TILE_ROWS; m++)
        weight_words[m] = reinterpret_cast<const int32_t*>(weights + m * BLOCK_KEYS);
    const int64_t stop = block.stop(last_row);
    for (int64_t key = block.first(0); key < stop; key += BLOCK_KEYS) {
        const int64_t num_keys = std::min(BLOCK_KEYS, stop - key);
        const Value *keys = block.keys + key * block.key_row, *values = block.values + key * block.value_row;
        pack_keys<T>(keys, block.key_row, num_keys, block.key_dim, packed_keys);
        const int32_t* value_words = reinterpret_cast<const int32_t*>(values);
        int64_t value_row = block.value_row;
        if constexpr (T::PAIR == 2) {
            pack_values(values, block.value_row, num_keys, dim, packed_values);
            value_words = packed_values;
            value_row = dim;
        }
        for (int64_t tile = 0; tile < num_tiles; tile++) {
            const int64_t row = tile * TILE_ROWS, row_stop = std::min(row + TILE_ROWS, block.num_rows);
            const int64_t seen = std::min(num_keys, block.stop(row_stop - 1) - key);
            if (seen <= 0 || block.first(row) >= key + num_keys) continue;
            const int64_t padded = (seen + LANES - 1) / LANES * LANES;
            const int32_t* queries[TILE_ROWS];  // the last row stands in for those that a last tile lacks
            for (int64_t m = 0; m < TILE_ROWS; m++)
                queries[m] = reinterpret_cast<const int32_t*>(block.query_of(std::min(row + m, last_row)));
            multiply_tile<T>(queries, packed_keys, block.key_dim / T::PAIR, BLOCK_KEYS, scores, BLOCK_KEYS, padded,
                             false);
            for (int64_t m = 0; m < TILE_ROWS; m++) {
                const int64_t r = std::min(row + m, last_row);
                const int64_t begin = std::max<int64_t>(0, block.first(r) - key);
                const int64_t end = std::min(seen, block.stop(r) - key);
                const float change =
                    weigh_block<T>(scores + m * BLOCK_KEYS, weights + m * BLOCK_KEYS, begin, end, padded,
                                   block.scaling, block.softcap, running[row + m]);
                if (change == 1.0f) continue;
                float* of_row = sums + (row + m) * dim;
                for (int64_t d = 0; d < dim; d += LANES)
                    _mm512_storeu_ps(of_row + d, _mm512_mul_ps(_mm512_loadu_ps(of_row + d), _mm512_set1_ps(change)));
            }
            multiply_tile<T>(weight_words, value_words, (seen + T::PAIR - 1) / T::PAIR, value_row, sums + row * dim,
                             dim, dim, true);
        }
    }
    for (int64_t row = 0; row <= last_row; row++) {
        Value* to = block.out + row / block.group * block.out_token + row % block.group * block.out_head;
        const __m512 sum = _mm512_set1_ps(running[row].sum);
        for (int64_t d = 0; d < dim; d += LANES)
            T::store(to + d, _mm512_div_ps(_mm512_loadu_ps(sums + row * dim + d), sum));
    }
}
