// AVX-VNNI: Alder Lake and later, which lack AVX-512; Zen 5. The same code runs in the tests as avx512vl.cpp; this
// encoding of it has been compiled but not run.
#define DSPARK_LANES 8
#include "kernels/floats.h"
#include "kernels/strips.h"
#include "kernels/x86.h"

#include <cpuid.h>

namespace dspark::kernels {
namespace {

bool has_avx_vnni() { // older compilers do not know its name
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}

} // namespace

const Isa* find_avxvnni() {
    static constexpr Isa kIsa{"avxvnni", prepare_x86, multiply, kLanes, multiply_floats};
    return find_avx2() != nullptr && has_avx_vnni() ? &kIsa : nullptr;
}

} // namespace dspark::kernels
