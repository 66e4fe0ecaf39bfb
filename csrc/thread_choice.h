// How many threads a pass gets: all of them, or one alone where passes are so short that meeting after every node of
// the graph costs more than sharing its work saves. What a meeting costs depends on where the processors lie (between
// two virtual ones it tripled within a minute) and on who else wants them, so it is not measured once: now and then a
// few passes run the other way. Owns: the times of passes by size. Must not know: what a pass is. Threads: one at a
// time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace dspark {

class ThreadChoice {
  public:
    static constexpr int32_t kMostRows = 8; // longer passes are always shared
    static constexpr double kShortMs = 3;   // in longer ones meetings are a few percent at most

    // For the next pass, of n_rows.
    [[nodiscard]] bool is_alone(int32_t n_rows) const;
    // That pass took so long.
    void observe(int32_t n_rows, double ms);

  private:
    static constexpr size_t kRecent = 7;
    static constexpr size_t kTrial = 6;

    // Passes of one number of rows.
    struct Size {
        [[nodiscard]] bool is_trying() const { return n_tried < kTrial; }
        void observe(double ms);
        void begin_trial();
        bool observe_trial(double ms); // true: the other way has won
        [[nodiscard]] bool is_won() const;

        bool is_alone = false;
        std::array<double, kRecent> recent{};
        size_t n_seen = 0;
        std::array<double, kTrial> trial{}; // the other way
        size_t n_tried = kTrial;
        double expected = 0;  // median of `recent` when the last trial began
        int32_t wait = 0;     // passes between the last trial and the next one
        int32_t n_waited = 0; // of them
    };

    std::array<Size, kMostRows> sizes_;
};

} // namespace dspark
