// What native_attention.cpp is asked, and by whom: native_kernels.py lays out Step, native_shims.cpp makes the calls.

#pragma once

#include <cstdint>

struct StepRow {
    const int64_t* pointers;  // [layers, 2]: where the arena's K and V of each layer begin, as numbers
    int64_t slot, capacity;
    int64_t length;  // keys that the row sees when its own has joined them
};

struct Step {
    int64_t num_rows, num_layers, num_threads;
    const StepRow* rows;
};

struct Strided {
    const void* data;
    int64_t head_stride, row_stride;  // in values, which lie one after the other
};

struct AttentionCall {
    Strided query, key, value;
    const float* sinks;  // [heads] or null
    void* out;           // [rows, heads, value_dim]
    int64_t is_bf16;     // or float32
    int64_t num_rows, num_heads, num_kv_heads, key_dim, value_dim, layer, window;  // 0 for no window
    float scaling, softcap;                                                        // 0 for no softcap
};

// Attention of the current step's rows; false where there is none or it is another. Rows behind its own become zeros.
bool attend_slots(const AttentionCall& call);
