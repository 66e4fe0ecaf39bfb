// The largest of rows of logits against plain sorts: ties, infinities, extremes, lengths around the groups' ends.
#include "check.h"
#include "noise.h"
#include "top_k.h"
#include "vector_loops.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

using namespace dspark;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

void test_kth_largest() {
    std::vector<int32_t> scratch;
    for (const size_t n : {1, 2, 15, 16, 100, 1000}) {
        for (const float step : {100.0F, 1.0F, 1e-6F}) { // all tied, many, none
            std::vector<float> x = noise(n, 5);
            std::ranges::transform(x, x.begin(), [&](float value) { return step * std::round(value / step); });
            x[n / 2] = -kInf;
            x[n / 3] = -0.0F;
            std::vector<float> sorted = x;
            std::sort(sorted.rbegin(), sorted.rend());
            for (size_t k = 1; k <= n; k += 1 + n / 7) {
                CHECK(kth_largest(x, k, scratch) == sorted[k - 1]);
            }
            CHECK(kth_largest(x, n, scratch) == sorted[n - 1]);
        }
    }
    CHECK(kth_largest(std::vector<float>(40, -kInf), 7, scratch) == -kInf);
}

// Against a plain sort: ties, -inf, extremes, lengths around the groups' ends.
void test_top_rows() {
    for (const size_t n : {1, 63, 64, 65, 300, 4097, 40000}) {
        for (const float step : {1e3F, 1.0F, 1e-6F}) { // all tied, many, none
            std::vector<float> row = noise(n, n);
            std::ranges::transform(row, row.begin(), [&](float value) { return step * std::round(value / step); });
            for (size_t i = 0; i < n; i += 7) {
                row[i] = i % 2 == 0 ? -kInf : std::numeric_limits<float>::lowest();
            }
            row[n - 1] = std::numeric_limits<float>::max();
            row[n / 2] = -0.0F;
            std::vector<Ranked> sorted;
            for (size_t i = 0; i < n; ++i) {
                if (row[i] > -kInf) {
                    sorted.push_back({row[i], static_cast<int32_t>(i)});
                }
            }
            std::sort(sorted.begin(), sorted.end(), ranks_before);
            for (const int32_t k : {1, 16, 64, 256, 5000}) {
                std::vector<Ranked> expected(sorted.begin(),
                                             sorted.begin() + std::min<std::ptrdiff_t>(k, std::ssize(sorted)));
                std::ranges::sort(expected, {}, &Ranked::id);
                TopSearch search;
                CHECK(search.scan(row));
                CHECK(search.largest() == sorted.front().weight);
                const std::span<const Ranked> found = search.top(k);
                const auto is_same = [](const Ranked& a, const Ranked& b) {
                    return a.id == b.id && a.weight == b.weight;
                };
                CHECK(std::ranges::equal(found, expected, is_same));
            }
        }
    }
}

void test_top_rows_by_parts() {
    constexpr int64_t kRows = 5;
    constexpr int64_t kValues = 700;
    constexpr int64_t kStride = 720;
    constexpr int32_t kTop = 20;
    std::vector<float> rows = noise(kRows * kStride, 3);
    rows[3 * kStride + 11] = std::numeric_limits<float>::quiet_NaN();
    std::fill_n(rows.begin() + 4 * kStride, kValues, -kInf);
    rows[4 * kStride + 5] = 1.0F;
    TopSearch search;
    std::array<int64_t, kValues> reduced{};
    for (size_t i = 0; i < reduced.size(); ++i) {
        reduced[i] = 3 * static_cast<int64_t>(i) + 1;
    }
    for (const int n_parts : {1, 2, 3, 9}) {
        const int64_t* names = n_parts % 2 == 0 ? reduced.data() : nullptr;
        std::vector<Ranked> out(kRows * (kTop + 1), {-7.0F, -7});
        for (int part = 0; part < n_parts; ++part) {
            top_rows({rows.data(), kStride, kRows, kValues, kTop, names, out.data()}, part, n_parts);
        }
        for (int64_t row = 0; row < kRows; ++row) {
            const Ranked* of_row = out.data() + row * (kTop + 1);
            const bool is_valid = search.scan(std::span(rows).subspan(static_cast<size_t>(row * kStride), kValues));
            CHECK(is_valid == (row != 3));
            CHECK(of_row->id == (row == 3 ? -1 : row == 4 ? 1 : kTop));
            const std::span<const Ranked> found = is_valid ? search.top(kTop) : std::span<const Ranked>{};
            for (size_t i = 0; i < found.size(); ++i) {
                const int32_t id = names == nullptr ? found[i].id : 3 * found[i].id + 1;
                CHECK(of_row[1 + i].id == id && of_row[1 + i].weight == found[i].weight);
            }
        }
    }
}

} // namespace

int main() {
    test_kth_largest();
    test_top_rows();
    test_top_rows_by_parts();
    return check_summary();
}
