// The search for a drafter's candidates as the last node of its graph: ggml's threads share the rows of logits while
// these are still in their caches. Owns: nothing. Must not know: the head. For logits in the host's memory.
#pragma once

#include "top_k.h"

#include "ggml.h"

#include <cstdint>

namespace dspark {

// Returns rows of TopRows::out, one for each row of `logits`: the k largest by target ids.
ggml_tensor* append_search(ggml_context* context, ggml_cgraph* graph, ggml_tensor* logits, int32_t k);

} // namespace dspark
