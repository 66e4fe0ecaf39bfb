// Picks the instruction set once, splits the outputs among the threads.
#include "kernels/grouped_nodes.h"
#include "kernels/isa.h"

#include <algorithm>
#include <atomic>
#include <cstring>

namespace dspark::kernels {
namespace {

std::vector<const Isa*> find_isas() {
    std::vector<const Isa*> found;
#if defined(DSPARK_KERNELS_X86)
    found = {find_avx512(), find_avx512vl(), find_avxvnni(), find_avx2()};
#elif defined(DSPARK_KERNELS_NEON)
    found = {find_neon_i8mm(), find_neon_dotprod()};
#endif
    std::erase(found, nullptr);
    return found;
}

// The one in use; null: none.
std::atomic<const Isa*>& chosen_isa() {
    static std::atomic<const Isa*> chosen = available_isas().empty() ? nullptr : available_isas().front();
    return chosen;
}

const Isa* isa() { return chosen_isa().load(std::memory_order_relaxed); }

std::atomic<bool> enabled_products{true};
std::atomic<bool> enabled_groups{true};
std::atomic<int> grouped_nodes{0};
std::atomic<uint64_t> foreign_attention{0};

// More columns of BF16 are ggml's: it multiplies them in bf16, which is faster for a prompt.
constexpr int64_t kMostBf16Columns = 32;

bool is_float(WeightType type) { return type == WeightType::f16 || type == WeightType::bf16; }

ColumnLayout layout_of(WeightType type) {
    switch (type) {
    case WeightType::q4_k:
    case WeightType::q5_k:
        return ColumnLayout::super32;
    case WeightType::q6_k:
        return ColumnLayout::super16;
    default:
        return ColumnLayout::bytes;
    }
}

struct BlockShape {
    int64_t n_weights;
    size_t n_bytes;
};

BlockShape block_shape(WeightType type) {
    switch (type) {
    case WeightType::q8_0:
        return {kBlockSize, sizeof(BlockQ8_0)};
    case WeightType::q4_0:
    case WeightType::iq4_nl:
        return {kBlockSize, sizeof(BlockQ4_0)};
    case WeightType::q4_k:
        return {kSuperBlockSize, sizeof(BlockQ4_K)};
    case WeightType::q5_k:
        return {kSuperBlockSize, sizeof(BlockQ5_K)};
    case WeightType::q6_k:
        return {kSuperBlockSize, sizeof(BlockQ6_K)};
    default:
        return {1, sizeof(uint16_t)};
    }
}

// Columns [begin, ...) of one pass over the weights, in memory that is still to be given.
Columns columns_from(const Product& product, int64_t begin) {
    Columns columns;
    columns.layout = layout_of(product.type);
    columns.n_columns = static_cast<int>(std::min<int64_t>(product.n_columns - begin, kMaxColumns));
    columns.n_tiles = (columns.n_columns + kTileColumns - 1) / kTileColumns;
    columns.n_values = product.n_values;
    return columns;
}

// 4-byte groups that n_columns of the product take: all columns together, or those of one pass.
int64_t prepared_groups(const Product& product, int64_t n_columns) {
    const int64_t n_steps = (product.n_values + kSuperBlockSize - 1) / kSuperBlockSize;
    const int64_t n_paired = n_columns + n_columns % 2; // room for an instruction set that pairs columns
    return n_steps * n_paired * record_groups(layout_of(product.type));
}

// Fewer outputs than a strip, from `first` on: computed with copies of their rows, filled up with the last one.
void multiply_rest(const Isa& isa, const Product& product, int64_t begin, const Columns& columns, int64_t first) {
    const auto n_outputs = static_cast<size_t>(product.n_outputs - first),
               n_strip = static_cast<size_t>(isa.strip_outputs);
    const BlockShape block = block_shape(product.type);
    const size_t n_bytes = static_cast<size_t>(product.n_values / block.n_weights) * block.n_bytes;
    const auto* weights = static_cast<const uint8_t*>(product.weights);
    std::vector<uint8_t> rows(n_strip * n_bytes);
    for (size_t r = 0; r < n_strip; ++r) {
        const size_t row = static_cast<size_t>(first) + std::min(r, n_outputs - 1);
        std::memcpy(rows.data() + r * n_bytes, weights + row * product.weight_stride, n_bytes);
    }
    const auto n_columns = static_cast<size_t>(columns.n_columns);
    std::vector<float> y(n_columns * n_strip);
    Product strip = product;
    strip.weights = rows.data();
    strip.weight_stride = n_bytes;
    strip.y = y.data();
    strip.y_stride = isa.strip_outputs;
    isa.multiply(strip, 0, columns, 0, isa.strip_outputs);
    for (size_t c = 0; c < n_columns; ++c) {
        std::copy_n(y.data() + c * n_strip, n_outputs,
                    product.y + (begin + static_cast<int64_t>(c)) * product.y_stride + first);
    }
}

// Calls pass(begin, columns) for the columns, as many at once as a pass over the weights takes. groups_of(begin): where
// those of a pass lie.
template <typename GroupsOf, typename Pass> void for_passes(const Product& product, GroupsOf groups_of, Pass pass) {
    for (int64_t begin = 0; begin < product.n_columns; begin += kMaxColumns) {
        Columns columns = columns_from(product, begin);
        columns.groups = groups_of(begin);
        pass(begin, columns);
    }
}

// In `prepared`, one pass after the other.
auto groups_in(const Product& product, int32_t* prepared) {
    return [&product, prepared](int64_t begin) { return prepared + prepared_groups(product, begin); };
}

void multiply_columns(const Isa& isa, const Product& product, int64_t begin, const Columns& columns, Outputs outputs) {
    const int64_t rest = outputs.last - (outputs.last - outputs.first) % isa.strip_outputs;
    isa.multiply(product, begin, columns, outputs.first, rest);
    if (rest < outputs.last) {
        multiply_rest(isa, product, begin, columns, rest);
    }
}

// Each pass's columns right before their use, and all of them: the product's threads do not wait for each other.
void multiply_alone(const Isa& isa, const Product& product, Outputs outputs) {
    thread_local std::vector<int32_t> groups;
    groups.resize(static_cast<size_t>(prepared_groups(product, std::min<int64_t>(product.n_columns, kMaxColumns))));
    const auto in_the_same_place = [](int64_t) { return groups.data(); };
    for_passes(product, in_the_same_place, [&](int64_t begin, const Columns& columns) {
        isa.prepare(product, begin, columns, {});
        multiply_columns(isa, product, begin, columns, outputs);
    });
}

} // namespace

const std::vector<const Isa*>& available_isas() {
    static const std::vector<const Isa*> kFound = find_isas();
    return kFound;
}

std::string_view instruction_set() { return isa() != nullptr ? isa()->name : "none"; }

std::vector<std::string_view> instruction_sets() {
    std::vector<std::string_view> names;
    for (const Isa* available : available_isas()) {
        names.push_back(available->name);
    }
    return names;
}

bool set_instruction_set(std::string_view name) {
    for (const Isa* available : available_isas()) {
        if (available->name == name) {
            chosen_isa().store(available, std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}

void set_enabled(bool enabled) { enabled_products.store(enabled, std::memory_order_relaxed); }
bool is_enabled() { return enabled_products.load(std::memory_order_relaxed); }

void set_groups_enabled(bool enabled) { enabled_groups.store(enabled, std::memory_order_relaxed); }
bool are_groups_enabled() { return enabled_groups.load(std::memory_order_relaxed); }

void note_grouped_nodes(int n) { grouped_nodes.store(n, std::memory_order_relaxed); }
int n_grouped_nodes() { return grouped_nodes.load(std::memory_order_relaxed); }

uint64_t n_foreign_attention() { return foreign_attention.load(std::memory_order_relaxed); }
void count_foreign_attention() { foreign_attention.fetch_add(1, std::memory_order_relaxed); }

bool covers(WeightType type) { return isa() != nullptr && (!is_float(type) || isa()->multiply_floats != nullptr); }

bool multiply(const Product& product) { return covers(product.type) && multiply_with(*isa(), product); }

Outputs outputs_of(const Product& product) {
    const int64_t n_shares = (product.n_outputs + kShareOutputs - 1) / kShareOutputs;
    const auto share = [&](int64_t thread) {
        return std::min(n_shares * thread / product.n_threads * kShareOutputs, product.n_outputs);
    };
    return {share(product.thread), share(product.thread + 1)};
}

bool multiply_with(const Isa& isa, const Product& product) {
    if (product.n_values < 1 || product.n_values % block_shape(product.type).n_weights != 0) {
        return false;
    }
    if (product.type == WeightType::bf16 && product.n_columns > kMostBf16Columns) {
        return false;
    }
    const Outputs outputs = outputs_of(product);
    if (outputs.first < outputs.last && is_float(product.type)) {
        isa.multiply_floats(product, outputs.first, outputs.last);
    } else if (outputs.first < outputs.last) {
        multiply_alone(isa, product, outputs);
    }
    return true;
}

bool can_prepare(WeightType type) { return covers(type) && !is_float(type); }

bool have_same_columns(WeightType a, WeightType b) {
    return a == b || (layout_of(a) == layout_of(b) && weight_offset(a) == weight_offset(b));
}

size_t prepared_size(const Product& product) {
    return static_cast<size_t>(prepared_groups(product, product.n_columns));
}

void prepare(const Product& product, int32_t* prepared) {
    for_passes(product, groups_in(product, prepared), [&](int64_t begin, const Columns& columns) {
        isa()->prepare(product, begin, columns, {product.thread, product.n_threads});
    });
}

void multiply_prepared(const Product& product, int32_t* prepared) {
    const Outputs outputs = outputs_of(product);
    if (outputs.first == outputs.last) {
        return;
    }
    for_passes(product, groups_in(product, prepared), [&](int64_t begin, const Columns& columns) {
        multiply_columns(*isa(), product, begin, columns, outputs);
    });
}

} // namespace dspark::kernels
