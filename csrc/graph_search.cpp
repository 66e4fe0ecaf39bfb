// Implements graph_search.h.
#include "graph_search.h"

#include "ggml-backend.h"

#include <algorithm>
#include <array>

namespace dspark {
namespace {

static_assert(sizeof(Ranked) == 2 * sizeof(int32_t));

void search_rows(ggml_tensor* found, int thread, int n_threads, void*) {
    const ggml_tensor* logits = found->src[0];
    TopRows rows;
    rows.rows = static_cast<const float*>(logits->data);
    rows.row_stride = logits->ne[0] * logits->ne[1]; // (n_values, 1, n_rows), or (1, n_values, n_rows)
    rows.n_values = rows.row_stride;
    rows.n_rows = logits->ne[2];
    rows.k = static_cast<int32_t>(found->ne[0] / 2 - 1);
    rows.names = found->src[1] != nullptr ? static_cast<const int64_t*>(found->src[1]->data) : nullptr;
    rows.out = static_cast<Ranked*>(found->data);
    top_rows(rows, thread, n_threads);
}

bool is_ascending(const ggml_tensor* names) {
    ggml_backend_buffer_t buffer = names->view_src != nullptr ? names->view_src->buffer : names->buffer;
    if (buffer == nullptr || !ggml_backend_buffer_is_host(buffer) || names->type != GGML_TYPE_I64) {
        return false;
    }
    const auto* begin = static_cast<const int64_t*>(names->data);
    return std::is_sorted(begin, begin + ggml_nelements(names));
}

} // namespace

ggml_tensor* append_search(ggml_context* context, ggml_cgraph* graph, ggml_tensor* logits, int32_t k) {
    std::array<ggml_tensor*, 2> sources{ggml_reshape_3d(context, logits, logits->ne[0], 1, logits->ne[1]), nullptr};
    int n_sources = 1;
    // A reduced vocabulary: its own rows, before they are scattered over the target's.
    const ggml_tensor* scattered = logits->src[0];
    if (logits->op == GGML_OP_RESHAPE && scattered->op == GGML_OP_SET_ROWS && is_ascending(scattered->src[1])) {
        sources = {scattered->src[0], scattered->src[1]};
        n_sources = 2;
    }
    ggml_tensor* found = ggml_custom_4d(context, GGML_TYPE_I32, 2 * (int64_t{k} + 1), logits->ne[1], 1, 1,
                                        sources.data(), n_sources, search_rows, GGML_N_TASKS_MAX, nullptr);
    ggml_set_output(found);
    ggml_build_forward_expand(graph, found);
    return found;
}

} // namespace dspark
