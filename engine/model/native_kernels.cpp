// Few rows of bfloat16 times a large weight, for CPUs with AVX512-BF16: int4 weights, bfloat16 ones as they lie in
// memory, and bfloat16 ones as oneDNN packs them.
// Compiled and called by native_kernels.py, which knows whether this machine has a compiler and the instructions.
//
// Why: torch's int4 kernel multiplies in float32 and dequantises anew for every four rows: 85 GFLOP/s on one core, where
// this reaches what vdpbf16ps gives (215), and it reads a weight for one row three times as fast. A code becomes
// bfloat16 by one table look-up: vpermw takes 32 codes from the low bits of 32 words, ignoring the bits above.

#include "native_vectors.h"

namespace {

constexpr int64_t WORDS = 2 * LANES;  // in a register
constexpr int64_t COLUMNS = 8;        // in a register of words: a pair in each of the 4 nibbles
constexpr int MAX_ROWS = 4;           // of x at a time: 4 x 4 accumulators, then the multiplier is the limit
constexpr int MAX_BLOCKS = 4;         // of LANES rows of the weight at a time: a unit, which is read from end to end

struct Int4Call {
    const uint16_t* x;       // bfloat16 [M, K]
    const uint16_t* words;   // units of B blocks, [K / 8, B, 16, 2] each: nibble t of word p of lane n of a block is
                             // column 8 k + 2 t + p of its row n
    const uint16_t* scales;  // bfloat16, units of [groups, B, 16]
    const uint16_t* zeros;   // likewise
    const float* sums;       // [M, groups]: of x over each group's columns
    uint16_t* y;             // bfloat16 [M, N]
    int64_t K, N, groups, group_size;
    __m512i table;           // bfloat16 of code - 8, twice
};

// y of M rows of x from `row`, for the B blocks of a unit that begins at the weight's row `first`.
template <int M, int B>
AVX512_BF16 void int4_tile(const Int4Call& call, int64_t row, int64_t first) {
    const int64_t K = call.K, groups = call.groups;
    const uint16_t* x = call.x + row * K;
    const uint16_t* words = call.words + first * (K / COLUMNS) * (WORDS / LANES);
    const uint16_t* scales = call.scales + first * groups;
    const uint16_t* zeros = call.zeros + first * groups;
    __m512 total[M][B];
    for (int m = 0; m < M; m++)
        for (int b = 0; b < B; b++) total[m][b] = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++) {
        // Of whole codes: the scale and the zero of a group are applied to its sums, in float32.
        __m512 sum[M][B];
        for (int m = 0; m < M; m++)
            for (int b = 0; b < B; b++) sum[m][b] = _mm512_setzero_ps();
        for (int64_t k = g * call.group_size; k < (g + 1) * call.group_size; k += COLUMNS) {
            __m512i packed[B];
            for (int b = 0; b < B; b++, words += WORDS) packed[b] = _mm512_loadu_si512(words);
#pragma GCC unroll 4
            for (int t = 0; t < 4; t++) {
                __m512bh weight[B];
                for (int b = 0; b < B; b++) {
                    weight[b] = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(packed[b], call.table));
                    packed[b] = _mm512_srli_epi16(packed[b], 4);
                }
                for (int m = 0; m < M; m++) {
                    const __m512bh pair = broadcast_pair(x + m * K + k + 2 * t);
                    for (int b = 0; b < B; b++) sum[m][b] = _mm512_dpbf16_ps(sum[m][b], weight[b], pair);
                }
            }
        }
        for (int b = 0; b < B; b++, scales += LANES, zeros += LANES) {
            const __m512 scale = widen(scales), zero = widen(zeros);
            for (int m = 0; m < M; m++) {
                total[m][b] = _mm512_fmadd_ps(sum[m][b], scale, total[m][b]);
                total[m][b] = _mm512_fmadd_ps(zero, _mm512_set1_ps(call.sums[(row + m) * groups + g]), total[m][b]);
            }
        }
    }
    for (int m = 0; m < M; m++)
        for (int b = 0; b < B; b++) {
            uint16_t* out = call.y + (row + m) * call.N + first + b * LANES;
            const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(total[m][b]));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), rounded);
        }
}

template <int B>
AVX512_BF16 void int4_unit(const Int4Call& call, int64_t num_rows, int64_t first) {
    int64_t row = 0;
    for (; num_rows - row >= MAX_ROWS; row += MAX_ROWS) int4_tile<MAX_ROWS, B>(call, row, first);
    switch (num_rows - row) {
        case 3: int4_tile<3, B>(call, row, first); break;
        case 2: int4_tile<2, B>(call, row, first); break;
        case 1: int4_tile<1, B>(call, row, first); break;
    }
}

AVX512_BF16 void sum_groups(const uint16_t* x, int64_t num_groups, int64_t group_size, float* sums) {
    for (int64_t g = 0; g < num_groups; g++) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < group_size; k += LANES) sum = _mm512_add_ps(sum, widen(x + g * group_size + k));
        sums[g] = _mm512_reduce_add_ps(sum);
    }
}

// y of M rows of x for B rows of a bfloat16 weight, in U independent sums each; K is a multiple of 32.
template <int M, int B, int U>
AVX512_BF16 void bf16_tile(const uint16_t* x, const uint16_t* weight, uint16_t* y, int64_t K, int64_t N) {
    constexpr int64_t STEP = 2 * LANES;
    constexpr int FOURS = (M + 3) / 4;
    __m512 sum[B][4 * FOURS][U];
    for (int b = 0; b < B; b++)
        for (int m = 0; m < 4 * FOURS; m++)
            for (int u = 0; u < U; u++) sum[b][m][u] = _mm512_setzero_ps();
    const auto add = [&](int64_t k, int u) __attribute__((always_inline)) AVX512_BF16 {
        __m512bh w[B];
        for (int b = 0; b < B; b++) {
            w[b] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(weight + b * K + k));
            if (B > 1) _mm_prefetch(reinterpret_cast<const char*>(weight + (b + 2 * B) * K + k), _MM_HINT_T0);
        }
        for (int m = 0; m < M; m++) {
            const __m512bh v = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + m * K + k));
            for (int b = 0; b < B; b++) sum[b][m][u] = _mm512_dpbf16_ps(sum[b][m][u], w[b], v);
        }
    };
    int64_t k = 0;
    for (; k + U * STEP <= K; k += U * STEP)
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) add(k + u * STEP, u);
    for (; k < K; k += STEP) add(k, 0);
    for (int b = 0; b < B; b++)
        for (int m = 0; m < 4 * FOURS; m += 4) {
            for (int i = m; i < m + 4; i++)
                for (int u = 1; u < U; u++) sum[b][i][0] = _mm512_add_ps(sum[b][i][0], sum[b][i][u]);
            const __m128 four = sum_lanes(sum[b][m][0], sum[b][m + 1][0], sum[b][m + 2][0], sum[b][m + 3][0]);
            const __m128bh bf16 = _mm_cvtneps_pbh(four);
            uint16_t rounded[8];
            std::memcpy(rounded, &bf16, sizeof rounded);
            for (int i = 0; i < 4 && m + i < M; i++) y[(m + i) * N + b] = rounded[i];
        }
}

AVX512_BF16 void bf16_unit(const uint16_t* x, int64_t num_rows, const uint16_t* w, uint16_t* y, int64_t K, int64_t N) {
    int64_t m = 0;
    for (; num_rows - m >= MAX_ROWS; m += MAX_ROWS) bf16_tile<MAX_ROWS, 4, 1>(x + m * K, w, y + m * N, K, N);
    if (num_rows - m == 3) {
        bf16_tile<3, 4, 1>(x + m * K, w, y + m * N, K, N);
        return;
    }
    // One or two rows of x: only the memory counts, and it streams best from one row of the weight, nothing fetched
    // ahead: four rows at a time took twice as long.
    for (int b = 0; b < 4; b++) {
        if (num_rows - m == 2) bf16_tile<2, 1, 4>(x + m * K, w + b * K, y + m * N + b, K, N);
        if (num_rows - m == 1) bf16_tile<1, 1, 4>(x + m * K, w + b * K, y + m * N + b, K, N);
    }
}

struct PackedCall {
    const uint16_t* x;        // bfloat16 [M, K], K even
    const uint16_t* weight;   // bfloat16 [N / 64, padded K / 2, 64, 2], with zeros beyond N and K
    const uint16_t* bias;     // bfloat16 [N] or null
    uint16_t* y;              // bfloat16 [M, N]
    int64_t M, N, K, padded_K;
};

constexpr int64_t UNIT = 64, HALF = UNIT / 2;
constexpr int PACKED_ROWS = 6;  // of x at a time: 6 x 4 accumulators of 32 registers

// y of M rows of x from `row`, for B blocks of LANES rows of the weight from `first`. Nothing is fetched ahead: the
// weight is one stream, and the processor's own prefetching reads it faster alone (24 GB/s on one core, 20 with ours).
template <int M, int B>
AVX512_BF16 void packed_tile(const PackedCall& call, int64_t row, int64_t first) {
    const int64_t K = call.K, N = call.N;
    const uint16_t* x = call.x + row * K;
    const uint16_t* weight = call.weight + first / UNIT * UNIT * call.padded_K + first % UNIT * 2;
    __m512 sum[M][B];
    for (int m = 0; m < M; m++)
        for (int b = 0; b < B; b++) sum[m][b] = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int64_t k = 0; k < K; k += 2, weight += 2 * UNIT) {
        __m512bh w[B];
        for (int b = 0; b < B; b++) w[b] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(weight + b * 2 * LANES));
        for (int m = 0; m < M; m++) {
            const __m512bh pair = broadcast_pair(x + m * K + k);
            for (int b = 0; b < B; b++) sum[m][b] = _mm512_dpbf16_ps(sum[m][b], w[b], pair);
        }
    }
    for (int b = 0; b < B; b++) {
        const int64_t column = first + b * LANES, left = N - column;
        if (left <= 0) return;
        const __mmask16 mask = left >= LANES ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
        __m512 bias = _mm512_setzero_ps();
        if (call.bias) {
            const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, call.bias + column));
            bias = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
        }
        for (int m = 0; m < M; m++) {
            const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_add_ps(sum[m][b], bias));
            _mm256_mask_storeu_epi16(call.y + (row + m) * N + column, mask, reinterpret_cast<__m256i>(rounded));
        }
    }
}

// All rows of x for B blocks of a unit, in tiles of about the same number of rows.
template <int B>
AVX512_BF16 void packed_unit(const PackedCall& call, int64_t first) {
    const int64_t num_tiles = (call.M + PACKED_ROWS - 1) / PACKED_ROWS;
    for (int64_t tile = 0, row = 0; tile < num_tiles; tile++) {
        const int64_t stop = call.M * (tile + 1) / num_tiles;
        switch (stop - row) {
            case 6: packed_tile<6, B>(call, row, first); break;
            case 5: packed_tile<5, B>(call, row, first); break;
            case 4: packed_tile<4, B>(call, row, first); break;
            case 3: packed_tile<3, B>(call, row, first); break;
            case 2: packed_tile<2, B>(call, row, first); break;
            case 1: packed_tile<1, B>(call, row, first); break;
        }
        row = stop;
    }
}

}  // namespace

// Whether this CPU has the instructions; everything else here may be called only if so.
extern "C" int has_instructions() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

// y = x W^T with W in int4, laid out as Int4Call says; `sums` [M, K / group_size] is room to work in.
extern "C" AVX512_BF16 void int4_multiply(const uint16_t* x, const uint16_t* words, const uint16_t* scales,
                                          const uint16_t* zeros, float* sums, uint16_t* y, int64_t M, int64_t N,
                                          int64_t K, int64_t group_size, int64_t num_threads) {
    alignas(64) uint16_t values[2 * LANES];
    for (int i = 0; i < 2 * LANES; i++) {
        const float value = static_cast<float>((i & 15) - 8);
        std::memcpy(&values[i], reinterpret_cast<const char*>(&value) + 2, 2);
    }
    const int64_t groups = K / group_size, num_blocks = N / LANES;
    const Int4Call call{x, words, scales, zeros, sums, y, K, N, groups, group_size, _mm512_load_si512(values)};
    sum_groups(x, M * groups, group_size, sums);
    const int64_t num_units = (num_blocks + MAX_BLOCKS - 1) / MAX_BLOCKS;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1) schedule(static)
    for (int64_t unit = 0; unit < num_units; unit++) {
        const int64_t block = unit * MAX_BLOCKS;
        switch (std::min<int64_t>(MAX_BLOCKS, num_blocks - block)) {
            case 4: int4_unit<4>(call, M, block * LANES); break;
            case 3: int4_unit<3>(call, M, block * LANES); break;
            case 2: int4_unit<2>(call, M, block * LANES); break;
            case 1: int4_unit<1>(call, M, block * LANES); break;
        }
    }
}

// y = x W^T with W bfloat16 [N, K]; N is a multiple of 4.
extern "C" AVX512_BF16 void bf16_multiply(const uint16_t* x, const uint16_t* weight, uint16_t* y, int64_t M, int64_t N,
                                          int64_t K, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1) schedule(static)
    for (int64_t n = 0; n < N; n += 4) bf16_unit(x, M, weight + n * K, y + n, K, N);
}

// y = x W^T + bias with W as oneDNN packs it, laid out as PackedCall says. Threads share half units: 9 units of a weight
// of 576 rows would leave one of two threads idle for a tenth of the time.
extern "C" AVX512_BF16 void packed_multiply(const uint16_t* x, const uint16_t* weight, const uint16_t* bias, uint16_t* y,
                                            int64_t M, int64_t N, int64_t K, int64_t padded_K, int64_t num_threads) {
    const PackedCall call{x, weight, bias, y, M, N, K, padded_K};
    const int64_t num_halves = (N + HALF - 1) / HALF;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1) schedule(static)
    for (int64_t thread = 0; thread < num_threads; thread++) {
        int64_t half = num_halves * thread / num_threads;
        const int64_t stop = num_halves * (thread + 1) / num_threads;
        while (half < stop) {
            const bool is_whole = half % 2 == 0 && half + 1 < stop;
            is_whole ? packed_unit<4>(call, half * HALF) : packed_unit<2>(call, half * HALF);
            half += is_whole ? 2 : 1;
        }
    }
}
