#include "follower_table.h"

#include "vector_loops.h"

#include <algorithm>

namespace dspark {

namespace {

constexpr size_t kTogether = 16;       // lists made in one pass over W2: each row is read once for all
constexpr int64_t kRowsAtOnce = 1024;  // of W2: their biases stay in the cache
constexpr double kQuickProducts = 2e9; // multiplications that a constructor may take, some 0.1 s
// Lists are made in one pass over W2 (V = 152k: 5 ms, half a draft) for so many tokens, and after so many blocks that
// it takes about one per cent of drafting.
constexpr size_t kWanted = 8;
constexpr int64_t kFewestBlocks = 16;
constexpr int64_t kWeightsABlock = 400'000;

// A list is made once doing without has cost as much: as renting and buying, at most twice what was best in hindsight.
// It takes some 5 ns a row of W2 (Zen 4), and without it a slot takes some 50 us more, counting what it loses in
// accepted tokens.
constexpr int64_t kRowsAMeeting = 10'000;

struct Follower {
    float bias;
    int32_t id;
};

// The largest so far, descending.
class BestFollowers {
  public:
    explicit BestFollowers(size_t n) : n_(n) { best_.reserve(n + 1); }
    void add(float bias, int32_t id) {
        if (best_.size() == n_ && bias <= best_.back().bias) {
            return;
        }
        const auto is_smaller = [bias](const Follower& other) { return other.bias < bias; };
        best_.insert(std::find_if(best_.begin(), best_.end(), is_smaller), {bias, id});
        best_.resize(std::min(best_.size(), n_));
    }
    [[nodiscard]] const std::vector<Follower>& best() const { return best_; }

  private:
    size_t n_;
    std::vector<Follower> best_;
};

} // namespace

FollowerTable::FollowerTable(const HeadWeights& weights, int32_t n_followers) : weights_(weights) {
    if (weights.type != MarkovHeadType::vanilla || n_followers <= 0) {
        return;
    }
    n_each_ = std::min(static_cast<size_t>(n_followers), static_cast<size_t>(weights.w2.n_rows));
    first_.assign(static_cast<size_t>(weights.n_vocab), -1);
    n_met_.assign(first_.size(), 0);
    n_blocks_between_ = std::max(kFewestBlocks, weights.w2.n_rows * weights.rank / kWeightsABlock);
    const double per_list = static_cast<double>(weights.w2.n_rows) * static_cast<double>(weights.rank);
    const auto n_quick =
        static_cast<int64_t>(std::min(kQuickProducts / per_list, static_cast<double>(weights.n_vocab)));
    std::vector<int32_t> tokens;
    for (int64_t token = 0; token < n_quick; ++token) {
        tokens.push_back(static_cast<int32_t>(token));
        if (tokens.size() == kTogether || token + 1 == n_quick) {
            make(tokens);
            tokens.clear();
        }
    }
}

std::span<const int32_t> FollowerTable::find(int32_t previous) const {
    if (n_each_ == 0 || first_[index(previous)] < 0) {
        return {};
    }
    return std::span(ids_).subspan(static_cast<size_t>(first_[index(previous)]), n_each_);
}

void FollowerTable::want(int32_t previous) {
    const int64_t n_enough = std::min<int64_t>(1 + weights_.w2.n_rows / kRowsAMeeting, 255);
    uint8_t& n_met = n_met_[index(previous)];
    n_met = static_cast<uint8_t>(std::min(n_met + 1, 255));
    if (n_met >= n_enough && wanted_.size() < kWanted &&
        std::find(wanted_.begin(), wanted_.end(), previous) == wanted_.end()) {
        wanted_.push_back(previous);
    }
}

void FollowerTable::end_block() {
    if (++n_blocks_ >= n_blocks_between_ && !wanted_.empty()) {
        make(wanted_);
        wanted_.clear();
        n_blocks_ = 0;
    }
}

void FollowerTable::make(std::span<const int32_t> tokens) {
    const auto rank = static_cast<size_t>(weights_.rank);
    std::vector<float> embeddings(tokens.size() * rank);
    for (size_t i = 0; i < tokens.size(); ++i) {
        weights_.w1.decode(tokens[i], embeddings.data() + i * rank);
    }
    std::vector<BestFollowers> lists(tokens.size(), BestFollowers(n_each_));
    std::vector<float> biases(tokens.size() * kRowsAtOnce);
    for (int64_t begin = 0; begin < weights_.w2.n_rows; begin += kRowsAtOnce) {
        const int64_t n = std::min<int64_t>(kRowsAtOnce, weights_.w2.n_rows - begin);
        multiply_rows(begin, n, embeddings, biases);
        for (size_t i = 0; i < tokens.size(); ++i) {
            for (int64_t r = 0; r < n; ++r) {
                lists[i].add(biases[i * static_cast<size_t>(n) + static_cast<size_t>(r)], target_id(begin + r));
            }
        }
    }
    for (size_t i = 0; i < tokens.size(); ++i) {
        first_[index(tokens[i])] = static_cast<int32_t>(ids_.size());
        for (const Follower& follower : lists[i].best()) {
            ids_.push_back(follower.id);
        }
        std::sort(ids_.end() - static_cast<std::ptrdiff_t>(n_each_), ids_.end());
    }
}

// B of the rows begin .. begin + n - 1 after every embedding: biases[i * n + r].
void FollowerTable::multiply_rows(int64_t begin, int64_t n, std::span<const float> embeddings,
                                  std::span<float> biases) {
    const auto rank = static_cast<size_t>(weights_.rank);
    const size_t n_lists = embeddings.size() / rank;
    const RowTable& w2 = weights_.w2;
    if (w2.dot_rows != nullptr &&
        w2.dot_rows(w2, w2.row(begin), n, embeddings.data(), static_cast<int64_t>(n_lists), biases.data())) {
        return;
    }
    std::vector<float> row(rank);
    for (int64_t r = 0; r < n; ++r) {
        w2.decode(begin + r, row.data());
        for (size_t i = 0; i < n_lists; ++i) {
            biases[i * static_cast<size_t>(n) + static_cast<size_t>(r)] =
                dot(row.data(), embeddings.data() + i * rank, rank);
        }
    }
}

int32_t FollowerTable::target_id(int64_t row) const {
    return static_cast<int32_t>(weights_.d2t.empty() ? row : weights_.d2t[static_cast<size_t>(row)]);
}

} // namespace dspark
