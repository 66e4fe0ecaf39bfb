// The whole test framework: CHECK counts, the summary line says how many held.
#pragma once

#include <cstdio>
#include <string>

inline int n_checks_passed = 0;
inline int n_checks_failed = 0;

inline void check(bool holds, const char* what, const char* file, int line) {
    (holds ? n_checks_passed : n_checks_failed) += 1;
    if (!holds) {
        std::printf("%s:%d: failed: %s\n", file, line, what);
    }
}

// Whether f() throws this error with these words.
template <class Error, class F> bool throws(F f, const std::string& message) {
    try {
        f();
    } catch (const Error& error) {
        return std::string(error.what()).find(message) != std::string::npos;
    }
    return false;
}

inline int check_summary() {
    std::printf("%d passed, %d failed\n", n_checks_passed, n_checks_failed);
    return n_checks_failed == 0 ? 0 : 1;
}

#define CHECK(...) check((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
#define CHECK_THROWS(expression, Error)                                                                                \
    do {                                                                                                               \
        bool thrown = false;                                                                                           \
        try {                                                                                                          \
            (void)(expression);                                                                                        \
        } catch (const Error&) {                                                                                       \
            thrown = true;                                                                                             \
        }                                                                                                              \
        CHECK(thrown);                                                                                                 \
    } while (false)
