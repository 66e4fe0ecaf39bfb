// A drafter that plays a script: always right, always wrong, or both in turn. The engine's tests use it to force every
// accept pattern; the text must not change. Owns the scripts. Must not know models.
#pragma once

#include "drafter.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace dspark {

class ScriptedDrafter final : public Drafter {
  public:
    enum class Mode { right, wrong, alternating };

    // scripts[i]: all tokens (prompt and continuation) of the i-th submitted request; later requests start over.
    ScriptedDrafter(std::vector<std::vector<int32_t>> scripts, Mode mode, int32_t block_size, int32_t n_vocab);

    [[nodiscard]] int32_t block_size() const override { return block_size_; }
    [[nodiscard]] bool has_confidence() const override { return false; }
    void draft(std::span<const DraftTask> tasks, std::span<BlockDraft> drafts) override;
    void inject(std::span<const ContextRow> rows) override; // throws std::logic_error on a gap
    void remove(int32_t sequence, int32_t begin) override;
    [[nodiscard]] bool can_share() const override { return true; }
    void copy(int32_t from, int32_t to, int32_t end) override;
    [[nodiscard]] bool can_shift() const override { return true; }
    void shift(int32_t sequence, int32_t begin, int32_t n) override;
    [[nodiscard]] int32_t last_position(int32_t sequence) const override;

  private:
    [[nodiscard]] int32_t token_at(uint64_t request_id, int32_t position) const;

    std::vector<std::vector<int32_t>> scripts_;
    Mode mode_;
    int32_t block_size_;
    int32_t n_vocab_;
    std::map<int32_t, int32_t> last_positions_;
    std::map<int32_t, int32_t> n_shifted_; // positions by which a sequence's text lies before its script
};

[[nodiscard]] ScriptedDrafter::Mode parse_script_mode(const std::string& name);

} // namespace dspark
