// For the tests: whether graphs were grouped (ggml_groups.h), without ggml's headers.
#pragma once

namespace dspark::kernels {

void note_grouped_nodes(int n); // of the last graph, computed in the place of others
[[nodiscard]] int n_grouped_nodes();

} // namespace dspark::kernels
