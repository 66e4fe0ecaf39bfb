// The 256-bit form of VNNI on processors with AVX-512: the code of avxvnni.cpp where AVX-VNNI itself is missing.
#define DSPARK_LANES 8
#include "kernels/floats.h"
#include "kernels/strips.h"
#include "kernels/x86.h"

namespace dspark::kernels {

const Isa* find_avx512vl() {
    static constexpr Isa kIsa{"avx512vl", prepare_x86, multiply, kLanes, multiply_floats};
    return has_avx512_vnni() ? &kIsa : nullptr;
}

} // namespace dspark::kernels
