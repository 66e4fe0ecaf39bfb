// Attention with AVX2, FMA and F16C. Compiled with these flags.
#include "kernels/attention_lanes8.h"

namespace dspark::kernels {
namespace {

void attend_avx2(const Attention& attention, const AttentionRun& run, AttentionHeads heads, AttentionScratch& scratch) {
    RunRows<Avx2>(attention, run, heads, scratch).compute();
}

} // namespace

AttendRun find_attend_avx2() {
    const bool is_supported =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return is_supported ? attend_avx2 : nullptr;
}

} // namespace dspark::kernels
