// Splits attention among the threads and the tokens into runs.
#include "kernels/attention_run.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <numeric>

namespace dspark::kernels {
namespace {

AttendRun find_attend() {
#if defined(DSPARK_ATTENTION_AVX2)
    return find_attend_avx2();
#elif defined(DSPARK_ATTENTION_NEON)
    return find_attend_neon();
#else
    return nullptr;
#endif
}

AttendRun attend_run() {
    static const AttendRun kFound = find_attend();
    return kFound;
}

// Most cells are hidden, of other sequences or empty: four at a time.
void find_cells(const Attention& attention, int64_t token, std::vector<int32_t>& cells) {
    cells.clear();
    if (attention.mask == nullptr) {
        cells.resize(static_cast<size_t>(attention.n_cells));
        std::iota(cells.begin(), cells.end(), 0);
        return;
    }
    constexpr uint64_t four_hidden = 0x0001000100010001U * kHidden;
    const uint16_t* mask = attention.mask + token * attention.mask_stride;
    for (int64_t c = 0; c < attention.n_cells; ++c) {
        uint64_t four = 0;
        while (c + 4 <= attention.n_cells && (std::memcpy(&four, mask + c, sizeof(four)), four == four_hidden)) {
            c += 4;
        }
        if (c < attention.n_cells && mask[c] != kHidden) {
            cells.push_back(static_cast<int32_t>(c));
        }
    }
}

class Runs {
  public:
    explicit Runs(const Attention& attention) : attention_(attention) {}

    // The longest run from `token` that computes at most a quarter more than it must.
    const AttentionRun& at(int64_t token, int64_t end) {
        run_.first_token = token;
        run_.n_tokens = 1;
        find_cells(attention_, token, run_.cells);
        size_t most = run_.cells.size();
        for (; token + run_.n_tokens < end; ++run_.n_tokens) {
            find_cells(attention_, token + run_.n_tokens, next_);
            united_.clear();
            std::ranges::set_union(run_.cells, next_, std::back_inserter(united_));
            most = std::max(most, next_.size());
            if (united_.size() > most + most / 4) {
                break;
            }
            run_.cells.swap(united_);
        }
        run_.n_cells = run_.cells.size();
        while (run_.cells.size() % kCellBlock != 0) {
            run_.cells.push_back(run_.cells.back());
        }
        return run_;
    }

  private:
    const Attention& attention_;
    AttentionRun run_;
    std::vector<int32_t> next_;
    std::vector<int32_t> united_;
};

void make_room(const Attention& attention, size_t n_cells, AttentionScratch& scratch) {
    scratch.scores.resize(kRunRows * n_cells);
    scratch.largest.resize(n_cells);
    scratch.keys.resize(static_cast<size_t>(kCellBlock * attention.key_size));
    scratch.values.resize(static_cast<size_t>(kValueBlock * attention.value_size));
    scratch.sums.resize(static_cast<size_t>(kRunRows * attention.value_size));
}

// Shares of the heads: those of one key head, fewer where threads would be left without work.
int64_t heads_per_share(const Attention& attention, int64_t n_groups) {
    int64_t n = std::min(attention.n_heads / attention.n_kv_heads, kRunRows);
    while (n % 2 == 0 && n_groups * attention.n_heads / n < attention.n_threads) {
        n /= 2;
    }
    while (attention.n_heads / attention.n_kv_heads % n != 0) {
        --n;
    }
    return n;
}

} // namespace

bool can_attend() { return attend_run() != nullptr; }

bool attend(const Attention& attention) {
    if (!can_attend() || attention.key_size % 8 != 0 || attention.value_size % 8 != 0) {
        return false;
    }
    static thread_local AttentionScratch scratch;
    const int64_t group = std::max<int64_t>(1, kRunRows / (attention.n_heads / attention.n_kv_heads)); // tokens
    const int64_t n_groups = (attention.n_tokens + group - 1) / group;
    const int64_t n_heads = heads_per_share(attention, n_groups);
    const int64_t n_shares = attention.n_heads / n_heads;
    Runs runs(attention);
    for (int64_t g = 0; g < n_groups; ++g) {
        // Shares in turns over all groups: the later tokens of a prompt see more cells.
        const int64_t first =
            (attention.thread - g * n_shares % attention.n_threads + attention.n_threads) % attention.n_threads;
        const int64_t end = std::min((g + 1) * group, attention.n_tokens);
        for (int64_t token = g * group; token < end && first < n_shares;) {
            const AttentionRun& run = runs.at(token, end);
            make_room(attention, run.cells.size(), scratch);
            for (int64_t share = first; share < n_shares; share += attention.n_threads) {
                attend_run()(attention, run, {share * n_heads, n_heads}, scratch);
            }
            token += run.n_tokens;
        }
    }
    return true;
}

} // namespace dspark::kernels
