#include "scripted_drafter.h"

#include <algorithm>
#include <stdexcept>

namespace dspark {

ScriptedDrafter::Mode parse_script_mode(const std::string& name) {
    if (name == "right") {
        return ScriptedDrafter::Mode::right;
    }
    if (name == "wrong") {
        return ScriptedDrafter::Mode::wrong;
    }
    if (name == "alternating") {
        return ScriptedDrafter::Mode::alternating;
    }
    throw std::invalid_argument("mode must be right, wrong or alternating, got " + name);
}

ScriptedDrafter::ScriptedDrafter(std::vector<std::vector<int32_t>> scripts, Mode mode, int32_t block_size,
                                 int32_t n_vocab)
    : scripts_(std::move(scripts)), mode_(mode), block_size_(block_size), n_vocab_(n_vocab) {
    if (scripts_.empty() || block_size < 1 || n_vocab < 2) {
        throw std::invalid_argument("a scripted drafter needs a script, block_size >= 1 and n_vocab >= 2");
    }
}

int32_t ScriptedDrafter::last_position(int32_t sequence) const {
    const auto found = last_positions_.find(sequence);
    return found == last_positions_.end() ? -1 : found->second;
}

void ScriptedDrafter::remove(int32_t sequence, int32_t begin) {
    last_positions_[sequence] = std::min(last_position(sequence), begin - 1);
    n_shifted_[sequence] = begin == 0 ? 0 : n_shifted_[sequence];
}

void ScriptedDrafter::shift(int32_t sequence, int32_t begin, int32_t n) {
    if (last_position(sequence) < begin + n - 1) {
        throw std::logic_error("shifted rows must be in the cache");
    }
    last_positions_[sequence] -= n;
    n_shifted_[sequence] += n;
}

void ScriptedDrafter::copy(int32_t from, int32_t to, int32_t end) {
    last_positions_[to] = std::min(last_position(from), end - 1);
}

int32_t ScriptedDrafter::token_at(uint64_t request_id, int32_t position) const {
    const auto& script = scripts_[static_cast<size_t>(request_id - 1) % scripts_.size()];
    const auto index = static_cast<size_t>(position);
    const int32_t right = index < script.size() ? script[index] : 0;
    const bool is_wrong = mode_ == Mode::wrong || (mode_ == Mode::alternating && position % 2 == 1);
    return is_wrong ? (right + 1) % n_vocab_ : right;
}

void ScriptedDrafter::draft(std::span<const DraftTask> tasks, std::span<BlockDraft> drafts) {
    for (size_t i = 0; i < tasks.size(); ++i) {
        if (last_position(tasks[i].sequence) != tasks[i].start - 1) {
            throw std::logic_error("draft context must end right before the anchor");
        }
        BlockDraft& draft = drafts[i];
        draft.tokens.clear();
        draft.probs.assign(static_cast<size_t>(block_size_), {});
        draft.confidence_logits.clear();
        for (int32_t k = 0; k < block_size_; ++k) {
            const int32_t start = tasks[i].start + n_shifted_[tasks[i].sequence];
            draft.tokens.push_back(token_at(tasks[i].request_id, start + 1 + k));
            draft.probs[static_cast<size_t>(k)].assign_single(draft.tokens.back());
        }
    }
}

void ScriptedDrafter::inject(std::span<const ContextRow> rows) {
    for (const ContextRow& row : rows) {
        if (row.position != last_position(row.sequence) + 1) {
            throw std::logic_error("context rows must be injected without gaps");
        }
        last_positions_[row.sequence] = row.position;
    }
}

} // namespace dspark
