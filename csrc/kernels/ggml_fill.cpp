// ggml's fill of a whole tensor in place of its row by row one. A drafter with a reduced vocabulary fills a tensor of
// rows of one value, (1, V, rows), with -inf before its logits are scattered: a call for each of a million values,
// which took a third of a draft at V = 152k (0.6B shape, one thread). The tree's stays, renamed, for what is not
// contiguous.
#include "ggml-cpu-impl.h"

#include <algorithm>
#include <cstring>

extern "C" void ggml_upstream_fill(const ggml_compute_params* params, ggml_tensor* dst);

extern "C" void ggml_compute_forward_fill(const ggml_compute_params* params, ggml_tensor* dst) {
    if (dst->type != GGML_TYPE_F32 || !ggml_is_contiguous(dst)) {
        ggml_upstream_fill(params, dst);
        return;
    }
    float value = 0;
    std::memcpy(&value, dst->op_params, sizeof(value));
    const int64_t n = ggml_nelements(dst);
    const int64_t share = (n + params->nth - 1) / params->nth;
    const int64_t begin = std::min(n, share * params->ith);
    const int64_t end = std::min(n, begin + share);
    auto* values = static_cast<float*>(dst->data);
    std::fill(values + begin, values + end, value);
}
