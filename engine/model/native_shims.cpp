// The native kernels as torch's tensors see them through its C interface: what code made by AOTInductor calls, without
// a way through Python or torch's dispatcher. Their schemas and twins are in operators.py, their declarations for the
// compiler in native_kernels.py.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <vector>

#include "native_attention.h"

extern "C" void packed_multiply(const uint16_t*, const uint16_t*, const uint16_t*, uint16_t*, int64_t, int64_t, int64_t,
                                int64_t, int64_t);
extern "C" void int4_multiply(const uint16_t*, const uint16_t*, const uint16_t*, const uint16_t*, float*, uint16_t*,
                              int64_t, int64_t, int64_t, int64_t, int64_t);
extern "C" void bf16_multiply(const uint16_t*, const uint16_t*, uint16_t*, int64_t, int64_t, int64_t, int64_t);

namespace {

constexpr AOTITorchError FAILED = AOTI_TORCH_FAILURE;
int64_t num_threads = 1;

template <typename T>
T* data_of(AtenTensorHandle tensor) {
    void* data = nullptr;
    aoti_torch_get_data_ptr(tensor, &data);
    return static_cast<T*>(data);
}

struct Shape {
    int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
    explicit Shape(AtenTensorHandle tensor) {
        aoti_torch_get_dim(tensor, &dim);
        aoti_torch_get_sizes(tensor, &sizes);
        aoti_torch_get_strides(tensor, &strides);
    }
    int64_t last() const { return sizes[dim - 1]; }
    int64_t num_rows() const {
        int64_t count = 1;
        for (int64_t i = 0; i + 1 < dim; i++) count *= sizes[i];
        return count;
    }
    bool is_contiguous() const {
        int64_t step = 1;
        for (int64_t i = dim - 1; i >= 0; i--) {
            if (sizes[i] != 1 && strides[i] != step) return false;
            step *= sizes[i];
        }
        return true;
    }
};

AOTITorchError make(const std::vector<int64_t>& sizes, int32_t dtype, AtenTensorHandle* made) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size(); i > 1; i--) strides[i - 2] = strides[i - 1] * sizes[i - 1];
    return aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0,
                                    made);
}

// Room for x W^T: x's sizes with another last one.
AOTITorchError make_rows(const Shape& x, int64_t num_outputs, AtenTensorHandle* made) {
    std::vector<int64_t> sizes(x.sizes, x.sizes + x.dim);
    sizes.back() = num_outputs;
    return make(sizes, aoti_torch_dtype_bfloat16(), made);
}

Strided strided(AtenTensorHandle tensor, const Shape& shape) {  // of [B, H, T, D]
    return {data_of<void>(tensor), shape.strides[1], shape.strides[2]};
}

bool is_bf16(AtenTensorHandle tensor) {
    int32_t dtype = 0;
    aoti_torch_get_dtype(tensor, &dtype);
    return dtype == aoti_torch_dtype_bfloat16();
}

}  // namespace

// How many threads these functions use.
extern "C" void set_num_threads(int64_t count) { num_threads = count; }

extern "C" AOTITorchError aoti_torch_cpu_packed_rows(AtenTensorHandle x, AtenTensorHandle words, AtenTensorHandle* bias,
                                                     int64_t num_outputs, AtenTensorHandle* made) {
    const Shape in(x), weight(words);  // words: [units, padded K / 2, 64, 2]
    if (!in.is_contiguous() || !is_bf16(x) || in.last() > 2 * weight.sizes[1]) return FAILED;
    if (const auto error = make_rows(in, num_outputs, made)) return error;
    packed_multiply(data_of<uint16_t>(x), data_of<uint16_t>(words), bias ? data_of<uint16_t>(*bias) : nullptr,
                    data_of<uint16_t>(*made), in.num_rows(), num_outputs, in.last(), 2 * weight.sizes[1], num_threads);
    return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError aoti_torch_cpu_plain_rows(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* made) {
    const Shape in(x), plain(weight);
    if (!in.is_contiguous() || !is_bf16(x) || !plain.is_contiguous() || in.last() != plain.last()) return FAILED;
    if (const auto error = make_rows(in, plain.sizes[0], made)) return error;
    bf16_multiply(data_of<uint16_t>(x), data_of<uint16_t>(weight), data_of<uint16_t>(*made), in.num_rows(),
                  plain.sizes[0], in.last(), num_threads);
    return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError aoti_torch_cpu_int4_multiply(AtenTensorHandle x, AtenTensorHandle words, AtenTensorHandle scales,
                                                       AtenTensorHandle zeros, int64_t num_outputs,
                                                       AtenTensorHandle* made) {
    const Shape in(x);
    int64_t num_scales = 0, num_words = 0;
    aoti_torch_get_numel(scales, &num_scales);
    aoti_torch_get_numel(words, &num_words);
    if (!in.is_contiguous() || !is_bf16(x) || 4 * num_words != in.last() * num_outputs) return FAILED;
    if (const auto error = make_rows(in, num_outputs, made)) return error;
    const int64_t num_groups = num_scales / num_outputs;
    static thread_local std::vector<float> sums;
    sums.resize(std::max<size_t>(sums.size(), in.num_rows() * num_groups));
    int4_multiply(data_of<uint16_t>(x), data_of<uint16_t>(words), data_of<uint16_t>(scales), data_of<uint16_t>(zeros),
                  sums.data(), data_of<uint16_t>(*made), in.num_rows(), num_outputs, in.last(),
                  in.last() / num_groups, num_threads);
    return AOTI_TORCH_SUCCESS;
}

// query [1, H, T, Dk], key and value [1, Hkv, T, D] of any strides but the last: [1, T, H, Dv].
extern "C" AOTITorchError aoti_torch_cpu_attend_slots(AtenTensorHandle query, AtenTensorHandle key,
                                                      AtenTensorHandle value, AtenTensorHandle* sinks, int64_t layer,
                                                      double scaling, int64_t window, double softcap,
                                                      AtenTensorHandle* made) {
    const Shape q(query), k(key), v(value);
    const int64_t num_tokens = q.sizes[2], num_heads = q.sizes[1];
    if (q.strides[3] != 1 || k.strides[3] != 1 || v.strides[3] != 1) return FAILED;
    int32_t dtype = 0;
    aoti_torch_get_dtype(query, &dtype);
    if (const auto error = make({1, num_tokens, num_heads, v.last()}, dtype, made)) return error;
    const AttentionCall call{
        strided(query, q), strided(key, k), strided(value, v),
        sinks ? data_of<float>(*sinks) : nullptr,
        data_of<void>(*made),
        is_bf16(query),
        num_tokens, num_heads, k.sizes[1], k.last(), v.last(), layer, window,
        static_cast<float>(scaling), static_cast<float>(softcap),
    };
    return attend_slots(call) ? AOTI_TORCH_SUCCESS : FAILED;
}

// query [B, H, L, Dk], key and value [B, Hkv, L, D] of any strides but the last: [B, L, H, Dv].
extern "C" AOTITorchError aoti_torch_cpu_attend_positions(AtenTensorHandle query, AtenTensorHandle key,
                                                          AtenTensorHandle value, double scaling,
                                                          AtenTensorHandle* made) {
    const Shape q(query), k(key), v(value);
    if (q.strides[3] != 1 || k.strides[3] != 1 || v.strides[3] != 1) return FAILED;
    int32_t dtype = 0;
    aoti_torch_get_dtype(query, &dtype);
    if (const auto error = make({q.sizes[0], q.sizes[2], q.sizes[1], v.last()}, dtype, made)) return error;
    attend_whole({
        strided(query, q), strided(key, k), strided(value, v),
        q.strides[0], k.strides[0], v.strides[0],
        data_of<void>(*made),
        is_bf16(query),
        q.sizes[0], q.sizes[2], q.sizes[1], k.sizes[1], k.last(), v.last(), num_threads,
        static_cast<float>(scaling),
    });
    return AOTI_TORCH_SUCCESS;
}
