/* One fp32 value rounded to any format: the C twin of halfulp/numerics/rounding.py, bit for bit.
 *
 * Plain C, no dependency; compiled once per machine by kernel.py and called through ctypes. Work is
 * split by torch's own thread pool, whose entry point Python hands over. On a GPU the same lines are
 * compiled by NVRTC, which has no headers (round.cu). */

#pragma once
#ifdef __CUDACC_RTC__
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fc00000)
#define __builtin_fabsf fabsf
#define __builtin_copysignf copysignf
#define INLINE static __device__ __forceinline__
#else
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#endif

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

/* Of a loop whose tensors are the same one or do not overlap. */
#if defined(__CUDACC_RTC__)
#define IVDEP
#elif defined(__clang__)
#define IVDEP _Pragma("clang loop vectorize(assume_safety)")
#else
#define IVDEP _Pragma("GCC ivdep")
#endif

enum { NEAREST, STOCHASTIC, TRUNCATE };
enum { OVERFLOW, SATURATE, WIDE, WIDE_SATURATE }; /* kind of loop: what the compiler may assume of the format */
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

#define LANES 256

/* The words of consecutive indices, LANES at a time. Between two multiples of 2^17, x >> 17 is one
 * number for all of them; and an aligned block of indices differs in low bits only, which no xor
 * carries out of: the first product is then a sum of one number per block and one per lane. */
typedef struct { uint32_t flip, k0, k1, index, lanes[LANES]; } Stream;

INLINE Stream stream_at(uint32_t index, uint32_t k0, uint32_t k1) {
    const uint32_t key = k0 ^ (index ^ k0) >> 17, low = key % LANES;
    Stream stream = {key - low, k0, k1, index, {0}};
    for (uint32_t lane = 0; lane < LANES; lane++) stream.lanes[lane] = (lane ^ low) * FIRST;
    return stream;
}

INLINE uint32_t block_at(const Stream *stream, uint32_t i) { return ((stream->index + i) ^ stream->flip) * FIRST; }

/* Indices from `index` on that one Stream serves: whole blocks up to a multiple of 2^17, or 0. */
INLINE uint32_t run(uint32_t index, int64_t left) {
    const uint32_t n = (1u << 17) - index % (1u << 17);
    return index % LANES ? 0 : (left < n ? (uint32_t)left : n) / LANES * LANES;
}

/* Indices to the next block, where `run` is 0. */
INLINE uint32_t ragged(uint32_t index, int64_t left) {
    const uint32_t n = LANES - index % LANES;
    return left < n ? (uint32_t)left : n;
}

INLINE void words(uint32_t *out, uint32_t n, uint32_t index, uint32_t k0, uint32_t k1) {
    for (uint32_t i = 0, m; i < n; i += m, index += m)
        if ((m = run(index, n - i))) {
            const Stream stream = stream_at(index, k0, k1);
            for (uint32_t b = 0; b < m; b += LANES)
                IVDEP for (uint32_t lane = 0; lane < LANES; lane++)
                    out[i + b + lane] = mixed(block_at(&stream, b) + stream.lanes[lane], k1);
        } else {
            m = ragged(index, n - i);
            for (uint32_t j = 0; j < m; j++) out[i + j] = word(index + j, k0, k1);
        }
}

/* Formats with fewer than 8 exponent bits. (a + c) - c rounds a to the grid in one fp32 addition;
 * stochastic rounding then moves that result by one step with probability |error| / step. */
INLINE float narrow(float x, const Quantizer q, int rounding, int saturate, uint32_t random) {
    float whole = __builtin_fabsf(x);
    float a = q.cap < whole ? q.cap : whole; /* written so that NaN stays */
    /* Scaled, a has the exponent of c; and the compiler keeps one min instead of two. */
    float scaled = a * float_of((uint32_t)(150 - q.mantissa_bits) << 23);
    int32_t e = (int32_t)(bits_of(scaled) & 0x7f800000u), least = (q.smallest_exponent + 150 - q.mantissa_bits) << 23;
    e = e > least ? e : least;
    float c = float_of((uint32_t)e);
    uint32_t step = (uint32_t)e - (23u << 23);
    float r = (a + c) - c;
    if (rounding == STOCHASTIC) {
        float error = a - r;
        float threshold = float_of(step | random >> 9 | 1u) - float_of(step); /* (k + 1/2) 2^-22 step */
        float move = __builtin_copysignf(float_of(step), error);
        r = __builtin_fabsf(error) > threshold ? r + move : r;
    }
    if (rounding == TRUNCATE) {
        r = r > a ? r - float_of(step) : r;
        r = r > q.largest && whole < INFINITY ? q.largest : r;
    }
    if (!saturate) r = r > q.largest ? q.overflow : r;
    return __builtin_copysignf(r, x);
}

/* Formats with fp32's exponent range: integer arithmetic on the discarded bits. A carry runs on into
 * the exponent, as it should, and ends at inf; only NaN would run over. */
INLINE float wide(float x, const Quantizer q, int rounding, int saturate, uint32_t random) {
    uint32_t u = bits_of(x), mask = (1u << (23 - q.mantissa_bits)) - 1, r = u;
    if (rounding == NEAREST) r += (mask >> 1) + ((u >> (23 - q.mantissa_bits)) & 1);
    if (rounding == STOCHASTIC) r += random & mask;
    r = x == x ? r & ~mask : (u & 0x80000000u) | 0x7fc00000u;
    if (!saturate) return float_of(r);
    float whole = __builtin_fabsf(float_of(r));
    return __builtin_copysignf(q.largest < whole ? q.largest : whole, x);
}

INLINE float rounded(float x, const Quantizer q, int rounding, int kind, uint32_t random) {
    return kind >= WIDE ? wide(x, q, rounding, kind == WIDE_SATURATE, random)
                        : narrow(x, q, rounding, kind == SATURATE, random);
}

/* Splits [0, n) over the pool if it is worth it. */
INLINE void spread(ParallelFor parallel, int64_t n, int64_t grain, Body body, const void *job) {
    if (parallel && n > grain) parallel(0, n, grain, body, job);
    else if (n > 0) body(0, n, job);
}

#define GRAIN 32768
