// Toy models for the engine's tests: a target whose distribution is a known table over 8 tokens (the logits depend on
// the last two tokens), and a drafter that draws from a distorted copy of it. Both check what the engine promises.
#pragma once

#include "drafter.h"
#include "errors.h"
#include "target.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <stdexcept>
#include <vector>

namespace toy {

constexpr int32_t kVocab = 8;
constexpr int32_t kEnd = 7; // end of generation

using Logits = std::array<float, kVocab>;

// A fixed pseudo-random table; `salt` distorts it for the drafter.
inline Logits table(int32_t before_last, int32_t last, float salt) {
    Logits logits{};
    for (int32_t token = 0; token < kVocab; ++token) {
        const auto x = static_cast<float>(1 + token + 11 * last + 89 * before_last);
        logits[static_cast<size_t>(token)] = 1.5F * std::sin(x * 1.7F) + salt * std::sin(x * 0.9F + 0.3F);
    }
    return logits;
}

class Target final : public dspark::Target {
  public:
    explicit Target(float end_logit = 0.0F) : end_logit_(end_logit) {}

    [[nodiscard]] int32_t n_vocab() const override { return kVocab; }
    [[nodiscard]] bool is_end_of_generation(int32_t token) const override { return token == kEnd; }

    void decode(std::span<const dspark::BatchRow> rows) override {
        if (fail_next) {
            fail_next = false;
            throw dspark::DecodeError("cannot decode a batch: made to fail");
        }
        n_rows_last = static_cast<int32_t>(rows.size());
        logits_.assign(rows.size(), {});
        has_output_.assign(rows.size(), false);
        for (size_t i = 0; i < rows.size(); ++i) {
            std::vector<int32_t>& cells = cells_[rows[i].sequence];
            if (rows[i].position != static_cast<int32_t>(cells.size())) {
                throw std::logic_error("rows must continue the cache without gaps");
            }
            const int32_t before = cells.empty() ? 0 : cells.back();
            cells.push_back(rows[i].token);
            logits_[i] = table(before, rows[i].token, 0.0F);
            logits_[i][kEnd] += end_logit_;
            has_output_[i] = rows[i].output;
            if (rows[i].token == poisoned_token) {
                logits_[i].fill(std::nanf(""));
            }
        }
    }

    [[nodiscard]] std::span<const float> logits(int32_t row) override {
        if (!has_output_.at(static_cast<size_t>(row))) {
            throw std::logic_error("logits were not asked for");
        }
        return logits_.at(static_cast<size_t>(row));
    }

    void remove(int32_t sequence, int32_t begin) override {
        std::vector<int32_t>& cells = cells_[sequence];
        if (static_cast<size_t>(begin) < cells.size()) {
            cells.resize(static_cast<size_t>(begin));
        }
    }

    [[nodiscard]] int32_t last_position(int32_t sequence) const override {
        const auto found = cells_.find(sequence);
        return found == cells_.end() ? -1 : static_cast<int32_t>(found->second.size()) - 1;
    }

    [[nodiscard]] bool can_share() const override { return true; }

    void copy(int32_t from, int32_t to, int32_t begin, int32_t end) override {
        if (last_position(to) != begin - 1 || last_position(from) < end - 1) {
            throw std::logic_error("copied cells must continue the cache without gaps");
        }
        const std::vector<int32_t> source = cells_[from];
        cells_[to].insert(cells_[to].end(), source.begin() + begin, source.begin() + end);
    }

    [[nodiscard]] bool can_shift() const override { return can_shift_cells; }

    void shift(int32_t sequence, int32_t begin, int32_t n) override {
        if (fail_next_shift) {
            fail_next_shift = false;
            throw dspark::DecodeError("cannot shift cells: made to fail");
        }
        std::vector<int32_t>& cells = cells_[sequence];
        if (begin + n > static_cast<int32_t>(cells.size())) {
            throw std::logic_error("forgotten cells must be in the cache");
        }
        cells.erase(cells.begin() + begin, cells.begin() + begin + n);
    }

    [[nodiscard]] const std::vector<int32_t>& cells(int32_t sequence) { return cells_[sequence]; }

    bool fail_next = false;
    int32_t poisoned_token = -1; // NaN logits after this token
    int32_t n_rows_last = 0;
    bool can_shift_cells = true;
    bool fail_next_shift = false;

  private:
    float end_logit_;
    std::map<int32_t, std::vector<int32_t>> cells_;
    std::vector<Logits> logits_;
    std::vector<bool> has_output_;
};

// Conditions each slot on the two tokens before it; its knowledge of the token before the anchor comes from the script
// of injected rows only through positions, so it guesses that one as 0.
class Drafter final : public dspark::Drafter {
  public:
    explicit Drafter(int32_t block_size) : block_size_(block_size) {}

    [[nodiscard]] int32_t block_size() const override { return block_size_; }
    [[nodiscard]] bool has_confidence() const override { return false; }

    void draft(std::span<const dspark::DraftTask> tasks, std::span<dspark::BlockDraft> drafts) override {
        for (size_t i = 0; i < tasks.size(); ++i) {
            draft_one(tasks[i], drafts[i]);
        }
    }

    void inject(std::span<const dspark::ContextRow> rows) override {
        for (const dspark::ContextRow& row : rows) {
            if (row.position != last_position(row.sequence) + 1) {
                throw std::logic_error("context rows must be injected without gaps");
            }
            last_[row.sequence] = row.position;
        }
    }

    void remove(int32_t sequence, int32_t begin) override {
        last_[sequence] = std::min(last_position(sequence), begin - 1);
    }

    [[nodiscard]] bool can_share() const override { return true; }

    void copy(int32_t from, int32_t to, int32_t end) override { last_[to] = std::min(last_position(from), end - 1); }

    [[nodiscard]] bool can_shift() const override { return true; }

    void shift(int32_t sequence, int32_t begin, int32_t n) override {
        if (begin + n - 1 > last_position(sequence)) {
            throw std::logic_error("forgotten rows must be in the cache");
        }
        last_[sequence] -= n;
    }

    [[nodiscard]] int32_t last_position(int32_t sequence) const override {
        const auto found = last_.find(sequence);
        return found == last_.end() ? -1 : found->second;
    }

  private:
    void draft_one(const dspark::DraftTask& task, dspark::BlockDraft& draft) {
        if (last_position(task.sequence) != task.start - 1) {
            throw std::logic_error("draft context must end right before the anchor");
        }
        draft.tokens.clear();
        draft.probs.assign(static_cast<size_t>(block_size_), {});
        draft.confidence_logits.clear();
        int32_t before = 0;
        int32_t last = task.anchor;
        for (int32_t k = 0; k < block_size_; ++k) {
            const Logits logits = table(before, last, 0.7F);
            dspark::Distribution& probs = draft.probs[static_cast<size_t>(k)];
            builder_.truncated_distribution(logits, task.truncation, probs);
            const auto start = static_cast<uint64_t>(task.start);
            const double u = task.random.draft_sample(start, start + 1 + static_cast<uint64_t>(k));
            const int32_t token = dspark::sample(probs, u);
            draft.tokens.push_back(token);
            before = last;
            last = token;
        }
    }

    int32_t block_size_;
    std::map<int32_t, int32_t> last_;
    dspark::DistributionBuilder builder_;
};

} // namespace toy
