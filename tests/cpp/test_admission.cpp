// Sharing the rows of a pass, and which sequence holds which tokens.
#include "admission.h"
#include "check.h"
#include "prefix_cache.h"

#include <algorithm>
#include <numeric>
#include <random>

using namespace dspark;

namespace {

using Rows = std::vector<int32_t>;

void test_short_prompts_do_not_wait_behind_a_long_one() {
    CHECK((share_rows(Rows{4000, 8, 8}, 64, 0) == Rows{48, 8, 8}));
    CHECK((share_rows(Rows{4000}, 64, 0) == Rows{64}));
    CHECK((share_rows(Rows{}, 64, 0).empty()));
    CHECK((share_rows(Rows{5, 5}, 0, 0) == Rows{0, 0}));
}

void test_turns_go_round() {
    CHECK((share_rows(Rows{9, 9, 9}, 2, 0) == Rows{1, 1, 0}));
    CHECK((share_rows(Rows{9, 9, 9}, 2, 2) == Rows{1, 0, 1}));
}

// All room is used while anyone needs it, nobody gets more than needed, and shares differ by at most one row among
// those that still need more.
void test_shares_are_fair() {
    std::mt19937 random(3);
    for (int i = 0; i < 2000; ++i) {
        Rows needs(1 + random() % 9);
        std::generate(needs.begin(), needs.end(), [&] { return static_cast<int32_t>(random() % 40); });
        const auto room = static_cast<int32_t>(random() % 120);
        const Rows shares = share_rows(needs, room, random() % 20);
        const int32_t wanted = std::accumulate(needs.begin(), needs.end(), 0);
        CHECK(std::accumulate(shares.begin(), shares.end(), 0) == std::min(room, wanted));
        for (size_t a = 0; a < needs.size(); ++a) {
            CHECK(shares[a] >= 0 && shares[a] <= needs[a]);
            for (const int32_t other : shares) {
                CHECK(shares[a] == needs[a] || shares[a] >= other - 1);
            }
        }
    }
}

void test_oldest_idle_sequence_goes_first() {
    PrefixCache cache(3);
    CHECK(cache.take() == 0);
    CHECK(cache.take() == 1);
    CHECK(cache.take() == 2);
    CHECK(cache.take() == -1);
    cache.put(1, {4, 5});
    cache.put(0, {4, 6});
    CHECK((cache.idle() == Rows{0, 1}));
    CHECK(common_prefix(cache.tokens(1), Rows{4, 6}) == 1);
    cache.touch(1);
    CHECK(cache.take() == 0); // the older one since
    CHECK(cache.tokens(0).empty());
    CHECK(cache.take() == 1);
    CHECK(cache.take() == -1);
    cache.put(2, {}); // holds nothing: free, not idle
    CHECK(cache.idle().empty());
    CHECK(cache.take() == 2);
}

} // namespace

int main() {
    test_short_prompts_do_not_wait_behind_a_long_one();
    test_turns_go_round();
    test_shares_are_fair();
    test_oldest_idle_sequence_goes_first();
    return check_summary();
}
