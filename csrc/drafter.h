// What the engine needs of a drafter: draft whole blocks for several requests, take in the target's features of
// committed rows, forget. LlamaDrafter is the real one, ScriptedDrafter plays a script. Called by the engine's thread.
#pragma once

#include "sequential_head.h"
#include "target.h"

#include <algorithm>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

namespace dspark {

struct DraftTask {
    uint64_t request_id = 0;
    int32_t sequence = 0;
    int32_t anchor = 0; // x_0: the last committed token
    int32_t start = 0;  // its position; slot k predicts position start + 1 + k
    Truncation truncation;
    RandomStream random{0};
    const SamplingOptions* sampling = nullptr; // lets the draft follow bias and penalties
    TokenCounts* counts = nullptr;
};

// A committed row of the target's last decode: its features become drafter context at `position`.
struct ContextRow {
    int32_t batch_row;
    int32_t position;
    int32_t sequence;
};

struct DrafterTimes {
    double inject_ms = 0;  // passes that write context rows into the drafter's cache
    double forward_ms = 0; // passes over blocks
    double head_ms = 0;    // the sequential head
};

class Drafter {
  public:
    virtual ~Drafter() = default;

    // Slots that predict; always drafted whole, since the slots see each other (DESIGN section 2, block).
    [[nodiscard]] virtual int32_t block_size() const = 0;
    [[nodiscard]] virtual bool has_confidence() const = 0;

    virtual void draft(std::span<const DraftTask> tasks, std::span<BlockDraft> drafts) = 0;

    // Before the first target pass whose rows inject() will be given: the target then begins to keep their features.
    virtual void begin_recording() {}
    // Takes in rows of the target's last decode, ascending positions per sequence. They may wait in memory until a
    // draft needs them. A gap makes the sequence start anew behind it.
    virtual void inject(std::span<const ContextRow> rows) = 0;

    // Forgets the context rows of `sequence` at positions >= begin.
    virtual void remove(int32_t sequence, int32_t begin) = 0;
    void forget(int32_t sequence) { remove(sequence, 0); }
    // As Target's.
    [[nodiscard]] virtual bool can_share() const { return false; }
    // `to` holds afterwards what `from` holds at positions < end, and nothing else.
    virtual void copy(int32_t from, int32_t to, int32_t end) {
        throw std::logic_error("rows before " + std::to_string(end) + " of " + std::to_string(from) +
                               " cannot be shared with " + std::to_string(to));
    }
    [[nodiscard]] virtual bool can_shift() const { return false; }
    virtual void shift(int32_t sequence, int32_t begin, int32_t n) {
        throw std::logic_error("rows " + std::to_string(begin + n) + " and later of " + std::to_string(sequence) +
                               " cannot be moved");
    }
    // The most leading tokens, at most n, behind which another text finds the context here that its drafts look at.
    [[nodiscard]] virtual int32_t reusable(int32_t sequence, int32_t n) const {
        return std::min(n, last_position(sequence) + 1);
    }
    // Of what inject() has taken in, waiting rows included; -1: empty.
    [[nodiscard]] virtual int32_t last_position(int32_t sequence) const = 0;
    // Rows that the next draft of this sequence has to inject first.
    [[nodiscard]] virtual int32_t n_waiting(int32_t sequence) const {
        (void)sequence;
        return 0;
    }
    // Since the last call.
    [[nodiscard]] virtual DrafterTimes take_times() { return {}; }
};

} // namespace dspark
