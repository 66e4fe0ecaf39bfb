#include "admission.h"

#include <algorithm>

namespace dspark {

std::vector<int32_t> share_rows(std::span<const int32_t> needs, int32_t room, size_t first) {
    std::vector<int32_t> shares(needs.size(), 0);
    for (;;) {
        const auto n_hungry = static_cast<int32_t>(std::count_if(needs.begin(), needs.end(), [&](const int32_t& need) {
            return shares[static_cast<size_t>(&need - needs.data())] < need;
        }));
        if (n_hungry == 0 || room <= 0) {
            return shares;
        }
        const int32_t each = std::max(1, room / n_hungry);
        for (size_t k = 0; k < needs.size() && room > 0; ++k) {
            const size_t i = (first + k) % needs.size();
            const int32_t more = std::min({each, needs[i] - shares[i], room});
            shares[i] += more;
            room -= more;
        }
    }
}

} // namespace dspark
