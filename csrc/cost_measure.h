// Times the passes an engine can make, on random tokens. Owns: which sizes, how often, within what time. Must not know:
// requests, llama.cpp. The caches must be empty and are left so.
#pragma once

#include "cost_table.h"
#include "drafter.h"
#include "target.h"

namespace dspark {

struct MeasureOptions {
    int32_t n_sequences = 1;
    int32_t n_rows = 8;     // most rows with logits of one pass
    int32_t n_batch = 512;  // most rows of one pass
    int32_t n_cells = 4096; // of one sequence
    double budget_ms = 3000;
    // A few sizes of one request only, and their least times: enough to tell whether curves from elsewhere are too
    // dear.
    bool is_look = false;
};

// Lower quartiles of interleaved repetitions, since noise only adds; what does not fit the budget is left out, from the
// largest sizes on.
[[nodiscard]] CostCurves measure_costs(Target& target, Drafter* drafter, const MeasureOptions& options);

} // namespace dspark
