#include "grammar_check.h"

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace dspark {

namespace {

constexpr uint64_t kMostRepeats =
    2000; // llama.cpp's own limit: beyond it a lower bound is refused, an upper one dropped
constexpr uint64_t kMostInAll = 20'000;

class RepetitionScanner {
  public:
    explicit RepetitionScanner(std::string_view gbnf) : text_(gbnf) {}

    bool scan() {
        while (at_ < text_.size()) {
            switch (text_[at_++]) {
            case '"':
                skip_to('"');
                break;
            case '[':
                skip_to(']');
                break;
            case '#':
                at_ = std::min(text_.find('\n', at_), text_.size());
                break;
            case '<': // `<[7]>` too, which needs none: not worth telling apart
                names_tokens_ = true;
                break;
            case '{':
                check_braces();
                break;
            default:
                break;
            }
        }
        return names_tokens_;
    }

  private:
    void skip_to(char end) {
        while (at_ < text_.size() && text_[at_] != end) {
            at_ += text_[at_] == '\\' ? 2 : 1;
        }
        ++at_;
    }

    void skip_space() {
        while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_])) != 0) {
            ++at_;
        }
    }

    // Digits, capped: what is beyond is too much anyway.
    uint64_t number() {
        skip_space();
        uint64_t value = 0;
        while (at_ < text_.size() && std::isdigit(static_cast<unsigned char>(text_[at_])) != 0) {
            value = std::min<uint64_t>(value * 10 + static_cast<uint64_t>(text_[at_++] - '0'), UINT32_MAX);
        }
        skip_space();
        return value;
    }

    [[nodiscard]] bool is_at(char wanted) const { return at_ < text_.size() && text_[at_] == wanted; }

    // {m}, {m,}, {m,n}: whatever else stands here the parser refuses.
    void check_braces() {
        const uint64_t least = number();
        uint64_t most = least;
        if (is_at(',')) {
            ++at_;
            skip_space();
            most = is_at('}') ? least : number();
        }
        if (most < least) {
            throw std::invalid_argument("grammar must not repeat at least " + std::to_string(least) + " and at most " +
                                        std::to_string(most) + " times");
        }
        if (least > kMostRepeats) {
            throw std::invalid_argument("grammar must demand at most " + std::to_string(kMostRepeats) +
                                        " repetitions, got " + std::to_string(least));
        }
        n_in_all_ += most > kMostRepeats ? least : most;
        if (n_in_all_ > kMostInAll) {
            throw std::invalid_argument("grammar must have bounds of repetitions that add up to " +
                                        std::to_string(kMostInAll) + " at most");
        }
    }

    std::string_view text_;
    size_t at_ = 0;
    uint64_t n_in_all_ = 0;
    bool names_tokens_ = false;
};

} // namespace

bool check_repetitions(std::string_view gbnf) { return RepetitionScanner(gbnf).scan(); }

} // namespace dspark
