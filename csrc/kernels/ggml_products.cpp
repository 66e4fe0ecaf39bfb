// How a group of products is computed, by every thread.
#include "kernels/ggml_groups.h"

#include "ggml-impl.h"
#include "vec.h"

#include <algorithm>

namespace dspark::kernels {
namespace {

// columns[at]: prepared by this thread, its part of them or all.
void prepare_columns(const ProductGroup& group, int thread, int n_threads, int32_t* columns) {
    for (int i = 0; i < group.n_products; ++i) {
        const bool is_first =
            std::find(group.columns_at, group.columns_at + i, group.columns_at[i]) == group.columns_at + i;
        if (is_first) {
            prepare(*describe_product(group.products[i], thread, n_threads), columns + group.columns_at[i]);
        }
    }
}

const float* row_of(const ggml_tensor* tensor, int64_t row) {
    return reinterpret_cast<const float*>(static_cast<const char*>(tensor->data) +
                                          static_cast<size_t>(row) * tensor->nb[1]);
}

// Some outputs of an addition or of SwiGLU. In whole vectors but at the end of a row, as ggml computes it by rows.
void compute_outputs(ggml_tensor* dst, Outputs outputs) {
    const int64_t n = outputs.last - outputs.first;
    for (int64_t row = 0; row < ggml_nrows(dst); ++row) {
        const float* a = row_of(dst->src[0], row) + outputs.first;
        const float* b = row_of(dst->src[1], row) + outputs.first;
        float* y = const_cast<float*>(row_of(dst, row)) + outputs.first;
        if (dst->op == GGML_OP_GLU) {
            ggml_vec_swiglu_f32(static_cast<int>(n), y, a, b);
            continue;
        }
        for (int64_t i = 0; i < n; ++i) {
            y[i] = a[i] + b[i];
        }
    }
}

} // namespace

std::optional<WeightType> weight_type(int type) {
    switch (type) {
    case GGML_TYPE_Q8_0:
        return WeightType::q8_0;
    case GGML_TYPE_Q4_0:
        return WeightType::q4_0;
    case GGML_TYPE_IQ4_NL:
        return WeightType::iq4_nl;
    case GGML_TYPE_Q4_K:
        return WeightType::q4_k;
    case GGML_TYPE_Q5_K:
        return WeightType::q5_k;
    case GGML_TYPE_Q6_K:
        return WeightType::q6_k;
    case GGML_TYPE_F16:
        return WeightType::f16;
    case GGML_TYPE_BF16:
        return WeightType::bf16;
    default:
        return std::nullopt;
    }
}

std::optional<Product> describe_product(const ggml_tensor* dst, int thread, int n_threads) {
    const ggml_tensor* w = dst->src[0];
    const ggml_tensor* x = dst->src[1];
    const auto type = weight_type(w->type);
    const bool are_matrices = w->ne[2] == 1 && w->ne[3] == 1 && x->ne[2] == 1 && x->ne[3] == 1;
    const bool has_hint = ggml_get_op_params_i32(dst, 1) != 0; // of another algorithm
    if (!type || !are_matrices || has_hint || w->extra != nullptr || w->nb[0] != ggml_type_size(w->type) ||
        x->type != GGML_TYPE_F32 || !ggml_is_contiguous(x) || dst->type != GGML_TYPE_F32 || !ggml_is_contiguous(dst)) {
        return std::nullopt;
    }
    Product product;
    product.type = *type;
    product.n_outputs = w->ne[1];
    product.n_values = w->ne[0];
    product.n_columns = x->ne[1];
    product.weights = w->data;
    product.weight_stride = w->nb[1];
    product.x = static_cast<const float*>(x->data);
    product.x_stride = x->ne[0];
    product.y = static_cast<float*>(dst->data);
    product.y_stride = dst->ne[0];
    product.thread = thread;
    product.n_threads = n_threads;
    return product;
}

void compute_group(const ggml_compute_params& params, const ProductGroup& group) {
    thread_local std::vector<int32_t> own;
    int32_t* columns = group.prepared;
    if (group.is_shared || params.nth == 1) {
        prepare_columns(group, params.ith, params.nth, columns);
        ggml_barrier(params.threadpool);
    } else {
        own.resize(std::max(own.size(), group.n_prepared));
        columns = own.data();
        prepare_columns(group, 0, 1, columns);
    }
    for (int i = 0; i < group.n_products; ++i) {
        multiply_prepared(*describe_product(group.products[i], params.ith, params.nth), columns + group.columns_at[i]);
    }
    if (group.next != nullptr) {
        compute_outputs(group.next, outputs_of(*describe_product(group.products[0], params.ith, params.nth)));
    }
}

} // namespace dspark::kernels
