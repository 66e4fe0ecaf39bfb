// Takes the place of ggml's llamafile_sgemm (renamed to ggml_llamafile_sgemm in its own file by cmake/llama.cmake),
// which ggml-cpu calls in every thread for every matrix product: once with the columns as floats, and when that is
// refused once more with the columns quantized to the type's partner. We take the first call and quantize ourselves,
// so that a product needs no barrier. Products of plain matrices come in groups (ggml_groups.h), by the hook of the
// tiled path, which is called before. Compiled as a part of ggml-cpu.
#include "kernels/ggml_groups.h"
#include "kernels/grouped_nodes.h"

#include "ggml-cpu.h"
#include "ggml-impl.h"

extern "C" bool ggml_llamafile_sgemm(const ggml_compute_params* params, int64_t m, int64_t n, int64_t k, const void* a,
                                     int64_t lda, const void* b, int64_t ldb, void* c, int64_t ldc, int a_type,
                                     int b_type, int c_type);

extern "C" bool ggml_upstream_mul_mat_tiled(const ggml_compute_params* params, ggml_tensor* dst);

using dspark::kernels::Product;
using dspark::kernels::weight_type;

extern "C" bool ggml_compute_forward_mul_mat_tiled(const ggml_compute_params* params, ggml_tensor* dst) {
    if (const auto* group = dspark::kernels::group_of(dst)) {
        dspark::kernels::compute_group(*params, *group);
        return true;
    }
    const auto type = weight_type(dst->src[0]->type);
    const bool is_ours = type && dspark::kernels::is_enabled() && dspark::kernels::covers(*type) &&
                         dst->src[1]->type == GGML_TYPE_F32 && ggml_is_contiguous(dst->src[1]);
    return !is_ours && ggml_upstream_mul_mat_tiled(params, dst);
}

// What the CPU backend calls for a graph in place of ggml_graph_compute.
extern "C" ggml_status dspark_graph_compute(ggml_cgraph* graph, ggml_cplan* plan) {
    if (!dspark::kernels::is_enabled() || !dspark::kernels::are_groups_enabled() || plan->use_ref) {
        return ggml_graph_compute(graph, plan);
    }
    thread_local dspark::kernels::GroupedGraph grouped;
    grouped.build(*graph, plan->n_threads);
    ggml_cgraph left = *graph;
    left.nodes = grouped.nodes.data();
    left.n_nodes = static_cast<int>(grouped.nodes.size());
    dspark::kernels::note_grouped_nodes(graph->n_nodes - left.n_nodes);
    grouped.mark();
    const ggml_status status = ggml_graph_compute(&left, plan);
    grouped.unmark();
    return status;
}

// m outputs, n columns, k blocks of a row; strides count blocks (a) and elements (b, c).
extern "C" bool llamafile_sgemm(const ggml_compute_params* params, int64_t m, int64_t n, int64_t k, const void* a,
                                int64_t lda, const void* b, int64_t ldb, void* c, int64_t ldc, int a_type, int b_type,
                                int c_type) {
    const auto type = weight_type(a_type);
    if (type && b_type == GGML_TYPE_F32 && c_type == GGML_TYPE_F32 && dspark::kernels::is_enabled()) {
        Product product;
        product.type = *type;
        product.n_outputs = m;
        product.n_columns = n;
        product.n_values = k * ggml_blck_size(static_cast<ggml_type>(a_type));
        product.weights = a;
        product.weight_stride = static_cast<size_t>(lda) * ggml_type_size(static_cast<ggml_type>(a_type));
        product.x = static_cast<const float*>(b);
        product.x_stride = ldb;
        product.y = static_cast<float*>(c);
        product.y_stride = ldc;
        product.thread = params->ith;
        product.n_threads = params->nth;
        if (dspark::kernels::multiply(product)) {
            return true;
        }
    }
    return ggml_llamafile_sgemm(params, m, n, k, a, lda, b, ldb, c, ldc, a_type, b_type, c_type);
}
