// Which of the two NEON instruction sets this processor has. Compiled for the oldest 64-bit ARM.
#include "kernels/neon.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif

namespace dspark::kernels {

namespace {

struct Features {
    bool has_dotprod = false;
    bool has_i8mm = false;
};

#if defined(__APPLE__)
bool has_feature(const char* name) {
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

Features find_features() {
    return {has_feature("hw.optional.arm.FEAT_DotProd"), has_feature("hw.optional.arm.FEAT_I8MM")};
}
#elif defined(__linux__)
// Bits of the kernel's interface; named in <asm/hwcap.h>, which older systems have without the second.
constexpr unsigned long kDotprodBit = 1UL << 20; // HWCAP_ASIMDDP
constexpr unsigned long kI8mmBit = 1UL << 13;    // HWCAP2_I8MM

Features find_features() { return {(getauxval(AT_HWCAP) & kDotprodBit) != 0, (getauxval(AT_HWCAP2) & kI8mmBit) != 0}; }
#else
Features find_features() { return {}; }
#endif

} // namespace

const Isa* find_neon_dotprod() { return find_features().has_dotprod ? &neon::kDotprod : nullptr; }

// Both are asked for: the compiler may use either in that file.
const Isa* find_neon_i8mm() {
    const Features features = find_features();
    return features.has_dotprod && features.has_i8mm ? &neon::kI8mm : nullptr;
}

} // namespace dspark::kernels
