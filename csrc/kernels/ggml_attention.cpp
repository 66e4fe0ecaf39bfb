// Takes the place of ggml's flash attention on the CPU (renamed to ggml_upstream_flash_attn_ext in its own file by
// cmake/llama.cmake), which goes on with what ours does not cover: other types of cache than f16, ALiBi, soft caps,
// sinks, several streams. Compiled as a part of ggml-cpu.
#include "kernels/attention.h"
#include "kernels/kernels.h"

#include "ggml-cpu-impl.h"
#include "ggml.h"

extern "C" void ggml_upstream_flash_attn_ext(const ggml_compute_params* params, ggml_tensor* dst);

namespace {

using dspark::kernels::Attention;

float parameter(const ggml_tensor* dst, size_t i) {
    float value;
    __builtin_memcpy(&value, dst->op_params + i, sizeof(value));
    return value;
}

bool is_covered(const ggml_tensor* dst) {
    const ggml_tensor* q = dst->src[0];
    const ggml_tensor* k = dst->src[1];
    const ggml_tensor* v = dst->src[2];
    const ggml_tensor* mask = dst->src[3];
    const bool has_types = q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16;
    const bool is_packed = q->nb[0] == sizeof(float) && k->nb[0] == sizeof(uint16_t) && v->nb[0] == sizeof(uint16_t);
    const bool is_one_stream = q->ne[3] == 1 && k->ne[3] == 1 && v->ne[3] == 1 && k->ne[2] == v->ne[2];
    const bool is_plain_mask = mask == nullptr || (mask->type == GGML_TYPE_F16 && mask->ne[2] == 1 && mask->ne[3] == 1);
    const bool is_plain = parameter(dst, 1) == 0.0F && parameter(dst, 2) == 0.0F && dst->src[4] == nullptr;
    return has_types && is_packed && is_one_stream && is_plain_mask && is_plain;
}

// q: (n_tokens, n_heads), k and v: (n_kv_heads, n_cells), all in units of heads, outermost first and permuted freely.
Attention describe(const ggml_compute_params* params, const ggml_tensor* dst) {
    const ggml_tensor* q = dst->src[0];
    const ggml_tensor* k = dst->src[1];
    const ggml_tensor* v = dst->src[2];
    const ggml_tensor* mask = dst->src[3];
    Attention a;
    a.n_tokens = q->ne[1];
    a.n_heads = q->ne[2];
    a.n_kv_heads = k->ne[2];
    a.n_cells = k->ne[1];
    a.key_size = k->ne[0];
    a.value_size = v->ne[0];
    a.scale = parameter(dst, 0);
    a.q = static_cast<const float*>(q->data);
    a.q_token_stride = static_cast<int64_t>(q->nb[1] / sizeof(float));
    a.q_head_stride = static_cast<int64_t>(q->nb[2] / sizeof(float));
    a.k = k->data;
    a.k_cell_stride = k->nb[1];
    a.k_head_stride = k->nb[2];
    a.v = v->data;
    a.v_cell_stride = v->nb[1];
    a.v_head_stride = v->nb[2];
    if (mask != nullptr) {
        a.mask = static_cast<const uint16_t*>(mask->data);
        a.mask_stride = static_cast<int64_t>(mask->nb[1] / sizeof(uint16_t));
    }
    a.y = static_cast<float*>(dst->data);
    a.thread = params->ith;
    a.n_threads = params->nth;
    return a;
}

} // namespace

extern "C" void ggml_compute_forward_flash_attn_ext(const ggml_compute_params* params, ggml_tensor* dst) {
    if (!params->use_ref && dspark::kernels::is_enabled() && is_covered(dst) &&
        dspark::kernels::attend(describe(params, dst))) {
        return;
    }
    if (params->ith == 0) {
        dspark::kernels::count_foreign_attention();
    }
    ggml_upstream_flash_attn_ext(params, dst);
}
