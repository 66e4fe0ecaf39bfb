// Picks the instruction set once, splits the outputs among the threads.
#include "kernels/isa.h"

#include <algorithm>
#include <atomic>

namespace dspark::kernels {
namespace {

std::vector<const Isa*> find_isas() {
    std::vector<const Isa*> found;
#if defined(DSPARK_KERNELS_AVX2)
    found = {find_avx2()};
#elif defined(DSPARK_KERNELS_NEON)
    found = {find_neon_i8mm(), find_neon_dotprod()};
#endif
    std::erase(found, nullptr);
    return found;
}

const Isa* isa() {
    static const Isa* const kBest = available_isas().empty() ? nullptr : available_isas().front();
    return kBest;
}

std::atomic<bool> enabled_products{true};

ColumnLayout layout_of(WeightType type) {
    switch (type) {
    case WeightType::q4_k:
    case WeightType::q5_k:
        return ColumnLayout::super32;
    case WeightType::q6_k:
        return ColumnLayout::super16;
    case WeightType::q4_0:
        return ColumnLayout::bytes;
    default:
        return ColumnLayout::words;
    }
}

int64_t block_size(WeightType type) {
    const ColumnLayout layout = layout_of(type);
    return layout == ColumnLayout::super32 || layout == ColumnLayout::super16 ? kSuperBlockSize : kBlockSize;
}

void prepare(const Isa& isa, const Product& product, int64_t begin, Columns& columns) {
    columns.layout = layout_of(product.type);
    columns.n_columns = static_cast<int>(std::min<int64_t>(product.n_columns - begin, kMaxColumns));
    columns.n_tiles = (columns.n_columns + kTileColumns - 1) / kTileColumns;
    columns.n_values = product.n_values;
    const int64_t n_whole = product.n_values / kSuperBlockSize;
    const auto n_rest = static_cast<size_t>(product.n_values % kSuperBlockSize);
    const size_t per_column = groups_per_column(columns.layout, kSuperBlockSize) * static_cast<size_t>(n_whole) +
                              (n_rest > 0 ? groups_per_column(columns.layout, n_rest) : 0);
    const int n_paired = columns.n_columns + columns.n_columns % 2; // room for an instruction set that pairs columns
    columns.groups.resize(per_column * static_cast<size_t>(n_paired));
    isa.prepare(product, begin, columns);
}

} // namespace

const std::vector<const Isa*>& available_isas() {
    static const std::vector<const Isa*> kFound = find_isas();
    return kFound;
}

std::string_view instruction_set() { return isa() != nullptr ? isa()->name : "none"; }

void set_enabled(bool enabled) { enabled_products.store(enabled, std::memory_order_relaxed); }
bool is_enabled() { return enabled_products.load(std::memory_order_relaxed); }

bool covers(WeightType type) { return isa() != nullptr && type != WeightType::f16 && type != WeightType::bf16; }

bool multiply(const Product& product) { return covers(product.type) && multiply_with(*isa(), product); }

bool multiply_with(const Isa& isa, const Product& product) {
    if (product.n_values % block_size(product.type) != 0) {
        return false;
    }
    const int64_t n_strips = (product.n_outputs + kStripOutputs - 1) / kStripOutputs;
    const int64_t first = n_strips * product.thread / product.n_threads * kStripOutputs;
    const int64_t last =
        std::min(n_strips * (product.thread + 1) / product.n_threads * kStripOutputs, product.n_outputs);
    if (first >= last) {
        return true;
    }
    thread_local Columns columns;
    for (int64_t begin = 0; begin < product.n_columns; begin += kMaxColumns) {
        prepare(isa, product, begin, columns);
        isa.multiply(product, begin, columns, first, last);
    }
    return true;
}

} // namespace dspark::kernels
