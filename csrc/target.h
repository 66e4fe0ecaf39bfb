// What the engine needs of a target model: decode rows, read logits and features, forget rows. LlamaTarget is the real
// one; the tests bring toy targets whose distribution is known. Owned and called by the engine's thread.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>

namespace dspark {

// One row of a batch: `token` stands at `position` of `sequence`; `output` asks for its logits.
struct BatchRow {
    int32_t token;
    int32_t position;
    int32_t sequence;
    bool output;
};

class Target {
  public:
    virtual ~Target() = default;

    [[nodiscard]] virtual int32_t n_vocab() const = 0;
    [[nodiscard]] virtual bool is_end_of_generation(int32_t token) const = 0;

    // One forward pass over all rows; rows of one sequence stand together, positions ascending and gapless after what
    // the cache holds. Throws DecodeError, and then holds none of the rows.
    virtual void decode(std::span<const BatchRow> rows) = 0;

    // Views of the last decode by batch row; dead after the next one.
    [[nodiscard]] virtual std::span<const float> logits(int32_t row) = 0; // (n_vocab)

    // Forgets the cells of `sequence` at positions >= begin: all of them, or at most max_rollback() of the last decode.
    virtual void remove(int32_t sequence, int32_t begin) = 0;
    // A recurrent state goes back a few positions only, and once after each decode.
    [[nodiscard]] virtual int32_t max_rollback() const { return std::numeric_limits<int32_t>::max(); }
    [[nodiscard]] virtual int32_t last_position(int32_t sequence) const = 0; // -1: empty

    // Whether any cells can be removed and sequences may share cells: only then is copy() called.
    [[nodiscard]] virtual bool can_share() const { return false; }
    // Cells of `from` at positions [begin, end) become those of `to` as well, which ends at begin - 1.
    virtual void copy(int32_t from, int32_t to, int32_t begin, int32_t end) {
        throw std::logic_error("cells " + std::to_string(begin) + " .. " + std::to_string(end) + " of " +
                               std::to_string(from) + " cannot be shared with " + std::to_string(to));
    }

    [[nodiscard]] virtual bool can_shift() const { return false; }
    // Forgets the cells of `sequence` at positions [begin, begin + n) and moves the later ones n positions to the
    // front; cells that another sequence shares stay where they are for it.
    virtual void shift(int32_t sequence, int32_t begin, int32_t n) {
        throw std::logic_error("cells " + std::to_string(begin + n) + " and later of " + std::to_string(sequence) +
                               " cannot be moved");
    }
};

} // namespace dspark
