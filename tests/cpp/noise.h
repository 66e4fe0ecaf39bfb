// Numbers for tests.
#pragma once

#include "random.h"

#include <cstddef>
#include <cstdint>
#include <vector>

// Deterministic noise, roughly normal.
inline std::vector<float> noise(size_t n, uint64_t seed) {
    const dspark::RandomStream random(seed);
    std::vector<float> out(n);
    for (size_t i = 0; i < n; ++i) {
        double sum = -6.0;
        for (uint64_t k = 0; k < 12; ++k) {
            sum += random.draft_sample(i - k, i);
        }
        out[i] = static_cast<float>(sum);
    }
    return out;
}
