#include "policy.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace dspark {

namespace {

[[noreturn]] void refuse(std::string_view text) {
    throw std::invalid_argument(
        "policy must be off, full, fixed:n, threshold:p (0 to 1), algorithm1 or adaptive, got '" + std::string(text) +
        "'");
}

template <typename Number> Number parse_number(std::string_view digits, std::string_view text) {
    Number value{};
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    if (error != std::errc() || end != digits.data() + digits.size()) {
        refuse(text);
    }
    return value;
}

// A slot that may be verified next, and what it is worth.
struct Slot {
    double value;
    size_t block;
    int32_t index;
};

bool is_worth_more(const Slot& a, const Slot& b) {
    if (a.value != b.value) {
        return a.value > b.value;
    }
    return a.block != b.block ? a.block < b.block : a.index < b.index; // within a block: in order
}

// Expected values of all slots not taken yet. What may be looked at: the first of them, and all when the block is free.
void list_slots(std::span<const DraftedBlock> blocks, std::span<const int32_t> taken, std::span<const double> survival,
                std::vector<Slot>& slots) {
    slots.clear();
    for (size_t i = 0; i < blocks.size(); ++i) {
        const DraftedBlock& block = blocks[i];
        double value = survival[i] * block.weight;
        for (int32_t k = taken[i]; k < block.most; ++k) {
            const bool is_known = k == taken[i] || block.is_free;
            value *= (is_known ? block.confidence : block.expected)[static_cast<size_t>(k)];
            slots.push_back({value, i, k});
        }
    }
    std::sort(slots.begin(), slots.end(), is_worth_more);
}

// How many of the best slots to take on top of n_taken drafted rows; 0: none pays. Scans all, so cliffs are no end.
size_t best_count(const std::vector<Slot>& slots, std::span<const double> cost_ms, size_t n_taken, double price) {
    double best = 1e-12; // ties: the shorter
    double value = 0;
    size_t count = 0;
    for (size_t n = 1; n <= slots.size(); ++n) {
        value += slots[n - 1].value;
        const double gain = value - price * (cost_ms[n_taken + n] - cost_ms[n_taken]);
        if (gain > best) {
            best = gain;
            count = n;
        }
    }
    return count;
}

std::vector<Slot> expected_slots(const DraftedBlock& block, size_t index) {
    std::vector<Slot> slots;
    double value = block.weight;
    for (int32_t k = 0; k < block.most; ++k) {
        value *= block.expected[static_cast<size_t>(k)];
        slots.push_back({value, index, k});
    }
    return slots;
}

} // namespace

Policy parse_policy(std::string_view text) {
    using Kind = Policy::Kind;
    if (text == "adaptive") {
        return {};
    }
    if (text == "off") {
        return {Kind::off, 0, 0};
    }
    if (text == "full") {
        return {Kind::fixed, std::numeric_limits<int32_t>::max(), 0};
    }
    if (text == "algorithm1") {
        return {Kind::algorithm1, 0, 0};
    }
    if (text.starts_with("fixed:")) {
        const auto length = parse_number<int32_t>(text.substr(6), text);
        if (length < 0) {
            refuse(text);
        }
        return {length == 0 ? Kind::off : Kind::fixed, length, 0};
    }
    if (text.starts_with("threshold:")) {
        const auto threshold = parse_number<double>(text.substr(10), text);
        if (!(threshold >= 0 && threshold <= 1)) {
            refuse(text);
        }
        return {Kind::threshold, 0, threshold};
    }
    refuse(text);
}

double expected_tokens(std::span<const double> rates) {
    double survival = 1;
    double n_tokens = 1;
    for (const double rate : rates) {
        survival *= rate;
        n_tokens += survival;
    }
    return n_tokens;
}

int32_t threshold_prefix(const DraftedBlock& block, double threshold) {
    int32_t length = 0;
    while (length < block.most && block.confidence[static_cast<size_t>(length)] >= threshold) {
        ++length;
    }
    return length;
}

void algorithm1_prefixes(std::span<const DraftedBlock> blocks, std::span<const double> cost_ms, int32_t n_requests,
                         std::span<int32_t> prefix_len) {
    std::vector<Slot> slots;
    for (size_t i = 0; i < blocks.size(); ++i) {
        prefix_len[i] = 0;
        double survival = 1;
        for (int32_t k = 0; k < blocks[i].most; ++k) {
            survival *= blocks[i].confidence[static_cast<size_t>(k)];
            slots.push_back({survival, i, k});
        }
    }
    std::sort(slots.begin(), slots.end(), is_worth_more);
    double expected_accepts = n_requests; // tau
    double best = cost_ms[0] > 0 ? expected_accepts / cost_ms[0] : 0;
    for (size_t n = 1; n <= slots.size(); ++n) {
        expected_accepts += slots[n - 1].value;
        const double throughput = cost_ms[n] > 0 ? expected_accepts / cost_ms[n] : expected_accepts; // theta
        if (throughput <= best) {
            return;
        }
        best = throughput;
        prefix_len[slots[n - 1].block] = slots[n - 1].index + 1;
    }
}

double adaptive_prefixes(std::span<const DraftedBlock> blocks, std::span<const double> cost_ms, double tokens_per_ms,
                         std::span<int32_t> prefix_len) {
    std::fill(prefix_len.begin(), prefix_len.end(), 0);
    std::vector<double> survival(blocks.size(), 1.0);
    std::vector<Slot> slots;
    double gain = 0;
    for (size_t n_taken = 0;;) {
        list_slots(blocks, prefix_len, survival, slots);
        const size_t count = best_count(slots, cost_ms, n_taken, tokens_per_ms);
        if (count == 0) {
            return gain - tokens_per_ms * (cost_ms[n_taken] - cost_ms[0]);
        }
        // Of these, take what was looked at; what was only expected is listed anew with what is known by then.
        const std::vector<int32_t> known(prefix_len.begin(), prefix_len.end());
        for (size_t n = 0; n < count; ++n) {
            const auto& [value, i, k] = slots[n];
            if (k == known[i] || blocks[i].is_free) {
                survival[i] *= blocks[i].confidence[static_cast<size_t>(k)];
                prefix_len[i] = k + 1;
                gain += survival[i] * blocks[i].weight;
                ++n_taken;
            }
        }
    }
}

int32_t equal_prefix(std::span<const DraftedBlock> blocks, std::span<const double> cost_ms, double tokens_per_ms) {
    int32_t most = std::numeric_limits<int32_t>::max();
    for (const DraftedBlock& block : blocks) {
        most = std::min(most, block.most);
    }
    std::vector<double> survival(blocks.size(), 1.0);
    double best = 0;
    double value = 0;
    int32_t length = 0;
    for (int32_t k = 0; k < most && !blocks.empty(); ++k) {
        for (size_t i = 0; i < blocks.size(); ++i) {
            survival[i] *= blocks[i].expected[static_cast<size_t>(k)];
            value += survival[i] * blocks[i].weight;
        }
        const size_t n_rows = blocks.size() * static_cast<size_t>(k + 1);
        const double gain = value - tokens_per_ms * (cost_ms[n_rows] - cost_ms[0]);
        if (gain > best) {
            best = gain;
            length = k + 1;
        }
    }
    return length;
}

namespace {

// What drafting a set of blocks is worth, blocks joining one after the other.
class DraftSearch {
  public:
    DraftSearch(std::span<const DraftedBlock> blocks, const DraftCosts& costs, double tokens_per_ms)
        : blocks_(blocks), costs_(costs), price_(tokens_per_ms) {
        for (size_t i = 0; i < blocks.size(); ++i) {
            per_block_.push_back(expected_slots(blocks[i], i));
        }
        best_.is_drafting.assign(blocks.size(), 0);
        best_.tokens_per_ms = tokens_per_ms;
    }

    // Blocks join by their value beyond what a row and their entry cost; row_price 0: rows are free.
    void search(double row_price) {
        std::vector<double> worth;
        for (size_t i = 0; i < blocks_.size(); ++i) {
            worth.push_back(-price_ * blocks_[i].entry_ms);
            for (const Slot& slot : per_block_[i]) {
                worth.back() += std::max(0.0, slot.value - row_price);
            }
        }
        std::vector<size_t> order(worth.size());
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return worth[a] > worth[b]; });
        slots_.clear();
        entry_ms_ = 0;
        for (size_t n = 1; n <= order.size(); ++n) {
            join(order[n - 1]);
            weigh(std::span(order).first(n));
        }
    }

    [[nodiscard]] const DraftChoice& best() const { return best_; }
    // What a row of the best set costs on average, in tokens.
    [[nodiscard]] double row_price() const { return price_ * best_row_ms_; }

  private:
    void join(size_t block) {
        const std::vector<Slot>& added = per_block_[block];
        const auto middle = static_cast<std::ptrdiff_t>(slots_.size());
        slots_.insert(slots_.end(), added.begin(), added.end());
        std::inplace_merge(slots_.begin(), slots_.begin() + middle, slots_.end(), is_worth_more);
        entry_ms_ += blocks_[block].entry_ms;
    }

    void weigh(std::span<const size_t> members) {
        if (slots_.empty()) {
            return;
        }
        const size_t n_paying = best_count(slots_, costs_.cost_ms, 0, price_);
        const size_t count = std::max<size_t>(n_paying, 1); // where none pays: what the first would do
        double value = 0;
        for (size_t k = 0; k < count; ++k) {
            value += slots_[k].value;
        }
        const double verify_ms = costs_.cost_ms[count] - costs_.cost_ms[0];
        const double verify_gain = n_paying > 0 ? value - price_ * verify_ms : 0.0;
        const double draft_ms = costs_.draft_ms[members.size()] + entry_ms_;
        const double gain = verify_gain + static_cast<double>(members.size()) * costs_.bonus_tokens - price_ * draft_ms;
        if (gain <= best_gain_) {
            return;
        }
        best_gain_ = gain;
        best_row_ms_ = verify_ms / static_cast<double>(count);
        best_.n_tokens = value;
        best_.extra_ms = draft_ms + verify_ms;
        best_.n_rows = count;
        best_.n_blocks = members.size();
        best_.is_drafting.assign(per_block_.size(), 0);
        if (gain > 0) {
            best_.gain_tokens = gain;
            best_.verify_gain_tokens = verify_gain;
            for (const size_t member : members) {
                best_.is_drafting[member] = 1;
            }
        }
    }

    std::span<const DraftedBlock> blocks_;
    const DraftCosts& costs_;
    double price_;
    std::vector<std::vector<Slot>> per_block_;
    std::vector<Slot> slots_; // of the blocks that joined, best first
    double entry_ms_ = 0;     // of the blocks that joined
    DraftChoice best_;
    double best_gain_ = -std::numeric_limits<double>::infinity();
    double best_row_ms_ = 0;
};

} // namespace

DraftChoice choose_drafting(std::span<const DraftedBlock> blocks, const DraftCosts& costs, double tokens_per_ms) {
    DraftSearch search(blocks, costs, tokens_per_ms);
    search.search(0);
    search.search(search.row_price()); // few rows among many blocks: good first slots beat long tails
    return search.best();
}

DraftChoice choose_fastest_drafting(std::span<const DraftedBlock> blocks, const DraftCosts& costs, int32_t n_requests) {
    constexpr int32_t kMostRounds = 4; // it converges faster than linearly
    constexpr double kConverged = 1.001;
    const double plain_ms = costs.cost_ms[0];
    DraftChoice choice = choose_drafting(blocks, costs, plain_ms > 0 ? n_requests / plain_ms : 0);
    for (int32_t round = 1; round < kMostRounds && choice.gain_tokens > 0 && plain_ms > 0; ++round) {
        const double n_tokens = n_requests + choice.n_gained();
        const double rate = n_tokens / (plain_ms + choice.extra_ms);
        if (rate < kConverged * choice.tokens_per_ms) {
            break;
        }
        choice = choose_drafting(blocks, costs, rate);
    }
    return choice;
}

bool could_pay(std::span<const DraftedBlock> blocks, const DraftCosts& costs, int32_t n_requests) {
    constexpr double kEase = 1;        // logits: few texts are easier by more
    constexpr double kCostShare = 0.7; // costs err by less, as a rule
    constexpr double kMostRate = 0.97;
    std::vector<std::vector<double>> rates;
    std::vector<DraftedBlock> easy(blocks.begin(), blocks.end());
    for (DraftedBlock& block : easy) {
        std::vector<double>& own = rates.emplace_back(block.expected.begin(), block.expected.end());
        for (double& rate : own) {
            rate = std::min(kMostRate, rate / (rate + (1 - rate) * std::exp(-kEase)));
        }
        block.expected = own;
    }
    std::vector<double> cost_ms(costs.cost_ms.begin(), costs.cost_ms.end());
    std::vector<double> draft_ms(costs.draft_ms.begin(), costs.draft_ms.end());
    for (double& ms : cost_ms) {
        ms = costs.cost_ms[0] + kCostShare * (ms - costs.cost_ms[0]);
    }
    for (double& ms : draft_ms) {
        ms *= kCostShare;
    }
    return choose_fastest_drafting(easy, {cost_ms, draft_ms, costs.bonus_tokens}, n_requests).gain_tokens > 0;
}

} // namespace dspark
