// AVX2 with FMA and F16C: Haswell, Zen and later.
#define DSPARK_LANES 8
#include "kernels/floats.h"
#include "kernels/strips.h"
#include "kernels/x86.h"

namespace dspark::kernels {

const Isa* find_avx2() {
    static constexpr Isa kIsa{"avx2", prepare_x86, multiply, kLanes, multiply_floats};
    const bool is_supported =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return is_supported ? &kIsa : nullptr;
}

} // namespace dspark::kernels
