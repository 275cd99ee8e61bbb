// What native_attention.cpp is asked, and by whom: native_kernels.py lays out Step, native_shims.cpp makes the calls.

#pragma once

#include <cstdint>

// New tokens of one sequence, side by side in the step.
struct StepRun {
    const int64_t* pointers;  // [layers, 2]: where the arena's K and V of each layer begin, as numbers
    int64_t slot, capacity;
    int64_t length;              // keys that the last token sees when all of the run's have joined them
    int64_t first, num_tokens;  // of the step's tokens
};

struct Step {
    int64_t num_runs, num_tokens, num_layers, num_threads;
    const StepRun* runs;
};

struct Strided {
    const void* data;
    int64_t head_stride, row_stride;  // in values, which lie one after the other
};

struct AttentionCall {
    Strided query, key, value;
    const float* sinks;  // [heads] or null
    void* out;           // [tokens, heads, value_dim]
    int64_t is_bf16;     // or float32
    int64_t num_tokens, num_heads, num_kv_heads, key_dim, value_dim, layer, window;  // 0 for no window
    float scaling, softcap;                                                        // 0 for no softcap
};

// Attention of a step's tokens over what other runs of K and V hold and all of them see, which nothing joins: their
// sources. `step` says where; false where it is another's.
bool attend_sources(const AttentionCall& call, const Step& step);

// Attention of the current step's tokens; false where there is none or it is another. Those behind it become zeros.
bool attend_slots(const AttentionCall& call);

// Attention of whole sequences, each over itself, where every position sees every other.
struct WholeCall {
    Strided query, key, value;
    int64_t query_batch, key_batch, value_batch;  // strides of sequences
    void* out;                                    // [sequences, positions, heads, value_dim]
    int64_t is_bf16;
    int64_t num_sequences, num_positions, num_heads, num_kv_heads, key_dim, value_dim, num_threads;
    float scaling;
};

void attend_whole(const WholeCall& call);
