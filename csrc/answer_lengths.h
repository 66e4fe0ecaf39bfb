// How many tokens an answer still has, by what recent answers had. Must not know: requests, costs. Engine thread only.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace dspark {

class AnswerLengths {
  public:
    void observe(int32_t n_tokens); // of an answer that has ended
    // Expected of an answer that has n_written: what recent longer ones went on for; as much again where none was
    // longer.
    [[nodiscard]] double left(int32_t n_written) const;

  private:
    // From a word to an essay: what answers are before any was seen, one short one says nothing of the next.
    std::array<int32_t, 16> recent_{16, 64, 256, 1024, 16, 64, 256, 1024, 16, 64, 256, 1024, 16, 64, 256, 1024};
    size_t next_ = 0;
};

} // namespace dspark
