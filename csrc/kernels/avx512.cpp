// AVX-512 with VNNI: Cascade Lake, Ice Lake, Zen 4 and later.
#define DSPARK_LANES 16
#include "kernels/floats.h"
#include "kernels/strips.h"
#include "kernels/x86.h"

namespace dspark::kernels {

const Isa* find_avx512() {
    static constexpr Isa kIsa{"avx512", prepare_x86, multiply, kLanes, multiply_floats};
    return has_avx512_vnni() ? &kIsa : nullptr;
}

} // namespace dspark::kernels
