/* One fp32 value rounded to any format: the C twin of halfulp/numerics/rounding.py, bit for bit.
 *
 * Plain C, no dependency; compiled once per machine by kernel.py and called through ctypes. Work is
 * split by torch's own thread pool, whose entry point Python hands over. */

#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

enum { NEAREST, STOCHASTIC, TRUNCATE };
enum { OVERFLOW, SATURATE, WIDE }; /* kind of loop: what the compiler may assume of the format */
enum { NONE, GIVEN, CURRENT, POWER_OF_TWO, E8M0_UP, E8M0_FLOOR, NVFP4 };

typedef struct {
    int32_t mantissa_bits, smallest_exponent, kind, rounding;
    float largest, cap, overflow; /* cap: |x| is cut here first; overflow: value beyond largest */
    int32_t saturate, scale, margin, tile_rows, tile_columns;
} Quantizer;

typedef void (*Body)(int64_t, int64_t, const void *);
typedef void (*ParallelFor)(int64_t, int64_t, int64_t, Body, const void *);

INLINE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

#define FIRST 0xed5ad4bbu

/* The rest of the hash, from the first product on. */
INLINE uint32_t mixed(uint32_t x, uint32_t k1) {
    x ^= x >> 11; x += k1;
    x *= 0xac4c1b51u; x ^= x >> 15;
    x *= 0x31848babu; return x ^ x >> 14;
}

INLINE uint32_t word(uint32_t index, uint32_t k0, uint32_t k1) {
    uint32_t x = index ^ k0;
    return mixed((x ^ x >> 17) * FIRST, k1);
}

#define LANES 128

/* `word` of n indices from `index` on. Between two multiples of 2^17, x >> 17 is one number for all
 * of them; and an aligned block of indices differs in low bits only, which no xor carries out of:
 * the first product is then a sum of one number per block and one per lane. */
INLINE void words(uint32_t *out, uint32_t n, uint32_t index, uint32_t k0, uint32_t k1) {
    const uint32_t key = k0 ^ (index ^ k0) >> 17, low = key % LANES;
    uint32_t lanes[LANES], i = 0;
    if (index % LANES == 0 && (index ^ (index + n - 1)) >> 17 == 0) {
        for (uint32_t lane = 0; lane < LANES; lane++) lanes[lane] = (lane ^ low) * FIRST;
        for (; i + LANES <= n; i += LANES) {
            const uint32_t block = ((index + i) ^ (key - low)) * FIRST;
            uint32_t *at = out + i;
            for (uint32_t lane = 0; lane < LANES; lane++) at[lane] = mixed(block + lanes[lane], k1);
        }
    }
    for (; i < n; i++) out[i] = word(index + i, k0, k1);
}

/* Loops over many elements make their random words in pieces that end at multiples of this index. */
#define PIECE 512
INLINE uint32_t piece(uint32_t index, int64_t left) {
    const uint32_t n = PIECE - index % PIECE;
    return left < n ? (uint32_t)left : n;
}

/* Formats with fewer than 8 exponent bits. (a + c) - c rounds a to the grid in one fp32 addition;
 * stochastic rounding then moves that result by one step with probability |error| / step. */
INLINE float narrow(float x, const Quantizer q, int rounding, int saturate, uint32_t random) {
    uint32_t u = bits_of(x), sign = u & 0x80000000u;
    float whole = float_of(u ^ sign);
    float a = q.cap < whole ? q.cap : whole; /* written so that NaN stays */
    int32_t e = (int32_t)(u & 0x7f800000u), least = (q.smallest_exponent + 127) << 23;
    int32_t most = (int32_t)(bits_of(q.cap) & 0x7f800000u);
    e = e < most ? e : most;
    e = e > least ? e : least;
    float c = float_of((uint32_t)e + ((uint32_t)(23 - q.mantissa_bits) << 23));
    uint32_t step = (uint32_t)e - ((uint32_t)q.mantissa_bits << 23);
    float r = (a + c) - c;
    if (rounding == STOCHASTIC) {
        float error = a - r;
        float threshold = float_of(step | random >> 9 | 1u) - float_of(step); /* (k + 1/2) 2^-22 step */
        float move = float_of(step | (bits_of(error) & 0x80000000u));
        r = float_of(bits_of(error) & 0x7fffffffu) > threshold ? r + move : r;
    }
    if (rounding == TRUNCATE) {
        r = r > a ? r - float_of(step) : r;
        r = r > q.largest && whole < INFINITY ? q.largest : r;
    }
    if (!saturate) r = r > q.largest ? q.overflow : r;
    return float_of(bits_of(r) | sign);
}

/* Formats with fp32's exponent range: integer arithmetic on the discarded bits. */
INLINE float wide(float x, const Quantizer q, int rounding, uint32_t random) {
    uint32_t u = bits_of(x), sign = u & 0x80000000u, magnitude = u ^ sign;
    uint32_t mask = (1u << (23 - q.mantissa_bits)) - 1, r = magnitude;
    if (rounding == NEAREST) r += (mask >> 1) + ((u >> (23 - q.mantissa_bits)) & 1);
    if (rounding == STOCHASTIC) r += random & mask;
    r &= ~mask;
    uint32_t most = q.saturate ? bits_of(q.largest) : 0x7f800000u; /* the grid's next value is inf */
    r = r < most ? r : most;
    r = magnitude > 0x7f800000u ? 0x7fc00000u : r;
    return float_of(r | sign);
}

INLINE float rounded(float x, const Quantizer q, int rounding, int kind, uint32_t random) {
    return kind == WIDE ? wide(x, q, rounding, random)
                        : narrow(x, q, rounding, kind == SATURATE, random);
}

/* Splits [0, n) over the pool if it is worth it. */
static inline void spread(ParallelFor parallel, int64_t n, int64_t grain, Body body, const void *job) {
    if (parallel && n > grain) parallel(0, n, grain, body, job);
    else if (n > 0) body(0, n, job);
}

#define GRAIN 32768
