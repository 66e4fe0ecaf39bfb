// What the engine needs of a drafter: draft whole blocks for several requests, take in the target's features of
// committed rows, forget. LlamaDrafter is the real one, ScriptedDrafter plays a script. Called by the engine's thread.
#pragma once

#include "sequential_head.h"
#include "target.h"

#include <cstdint>
#include <span>

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

class Drafter {
  public:
    virtual ~Drafter() = default;

    // Slots that predict; always drafted whole, since the slots see each other (DESIGN section 2, block).
    [[nodiscard]] virtual int32_t block_size() const = 0;
    [[nodiscard]] virtual bool has_confidence() const = 0;

    virtual void draft(std::span<const DraftTask> tasks, std::span<BlockDraft> drafts) = 0;

    // Injects rows of the target's last decode, ascending positions per sequence.
    virtual void inject(std::span<const ContextRow> rows) = 0;

    virtual void forget(int32_t sequence) = 0;
    [[nodiscard]] virtual int32_t last_position(int32_t sequence) const = 0; // -1: empty
};

} // namespace dspark
