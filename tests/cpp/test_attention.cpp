// Attention against float64, and what must not change a bit of a row: the batch around it, the cells it lies in, the
// sequences beside it, the threads. Runs under an emulator too.
#include "check.h"
#include "kernel_oracle.h"
#include "kernels/attention_run.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

using namespace dspark::kernels;
using oracle::Random;

namespace {

AttendRun attend_run = nullptr; // of the instruction set that is tested

struct Sizes {
    int64_t n_tokens, n_heads, n_kv_heads, n_cells, key_size, value_size;
};

struct Case {
    Sizes sizes;
    float scale = 0.125F;
    std::vector<float> q;       // (tokens, heads, key_size)
    std::vector<uint16_t> k, v; // (cells, kv_heads, size)
    std::vector<uint16_t> mask; // (tokens, cells)
};

// A normal half of magnitude 2^-4 to just below 2.
uint16_t random_half(Random& random) {
    return static_cast<uint16_t>(static_cast<uint16_t>(random.next() & 0x83ff) | (11 + random.below(5)) << 10);
}

Case make_case(Sizes sizes, Random& random) {
    Case made{sizes, 0.125F, {}, {}, {}, {}};
    made.q.resize(static_cast<size_t>(sizes.n_tokens * sizes.n_heads * sizes.key_size));
    std::ranges::generate(made.q, [&] { return 2.0F * random.value(); });
    made.k.resize(static_cast<size_t>(sizes.n_cells * sizes.n_kv_heads * sizes.key_size));
    made.v.resize(static_cast<size_t>(sizes.n_cells * sizes.n_kv_heads * sizes.value_size));
    std::ranges::generate(made.k, [&] { return random_half(random); });
    std::ranges::generate(made.v, [&] { return random_half(random); });
    made.mask.resize(static_cast<size_t>(sizes.n_tokens * sizes.n_cells));
    std::ranges::generate(made.mask, [&] { return random.below(3) == 0 ? kHidden : uint16_t{0}; });
    return made;
}

std::vector<float> run(const Case& made, int n_threads = 1) {
    const Sizes& s = made.sizes;
    std::vector<float> y(static_cast<size_t>(s.n_tokens * s.n_heads * s.value_size), 1e30F);
    for (int thread = 0; thread < n_threads; ++thread) {
        Attention a;
        a.n_tokens = s.n_tokens;
        a.n_heads = s.n_heads;
        a.n_kv_heads = s.n_kv_heads;
        a.n_cells = s.n_cells;
        a.key_size = s.key_size;
        a.value_size = s.value_size;
        a.scale = made.scale;
        a.q = made.q.data();
        a.q_token_stride = s.n_heads * s.key_size;
        a.q_head_stride = s.key_size;
        a.k = made.k.data();
        a.k_head_stride = static_cast<size_t>(s.key_size) * 2;
        a.k_cell_stride = a.k_head_stride * static_cast<size_t>(s.n_kv_heads);
        a.v = made.v.data();
        a.v_head_stride = static_cast<size_t>(s.value_size) * 2;
        a.v_cell_stride = a.v_head_stride * static_cast<size_t>(s.n_kv_heads);
        a.mask = made.mask.empty() ? nullptr : made.mask.data();
        a.mask_stride = s.n_cells;
        a.y = y.data();
        a.thread = thread;
        a.n_threads = n_threads;
        CHECK(attend_with(attend_run, a));
    }
    return y;
}

double score(const Case& made, int64_t token, int64_t head, int64_t cell) {
    const Sizes& s = made.sizes;
    const int64_t kv_head = head / (s.n_heads / s.n_kv_heads);
    double sum = 0.0;
    for (int64_t d = 0; d < s.key_size; ++d) {
        sum += static_cast<double>(made.q[static_cast<size_t>((token * s.n_heads + head) * s.key_size + d)]) *
               oracle::half_value(made.k[static_cast<size_t>((cell * s.n_kv_heads + kv_head) * s.key_size + d)]);
    }
    return sum * static_cast<double>(made.scale);
}

bool sees(const Case& made, int64_t token, int64_t cell) {
    return made.mask.empty() || made.mask[static_cast<size_t>(token * made.sizes.n_cells + cell)] != kHidden;
}

// A row in float64, and how far a float row may be from it.
std::vector<double> exact_row(const Case& made, int64_t token, int64_t head, double& bound) {
    const Sizes& s = made.sizes;
    const int64_t kv_head = head / (s.n_heads / s.n_kv_heads);
    std::vector<double> weights(static_cast<size_t>(s.n_cells), 0.0), y(static_cast<size_t>(s.value_size), 0.0);
    double most = -INFINITY, total = 0.0, largest_score = 0.0;
    for (int64_t c = 0; c < s.n_cells; ++c) {
        const double value = sees(made, token, c) ? score(made, token, head, c) : -INFINITY;
        weights[static_cast<size_t>(c)] = value;
        most = std::max(most, value);
        largest_score = std::isfinite(value) ? std::max(largest_score, std::abs(value)) : largest_score;
    }
    double largest_value = 0.0;
    for (int64_t c = 0; c < s.n_cells && std::isfinite(most); ++c) {
        double& weight = weights[static_cast<size_t>(c)];
        weight = std::exp(weight - most);
        total += weight;
        for (int64_t d = 0; d < s.value_size; ++d) {
            const double v =
                oracle::half_value(made.v[static_cast<size_t>((c * s.n_kv_heads + kv_head) * s.value_size + d)]);
            y[static_cast<size_t>(d)] += weight * v;
            largest_value = weight > 0.0 ? std::max(largest_value, std::abs(v)) : largest_value;
        }
    }
    for (double& value : y) {
        value = total > 0.0 ? value / total : 0.0;
    }
    // A score is off by key_size roundings of 2^-24 of a sum at most 4 times its own size here, its weight by as much
    // and 4 more roundings; each of n terms by half a step of 2^-21 of the largest value, times 16 or twice the total.
    const double relative = (static_cast<double>(s.key_size) * 4.0 * std::max(largest_score, 1.0) + 4.0) * 0x1p-24;
    bound = largest_value *
            (2.0 * relative + static_cast<double>(s.n_cells) * 0x1p-22 * std::min(2.0, 16.0 / std::max(total, 1.0)));
    return y;
}

void check_against_float64(const Case& made) {
    const std::vector<float> y = run(made);
    bool is_close = true;
    double worst = 0.0;
    for (int64_t row = 0; row < made.sizes.n_tokens * made.sizes.n_heads; ++row) {
        double bound = 0.0;
        const std::vector<double> exact = exact_row(made, row / made.sizes.n_heads, row % made.sizes.n_heads, bound);
        for (size_t d = 0; d < exact.size(); ++d) {
            const double error =
                std::abs(static_cast<double>(y[static_cast<size_t>(row) * exact.size() + d]) - exact[d]);
            worst = std::max(worst, error);
            is_close = is_close && error <= bound;
        }
    }
    CHECK(is_close);
    CHECK(worst < 2e-5); // values below 2: what ggml's sums in f16 miss by 1e-3
}

void test_close_to_float64() {
    Random random(1);
    for (const Sizes sizes : {Sizes{1, 2, 1, 40, 64, 64}, Sizes{5, 4, 2, 129, 32, 64}, Sizes{9, 16, 8, 300, 128, 128},
                              Sizes{17, 3, 3, 64, 40, 8}, Sizes{3, 24, 1, 77, 8, 40}, Sizes{2, 2, 2, 5000, 64, 32}}) {
        check_against_float64(make_case(sizes, random));
    }
}

void test_sharp_and_flat_weights() {
    Random random(2);
    for (const float scale : {0.0F, 1e-3F, 3.0F, 20.0F}) {
        Case made = make_case({3, 2, 1, 2000, 64, 64}, random);
        made.scale = scale;
        const std::vector<float> y = run(made);
        for (const float value : y) {
            CHECK(std::isfinite(value) && std::abs(value) <= 2.0F);
        }
        if (scale <= 1e-3F) { // sharper ones magnify the rounding of the scores
            check_against_float64(made);
        }
    }
}

void test_any_number_of_threads() {
    Random random(3);
    const Case made = make_case({7, 32, 16, 60, 16, 16}, random);
    const std::vector<float> expected = run(made);
    for (int n_threads = 2; n_threads <= 40; ++n_threads) {
        CHECK(run(made, n_threads) == expected);
    }
}

Case one_token(const Case& made, int64_t token) {
    Case out = made;
    const auto width = static_cast<std::ptrdiff_t>(made.sizes.n_heads * made.sizes.key_size);
    out.sizes.n_tokens = 1;
    out.q.assign(made.q.begin() + token * width, made.q.begin() + (token + 1) * width);
    out.mask.assign(made.mask.begin() + token * made.sizes.n_cells,
                    made.mask.begin() + (token + 1) * made.sizes.n_cells);
    return out;
}

void test_row_alone_equals_row_in_a_batch() {
    Random random(4);
    for (const int64_t n_tokens : {2, 3, 8, 16, 17, 64, 100}) {
        const Case made = make_case({n_tokens, 4, 2, 600, 32, 32}, random);
        const std::vector<float> batch = run(made);
        const size_t width = batch.size() / static_cast<size_t>(n_tokens);
        for (int64_t token = 0; token < n_tokens; ++token) {
            const std::vector<float> alone = run(one_token(made, token));
            CHECK(std::memcmp(alone.data(), batch.data() + static_cast<size_t>(token) * width, width * sizeof(float)) ==
                  0);
        }
    }
}

// The cells in another order, among hidden ones whose keys and values are huge.
Case scattered(const Case& made, Random& random) {
    Case out = made;
    const int64_t n = made.sizes.n_cells;
    out.sizes.n_cells = 3 * n + 5;
    std::vector<int64_t> places(static_cast<size_t>(out.sizes.n_cells));
    std::iota(places.begin(), places.end(), 0);
    for (size_t i = places.size() - 1; i > 0; --i) {
        std::swap(places[i], places[static_cast<size_t>(random.below(static_cast<int64_t>(i + 1)))]);
    }
    const auto k_width = static_cast<size_t>(made.sizes.n_kv_heads * made.sizes.key_size);
    const auto v_width = static_cast<size_t>(made.sizes.n_kv_heads * made.sizes.value_size);
    out.k.assign(k_width * static_cast<size_t>(out.sizes.n_cells), 0x7b00);
    out.v.assign(v_width * static_cast<size_t>(out.sizes.n_cells), 0xfb00);
    out.mask.assign(static_cast<size_t>(made.sizes.n_tokens * out.sizes.n_cells), kHidden);
    for (size_t c = 0; c < static_cast<size_t>(n); ++c) {
        const auto place = static_cast<size_t>(places[c]);
        std::copy_n(made.k.begin() + static_cast<std::ptrdiff_t>(c * k_width), k_width,
                    out.k.begin() + static_cast<std::ptrdiff_t>(place * k_width));
        std::copy_n(made.v.begin() + static_cast<std::ptrdiff_t>(c * v_width), v_width,
                    out.v.begin() + static_cast<std::ptrdiff_t>(place * v_width));
        for (int64_t token = 0; token < made.sizes.n_tokens; ++token) {
            out.mask[static_cast<size_t>(token * out.sizes.n_cells) + place] =
                made.mask[static_cast<size_t>(token * n) + c];
        }
    }
    return out;
}

void test_order_and_neighbours_of_the_cells_do_not_matter() {
    Random random(5);
    for (int i = 0; i < 20; ++i) {
        const Case made = make_case({1 + random.below(20), 4, 2, 1 + random.below(700), 32, 40}, random);
        const std::vector<float> expected = run(made);
        for (int order = 0; order < 3; ++order) {
            const std::vector<float> y = run(scattered(made, random), 1 + order);
            CHECK(std::memcmp(y.data(), expected.data(), y.size() * sizeof(float)) == 0);
        }
    }
}

// Equal weights and values of all sizes, of which many are an odd number of half steps of the sum.
void test_halfway_cases_do_not_depend_on_the_order() {
    Random random(10);
    for (int i = 0; i < 20; ++i) {
        Case made = make_case({2, 4, 2, 300, 16, 16}, random);
        made.scale = 0.0F;
        std::ranges::generate(made.v, [&] {
            const auto exponent = static_cast<uint16_t>(1 + random.below(30));
            return static_cast<uint16_t>(static_cast<uint16_t>(random.next() & 0x83ff) | exponent << 10);
        });
        const std::vector<float> expected = run(made);
        CHECK(run(scattered(made, random)) == expected);
    }
}

void test_every_instruction_set_gives_the_same_bits() {
    Random random(11);
    for (const Sizes sizes : {Sizes{1, 2, 2, 700, 128, 128}, Sizes{1, 16, 8, 300, 64, 72}, Sizes{7, 12, 4, 300, 40, 24},
                              Sizes{16, 4, 1, 130, 128, 256}}) {
        const Case made = make_case(sizes, random);
        attend_run = available_attends().front();
        const std::vector<float> expected = run(made);
        for (const AttendRun other : available_attends()) {
            attend_run = other;
            CHECK(run(made) == expected);
        }
    }
}

bool are_same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// The largest values of the last pass in the same memory are a guess, which may be too small, too large, no number.
void test_what_the_memory_held_before_does_not_matter() {
    Random random(12);
    Case made = make_case({1, 4, 2, 100, 16, 16}, random);
    std::ranges::fill(made.mask, uint16_t{0});
    for (const int exponent : {10, 24, 3, 30, 12, 31, 31, 5}) { // 31: infinities and NaN
        std::ranges::generate(made.v, [&] {
            return static_cast<uint16_t>(static_cast<uint16_t>(random.next() & 0x83ff) | exponent << 10);
        });
        const Case elsewhere = made;
        const std::vector<float> expected = run(elsewhere);
        CHECK(std::isnan(expected[0]) == (exponent == 31));
        CHECK(are_same_bits(run(made), expected) && are_same_bits(run(made), expected));
    }
}

void test_no_mask_sees_all() {
    Random random(6);
    Case made = make_case({4, 2, 2, 50, 16, 16}, random);
    std::ranges::fill(made.mask, uint16_t{0});
    const std::vector<float> expected = run(made);
    made.mask.clear();
    CHECK(run(made) == expected);
}

void test_row_that_sees_nothing_is_zero() {
    Random random(7);
    Case made = make_case({3, 2, 1, 33, 16, 16}, random);
    std::fill_n(made.mask.begin() + 33, 33, kHidden);
    const std::vector<float> y = run(made);
    for (size_t i = 0; i < y.size(); ++i) {
        CHECK((y[i] == 0.0F) == (i / 32 == 1));
    }
}

void test_largest_and_denormal_values() {
    Random random(8);
    for (const uint16_t half : {uint16_t{0x7bff}, uint16_t{0x0001}, uint16_t{0x8001}, uint16_t{0}}) {
        Case made = make_case({2, 2, 1, 3000, 16, 16}, random);
        made.scale = 0.0F; // 2000 equal weights or so: the largest sums
        std::ranges::fill(made.v, half);
        for (const float value : run(made)) {
            const double expected = oracle::half_value(half);
            CHECK(std::abs(static_cast<double>(value) - expected) <= 1e-5 * std::abs(expected));
        }
    }
}

void test_nan_spoils_only_rows_that_see_it() {
    Random random(9);
    for (const bool in_keys : {true, false}) {
        for (const int64_t n_heads : {1, 2}) {
            for (const uint16_t bad : std::initializer_list<uint16_t>{0x7e00, 0x7c00}) { // NaN, infinity
                Case made = make_case({2, n_heads, 1, 20, 8, 8}, random);
                std::ranges::fill(made.mask, uint16_t{0}); // both tokens in one run
                (in_keys ? made.k : made.v)[5 * 8 + 2] = bad;
                made.mask[5] = kHidden;
                const std::vector<float> y = run(made);
                const std::vector<float> alone = run(one_token(made, 0));
                CHECK(std::equal(alone.begin(), alone.end(), y.begin()));
                CHECK(std::ranges::all_of(alone, [](float value) { return std::isfinite(value); }));
                if (!in_keys || bad == 0x7e00) { // an infinite key may well give a weight of 0
                    CHECK(std::all_of(y.begin() + n_heads * 8, y.end(), [](float value) { return std::isnan(value); }));
                }
            }
        }
    }
}

} // namespace

int main() {
    if (!can_attend()) {
        std::printf("ggml's attention runs on this processor\n");
        return check_summary();
    }
    test_every_instruction_set_gives_the_same_bits();
    for (const AttendRun available : available_attends()) {
        attend_run = available;
        test_close_to_float64();
        test_sharp_and_flat_weights();
        test_any_number_of_threads();
        test_row_alone_equals_row_in_a_batch();
        test_order_and_neighbours_of_the_cells_do_not_matter();
        test_halfway_cases_do_not_depend_on_the_order();
        test_what_the_memory_held_before_does_not_matter();
        test_no_mask_sees_all();
        test_row_that_sees_nothing_is_zero();
        test_largest_and_denormal_values();
        test_nan_spoils_only_rows_that_see_it();
    }
    return check_summary();
}
