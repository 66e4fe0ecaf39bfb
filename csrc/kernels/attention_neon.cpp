// Attention with what every 64-bit ARM has.
#include "kernels/attention_rows.h"

#include <arm_neon.h>

namespace dspark::kernels {
namespace {

struct Neon {
    struct Floats {
        float32x4_t low, high;
    };
    struct Ints {
        int32x4_t low, high;
    };
    using Wide = Neon; // what sums the values
    static constexpr int64_t kLanes = 8;
    static constexpr int kSums = 8; // vectors that are summed up at once: what the registers hold

    template <typename Vector> static Vector pin(Vector v) {
        __asm__("" : "+w"(v.low), "+w"(v.high));
        return v;
    }

    static Floats load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
    static Floats load_halves(const uint16_t* p) {
        const float16x8_t v = vreinterpretq_f16_u16(vld1q_u16(p));
        return {vcvt_f32_f16(vget_low_f16(v)), vcvt_high_f32_f16(v)};
    }
    static void store(float* p, Floats v) {
        vst1q_f32(p, v.low);
        vst1q_f32(p + 4, v.high);
    }
    static Floats set(float value) { return {vdupq_n_f32(value), vdupq_n_f32(value)}; }
    static Floats add(Floats a, Floats b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
    static Floats sub(Floats a, Floats b) { return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)}; }
    static Floats mul(Floats a, Floats b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
    static Floats max(Floats a, Floats b) { return {vmaxnmq_f32(a.low, b.low), vmaxnmq_f32(a.high, b.high)}; }
    static Floats fma(Floats a, Floats b, Floats c) {
        return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
    }
    static Floats round(Floats v) { return {vrndnq_f32(v.low), vrndnq_f32(v.high)}; }

    // p * 2^n for whole n.
    static Floats scale_by_power(Floats p, Floats n) { return {scale_four(p.low, n.low), scale_four(p.high, n.high)}; }
    static Floats zero_below(Floats x, float bound, Floats value) {
        return {four_zero_below(x.low, bound, value.low), four_zero_below(x.high, bound, value.high)};
    }
    // Sets the last bit of what is not 0.
    static Floats make_odd(Floats v) { return {make_four_odd(v.low), make_four_odd(v.high)}; }
    static Ints bits(Floats v) { return {vreinterpretq_s32_f32(v.low), vreinterpretq_s32_f32(v.high)}; }
    static Ints add_ints(Ints a, Ints b) { return {vaddq_s32(a.low, b.low), vaddq_s32(a.high, b.high)}; }
    static void add_to(int32_t* p, Ints v) {
        vst1q_s32(p, vaddq_s32(vld1q_s32(p), v.low));
        vst1q_s32(p + 4, vaddq_s32(vld1q_s32(p + 4), v.high));
    }

    // Lane i: the sum of the lanes of v[i], as ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)).
    static Floats sum_each(const Floats* v) { return {sum_four(v), sum_four(v + 4)}; }

    static float largest(Floats v) { return vmaxnmvq_f32(vmaxnmq_f32(v.low, v.high)); }

    static float sum(Floats v) { return vaddvq_f32(vaddq_f32(v.low, v.high)); }

    // value where the score is not -inf.
    static Floats keep_seen(Floats score, Floats value, float otherwise) {
        return {keep_four(score.low, value.low, otherwise), keep_four(score.high, value.high, otherwise)};
    }

    template <int n_rows> static void dot(const float* queries, const uint16_t* const* keys, int64_t n, Floats* out) {
        dot_rows<Neon, n_rows>(queries, keys, n, out);
    }

    // The largest magnitude among n halves, which order as integers. n: a multiple of 8.
    static float largest_magnitude(const uint16_t* p, int64_t n) {
        uint16x8_t most = vdupq_n_u16(0);
        for (int64_t i = 0; i < n; i += 8) {
            most = vmaxq_u16(most, vandq_u16(vld1q_u16(p + i), vdupq_n_u16(0x7fff)));
        }
        const uint16_t bits = vmaxvq_u16(most);
        const float size = vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))), 0);
        return bits < 0x7c00 ? size : kNotFinite;
    }

  private:
    static float32x4_t make_four_odd(float32x4_t v) {
        const uint32x4_t is_zero = vceqzq_f32(v);
        return vreinterpretq_f32_u32(vorrq_u32(vreinterpretq_u32_f32(v), vbicq_u32(vdupq_n_u32(1), is_zero)));
    }
    static float32x4_t keep_four(float32x4_t score, float32x4_t value, float otherwise) {
        return vbslq_f32(vceqq_f32(score, vdupq_n_f32(-INFINITY)), vdupq_n_f32(otherwise), value);
    }
    static float32x4_t scale_four(float32x4_t p, float32x4_t n) {
        return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), vshlq_n_s32(vcvtq_s32_f32(n), 23)));
    }
    static float32x4_t four_zero_below(float32x4_t x, float bound, float32x4_t value) {
        const float32x4_t kept = vbslq_f32(vcltq_f32(x, vdupq_n_f32(bound)), vdupq_n_f32(0.0F), value);
        return vbslq_f32(vceqq_f32(x, x), kept, x); // NaN differs from itself
    }
    static float32x4_t sum_four(const Floats* v) {
        const float32x4_t low = vpaddq_f32(vpaddq_f32(v[0].low, v[1].low), vpaddq_f32(v[2].low, v[3].low));
        const float32x4_t high = vpaddq_f32(vpaddq_f32(v[0].high, v[1].high), vpaddq_f32(v[2].high, v[3].high));
        return vaddq_f32(low, high);
    }
};

void attend_neon(const Attention& attention, const AttentionRun& run, AttentionHeads heads, AttentionScratch& scratch) {
    RunRows<Neon>(attention, run, heads, scratch).compute();
}

} // namespace

AttendRun find_attend_neon() { return attend_neon; }

} // namespace dspark::kernels
