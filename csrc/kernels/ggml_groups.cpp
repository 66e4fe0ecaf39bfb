// What may be grouped. ggml's allocator has given the memory of dead tensors to later ones, in the order of the graph:
// whatever is computed earlier than there must not meet memory that is still in use.
#include "kernels/ggml_groups.h"

#include "ggml-impl.h"

#include <algorithm>

namespace dspark::kernels {
namespace {

constexpr int kLookahead = 24; // nodes in which other products of the same X are sought

// Values that each thread is spared, from which on a barrier is worth it: 3 us where 2.9 of them take a nanosecond.
constexpr int64_t kSharedValues = 8192;

bool is_computed(const ggml_tensor* node) {
    return !ggml_op_is_empty(node->op) && (node->flags & GGML_TENSOR_FLAG_COMPUTE) != 0;
}

bool overlap(const ggml_tensor* a, const ggml_tensor* b) {
    const auto* begin_a = static_cast<const char*>(a->data);
    const auto* begin_b = static_cast<const char*>(b->data);
    return begin_a < begin_b + ggml_nbytes(b) && begin_b < begin_a + ggml_nbytes(a);
}

bool overlaps_sources(const ggml_tensor* dst, const ggml_tensor* node) {
    return std::any_of(node->src, node->src + GGML_MAX_SRC,
                       [&](const ggml_tensor* source) { return source != nullptr && overlap(dst, source); });
}

// Whether either writes what the other one reads or writes.
bool are_in_conflict(const ggml_tensor* a, const ggml_tensor* b) {
    return overlap(a, b) || overlaps_sources(a, b) || overlaps_sources(b, a);
}

bool is_groupable(const ggml_tensor* node) {
    if (!is_computed(node) || node->op != GGML_OP_MUL_MAT || node->extra != nullptr) {
        return false;
    }
    const auto type = weight_type(node->src[0]->type);
    return type && can_prepare(*type) && describe_product(node, 0, 1);
}

// Whether the node at `from` can be computed where that at `to` stands.
bool can_move(const ggml_cgraph& graph, int from, int to) {
    return std::none_of(graph.nodes + to, graph.nodes + from, [&](const ggml_tensor* before) {
        return is_computed(before) && are_in_conflict(graph.nodes[from], before);
    });
}

bool is_plain(const ggml_tensor* tensor) { return tensor->type == GGML_TYPE_F32 && ggml_is_contiguous(tensor); }

// A part of a's memory is b's, other than all of it in the same order.
bool overlap_crosswise(const ggml_tensor* a, const ggml_tensor* b) { return a->data != b->data && overlap(a, b); }

// Whether `node` can be computed output by output right behind the products.
bool is_by_outputs(const ggml_tensor* node, const ProductGroup& group) {
    const bool is_add = node->op == GGML_OP_ADD && group.n_products == 1;
    const bool is_glu = node->op == GGML_OP_GLU && ggml_get_glu_op(node) == GGML_GLU_OP_SWIGLU && group.n_products == 2;
    if ((!is_add && !is_glu) || node->src[1] == nullptr || !is_plain(node)) {
        return false;
    }
    const auto* end = group.products + group.n_products;
    const bool uses_all = std::all_of(group.products, end, [&](const ggml_tensor* product) {
        return node->src[0] == product || node->src[1] == product;
    });
    return uses_all && std::all_of(node->src, node->src + 2, [&](const ggml_tensor* source) {
               return is_plain(source) && ggml_are_same_shape(source, node) && !overlap_crosswise(node, source);
           });
}

} // namespace

void GroupedGraph::build(const ggml_cgraph& graph, int n_threads) {
    groups_.clear();
    nodes.clear();
    is_taken_.assign(static_cast<size_t>(graph.n_nodes), 0);
    for (int i = 0; i < graph.n_nodes; ++i) {
        if (is_taken_[static_cast<size_t>(i)]) {
            continue;
        }
        nodes.push_back(graph.nodes[i]);
        if (is_groupable(graph.nodes[i])) {
            ProductGroup& group = groups_.emplace_back();
            add_products(graph, i, group);
            place_columns(group, n_threads);
        }
    }
    size_t n_prepared = 0;
    for (const ProductGroup& group : groups_) {
        n_prepared = std::max(n_prepared, group.n_prepared);
    }
    prepared_.resize(std::max(n_prepared, prepared_.size()));
}

// The product at `first` and those behind it that can be computed in its place, then what follows them.
void GroupedGraph::add_products(const ggml_cgraph& graph, int first, ProductGroup& group) {
    group.products[group.n_products++] = graph.nodes[first];
    int last = first;
    const int end = std::min(graph.n_nodes, first + kLookahead);
    for (int i = first + 1; i < end && group.n_products < kGroupProducts; ++i) {
        ggml_tensor* node = graph.nodes[i];
        if (node->src[1] == graph.nodes[first]->src[1] && !is_taken_[static_cast<size_t>(i)] && is_groupable(node) &&
            can_move(graph, i, first)) {
            group.products[group.n_products++] = node;
            is_taken_[static_cast<size_t>(i)] = 1;
            last = i;
        }
    }
    add_next(graph, first, last, group);
}

// Where other nodes stand between the products, what follows the last one has to stay behind them.
void GroupedGraph::add_next(const ggml_cgraph& graph, int first, int last, ProductGroup& group) {
    for (int i = first + 1; i < last; ++i) {
        if (is_computed(graph.nodes[i]) && !is_taken_[static_cast<size_t>(i)]) {
            return;
        }
    }
    int i = last + 1;
    while (i < graph.n_nodes && !is_computed(graph.nodes[i])) {
        ++i;
    }
    if (i < graph.n_nodes && !is_taken_[static_cast<size_t>(i)] && is_by_outputs(graph.nodes[i], group)) {
        group.next = graph.nodes[i];
        is_taken_[static_cast<size_t>(i)] = 1;
    }
}

void GroupedGraph::place_columns(ProductGroup& group, int n_threads) {
    std::optional<Product> one;
    for (int i = 0; i < group.n_products; ++i) {
        one = describe_product(group.products[i], 0, n_threads);
        group.columns_at[i] = group.n_prepared;
        for (int before = 0; before < i; ++before) {
            if (have_same_columns(*weight_type(group.products[before]->src[0]->type), one->type)) {
                group.columns_at[i] = group.columns_at[before];
            }
        }
        group.n_prepared += group.columns_at[i] == group.n_prepared ? prepared_size(*one) : 0;
    }
    // What follows may lie where X does, which every thread has to have read by then.
    const bool has_to_wait = group.next != nullptr && overlap(group.next, group.products[0]->src[1]);
    const int64_t n_saved = one->n_values * one->n_columns * (n_threads - 1) / n_threads;
    group.is_shared = has_to_wait || n_saved >= kSharedValues;
}

void GroupedGraph::mark() {
    for (ProductGroup& group : groups_) {
        group.prepared = prepared_.data();
        group.products[0]->extra = &group;
    }
}

void GroupedGraph::unmark() {
    for (ProductGroup& group : groups_) {
        group.products[0]->extra = nullptr;
    }
}

const ProductGroup* group_of(const ggml_tensor* dst) {
    const auto* group = static_cast<const ProductGroup*>(dst->extra);
    return group != nullptr && group->products[0] == dst ? group : nullptr;
}

} // namespace dspark::kernels
