// Splits attention among the threads and the tokens into runs.
#include "kernels/attention_run.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <numeric>
#include <span>

namespace dspark::kernels {
namespace {

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

struct Tokens {
    int64_t begin, end;
};

struct Shares {
    int64_t first, n_heads;
};

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
            if (next_.size() >= run_.cells.size() && std::ranges::equal(run_.cells, first_of_next())) {
                run_.cells.swap(next_); // as the tokens of a prompt
                most = run_.cells.size();
                continue;
            }
            united_.clear();
            std::ranges::set_union(run_.cells, next_, std::back_inserter(united_));
            most = std::max(most, next_.size());
            if (united_.size() > most + most / 4) {
                break;
            }
            run_.cells.swap(united_);
        }
        run_.n_cells = run_.cells.size();
        while (run_.cells.size() % kValueBlock != 0) {
            run_.cells.push_back(run_.cells.back());
        }
        return run_;
    }

  private:
    [[nodiscard]] std::span<const int32_t> first_of_next() const { return std::span(next_).first(run_.cells.size()); }

    const Attention& attention_;
    AttentionRun run_;
    std::vector<int32_t> next_;
    std::vector<int32_t> united_;
};

void make_room(const Attention& attention, size_t n_cells, AttentionScratch& scratch) {
    scratch.scores.resize(static_cast<size_t>(kShareRows * score_stride(n_cells)));
    scratch.queries.resize(static_cast<size_t>(kShareRows * attention.key_size));
    scratch.sums.resize(static_cast<size_t>(kShareRows * attention.value_size));
    scratch.largest.resize(kShareRows * n_cells);
    scratch.zeros.resize(static_cast<size_t>(attention.value_size));
}

// How many heads of a group are computed together: those of one key head, or of several, whose keys are neighbours in
// memory; fewer where threads would be left without work.
int64_t heads_per_share(const Attention& attention, int64_t n_tokens, int64_t n_groups) {
    const int64_t group = attention.n_heads / attention.n_kv_heads;
    const auto leaves_none_idle = [&](int64_t n) { return n_groups * attention.n_heads / n >= attention.n_threads; };
    int64_t n = std::min(group, kRunRows);
    while (n % 2 == 0 && !leaves_none_idle(n)) {
        n /= 2;
    }
    while (group % n != 0) {
        --n;
    }
    if (n < group) {
        return n;
    }
    int64_t n_kv_heads = std::max<int64_t>(1, kShareRows / (n_tokens * group));
    while (n_kv_heads > 1 && (attention.n_kv_heads % n_kv_heads != 0 || !leaves_none_idle(n_kv_heads * group))) {
        --n_kv_heads;
    }
    return n_kv_heads * group;
}

} // namespace

std::vector<AttendRun> available_attends() {
    std::vector<AttendRun> found;
#if defined(DSPARK_ATTENTION_X86)
    found = {find_attend_avx512(), find_attend_avx2()};
#elif defined(DSPARK_ATTENTION_NEON)
    found = {find_attend_neon()};
#endif
    std::erase(found, nullptr);
    return found;
}

namespace {

// Of a group of tokens: shares first, first + n_threads .. of n_heads heads each.
void attend_group(AttendRun attend_run, const Attention& attention, Runs& runs, Tokens tokens, Shares shares) {
    static thread_local AttentionScratch scratch;
    for (int64_t token = tokens.begin; token < tokens.end;) {
        const AttentionRun& run = runs.at(token, tokens.end);
        make_room(attention, run.cells.size(), scratch);
        for (int64_t share = shares.first; share * shares.n_heads < attention.n_heads; share += attention.n_threads) {
            attend_run(attention, run, {share * shares.n_heads, shares.n_heads}, scratch);
        }
        token += run.n_tokens;
    }
}

} // namespace

bool attend_with(AttendRun attend_run, const Attention& attention) {
    if (attend_run == nullptr || attention.key_size % 8 != 0 || attention.value_size % 8 != 0) {
        return false;
    }
    const int64_t n_tokens = std::max<int64_t>(1, kRunRows / (attention.n_heads / attention.n_kv_heads)); // of a group
    const int64_t n_groups = (attention.n_tokens + n_tokens - 1) / n_tokens;
    Runs runs(attention);
    int64_t n_before = 0; // shares of the groups before: in turns, for the later tokens of a prompt see more cells
    for (int64_t g = 0; g < n_groups; ++g) {
        const Tokens tokens{g * n_tokens, std::min((g + 1) * n_tokens, attention.n_tokens)};
        const int64_t n_heads = heads_per_share(attention, tokens.end - tokens.begin, n_groups);
        const int64_t n_shares = attention.n_heads / n_heads;
        const int64_t first = (attention.thread - n_before % attention.n_threads + attention.n_threads) %
                              attention.n_threads; // of this thread's
        if (first < n_shares) {
            attend_group(attend_run, attention, runs, tokens, {first, n_heads});
        }
        n_before += n_shares;
    }
    return true;
}

namespace {

AttendRun best_attend() {
    static const AttendRun kFound = available_attends().empty() ? nullptr : available_attends().front();
    return kFound;
}

} // namespace

bool can_attend() { return best_attend() != nullptr; }

bool attend(const Attention& attention) { return attend_with(best_attend(), attention); }

} // namespace dspark::kernels
