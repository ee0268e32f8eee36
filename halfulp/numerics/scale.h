/* Scales of tensors, rows, blocks and 2-D tiles. */

#pragma once
#include "round.h"

INLINE uint32_t largest_bits(const float *x, int64_t n) {
    uint32_t m = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t a = bits_of(x[i]) & 0x7fffffffu;
        m = a > m ? a : m;
    }
    return m;
}

/* Scales. Each gives s (x is multiplied by it) and its inverse from the bits of the group's max |x|;
 * a group that holds inf or NaN gets NaN, a group of zeros 1. */

/* The least e with amax <= largest * 2^e, or OCP's floor(log2 amax) - floor(log2 largest). */
INLINE int32_t e8m0_exponent(uint32_t amax, uint32_t top, int round_up) {
    int32_t e = (int32_t)(amax >> 23) - (int32_t)(top >> 23);
    e += round_up && (amax & 0x7fffffu) > (top & 0x7fffffu);
    return e < -127 ? -127 : (e > 127 ? 127 : e);
}

INLINE float power(int32_t e) { /* 2^e for -149 <= e <= 127 */
    uint32_t normal = (uint32_t)(e + 127) << 23, subnormal = 1u << ((e + 149) & 31);
    return float_of(e >= -126 ? normal : subnormal);
}

#define MOST 0x1.fffffep127f
#define LEAST 0x1.000008p-128f /* the smallest number whose inverse is finite */

INLINE void scale_of(uint32_t amax, const Quantizer q, int scale, float global, float decode,
                     float *s, float *inverse) {
    float a = float_of(amax), up = 1.0f, down = 1.0f;
    if (scale == NVFP4) {
        const Quantizer e4m3 = {3, -6, SATURATE, NEAREST, 448.0f, 448.0f, 448.0f, 1, 0, 0, 0, 0};
        down = narrow(a * (global * (1.0f / 6.0f)), e4m3, NEAREST, 1, 0) * decode;
        up = 1.0f / down;
        up = up < MOST ? up : MOST;
    } else if (scale == CURRENT) {
        up = q.largest / a * power(-q.margin);
        up = up < LEAST ? LEAST : (up < MOST ? up : MOST);
        down = 1.0f / up;
    } else {
        int32_t e = e8m0_exponent(amax, bits_of(q.largest), scale != E8M0_FLOOR);
        if (scale == POWER_OF_TWO) e = e + q.margin < 127 ? e + q.margin : 127;
        up = power(-e);
        down = power(e);
    }
    up = amax == 0 ? 1.0f : up;
    down = amax == 0 ? 1.0f : down;
    const int finite = amax < 0x7f800000u && global == global;
    *s = finite ? up : NAN;
    *inverse = finite ? down : NAN;
}

INLINE void scales(const uint32_t *amax, int n, const Quantizer q, float global, float *s, float *inverse) {
    const float decode = 1.0f / global;
    if (q.scale == NVFP4) for (int i = 0; i < n; i++) scale_of(amax[i], q, NVFP4, global, decode, s + i, inverse + i);
    else if (q.scale == CURRENT) for (int i = 0; i < n; i++) scale_of(amax[i], q, CURRENT, 1, 1, s + i, inverse + i);
    else if (q.scale == E8M0_FLOOR) for (int i = 0; i < n; i++) scale_of(amax[i], q, E8M0_FLOOR, 1, 1, s + i, inverse + i);
    else if (q.scale == E8M0_UP) for (int i = 0; i < n; i++) scale_of(amax[i], q, E8M0_UP, 1, 1, s + i, inverse + i);
    else for (int i = 0; i < n; i++) scale_of(amax[i], q, POWER_OF_TWO, 1, 1, s + i, inverse + i);
}

/* NVFP4's scale of the whole tensor. */
INLINE float global_scale(uint32_t amax) {
    const float global = 2688.0f / float_of(amax);
    return amax == 0 ? 1.0f : (amax >= 0x7f800000u ? NAN : (global < MOST ? global : MOST));
}
