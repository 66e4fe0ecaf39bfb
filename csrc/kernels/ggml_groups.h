// Products of a graph that all threads compute between two of ggml's barriers: those that multiply the same X (query,
// key and value; gate and up) and what is done next to their outputs one by one (the residual, SwiGLU). X is quantized
// once for all of them and, where that takes longer than a barrier, once for all threads. Every value is computed as
// it was, so the bits are the same.
#pragma once

#include "kernels/kernels.h"

#include "ggml-cpu-impl.h"
#include "ggml.h"

#include <optional>
#include <vector>

namespace dspark::kernels {

inline constexpr int kGroupProducts = 4;

struct ProductGroup {
    ggml_tensor* products[kGroupProducts] = {}; // the first one's turn is the group's
    size_t columns_at[kGroupProducts] = {};     // where in the prepared columns those of each product are
    int n_products = 0;
    ggml_tensor* next = nullptr; // an addition or SwiGLU of the outputs; null: none
    bool is_shared = false;      // by all threads: the columns that one thread prepared are read by the others
    size_t n_prepared = 0;
    int32_t* prepared = nullptr;
};

// Our type of the weights; nothing for those that no kernel of ours covers.
[[nodiscard]] std::optional<WeightType> weight_type(int ggml_type);

// The product of two plain matrices, for one thread; nothing for others and for weights that lie in a layout of ggml's.
[[nodiscard]] std::optional<Product> describe_product(const ggml_tensor* dst, int thread, int n_threads);

// The nodes of a graph that are left when groups are computed in the place of their first product. Lives until the next
// graph of its thread.
class GroupedGraph {
  public:
    void build(const ggml_cgraph& graph, int n_threads);
    void mark();   // groups are found by group_of()
    void unmark(); // no more

    std::vector<ggml_tensor*> nodes;

  private:
    void add_products(const ggml_cgraph& graph, int first, ProductGroup& group);
    void add_next(const ggml_cgraph& graph, int first, int last, ProductGroup& group);
    void place_columns(ProductGroup& group, int n_threads);

    std::vector<ProductGroup> groups_;
    std::vector<char> is_taken_; // each node: by a group
    std::vector<int32_t> prepared_;
};

[[nodiscard]] const ProductGroup* group_of(const ggml_tensor* dst); // null: dst is computed alone
void compute_group(const ggml_compute_params& params, const ProductGroup& group);

} // namespace dspark::kernels
