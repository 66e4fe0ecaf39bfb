// Asked of the processor once, and compiled for any: what is initialised here runs before an instruction set is chosen.
#include "kernels/x86.h"

#include <cpuid.h>

namespace dspark::kernels {
namespace {

bool is_zen5_or_later() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid(0, &eax, &ebx, &ecx, &edx) == 0 || ebx != signature_AMD_ebx) {
        return false;
    }
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 8 & 0xf) + (eax >> 20 & 0xff) >= 0x1a;
}

} // namespace

const bool prefetches_to_l1 = is_zen5_or_later();

} // namespace dspark::kernels
