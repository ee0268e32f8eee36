/* Rounding of whole tensors and the AdamW step on a GPU: the element functions of round.h, scale.h
 * and adamw.h, one thread per element, one group of threads per scale. Compiled by NVRTC (cuda.py)
 * without contraction to FMA and with IEEE division and root: the bits of the CPU. */

#include "scale.h"
#include "adamw.h"

#define EACH(i, n) for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < (n); i += gridDim.x * blockDim.x)
#define KERNEL extern "C" __global__ void
#define ALL 0xffffffffu

INLINE float rounded_by(float x, const Quantizer &q, float s, float inverse, int scaled, uint32_t index, uint32_t k0, uint32_t k1) {
    const uint32_t random = q.rounding == STOCHASTIC ? word(index, k0, k1) : 0;
    const float r = rounded(scaled ? x * s : x, q, q.rounding, scaled ? SATURATE : q.kind, random);
    return scaled ? r * inverse : r;
}

/* The maximum over `lanes` neighboring threads of a warp (a power of two). */
INLINE uint32_t largest_of_lanes(uint32_t m, uint32_t lanes) {
    for (uint32_t far = lanes / 2; far; far /= 2) {
        const uint32_t other = __shfl_xor_sync(ALL, m, far);
        m = other > m ? other : m;
    }
    return m;
}

/* The maximum over a thread block, for every thread. */
INLINE uint32_t largest_of_block(uint32_t m) {
    __shared__ uint32_t warps[32];
    __syncthreads(); /* the last maximum has been read */
    m = largest_of_lanes(m, 32);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = m;
    __syncthreads();
    m = threadIdx.x % 32 < blockDim.x / 32 ? warps[threadIdx.x % 32] : 0;
    return largest_of_lanes(m, 32);
}

INLINE uint32_t larger(uint32_t m, float x) {
    const uint32_t a = bits_of(x) & 0x7fffffffu;
    return a > m ? a : m;
}

INLINE uint32_t larger_of_four(uint32_t m, float4 v) { return larger(larger(larger(larger(m, v.x), v.y), v.z), v.w); }

INLINE float4 rounded_four(float4 v, const Quantizer &q, float s, float inverse, int scaled, uint32_t index, uint32_t k0, uint32_t k1) {
    v.x = rounded_by(v.x, q, s, inverse, scaled, index, k0, k1);
    v.y = rounded_by(v.y, q, s, inverse, scaled, index + 1, k0, k1);
    v.z = rounded_by(v.z, q, s, inverse, scaled, index + 2, k0, k1);
    v.w = rounded_by(v.w, q, s, inverse, scaled, index + 3, k0, k1);
    return v;
}

/* Elements at the start of a tensor that can be moved four at a time. */
INLINE uint32_t in_fours(const void *x, const void *y, uint32_t n) {
    return ((unsigned long long)x | (unsigned long long)y) % 16 ? 0 : n / 4 * 4;
}

/* Bits of max |x| of the tensor; *amax is 0 before. */
KERNEL halfulp_amax(const float *x, uint32_t n, uint32_t *amax) {
    const uint32_t fours = in_fours(x, x, n);
    uint32_t m = 0;
    EACH(i, fours / 4) m = larger_of_four(m, ((const float4 *)x)[i]);
    EACH(i, n - fours) m = larger(m, x[fours + i]);
    m = largest_of_block(m);
    if (threadIdx.x == 0) atomicMax(amax, m);
}

/* Elements: without a scale, with the one at `given`, or with that of the tensor's maximum. */
KERNEL halfulp_round(const float *x, float *y, uint32_t n, Quantizer q, uint32_t k0, uint32_t k1,
                     uint32_t index, const float *given, const uint32_t *amax) {
    const uint32_t fours = in_fours(x, y, n);
    const int scaled = q.scale != NONE;
    float s = 1.0f, inverse = 1.0f;
    if (q.scale == GIVEN) { s = *given; inverse = 1.0f / s; }
    else if (scaled) scale_of(*amax, q, q.scale, 1.0f, 1.0f, &s, &inverse);
    EACH(i, fours / 4)
        ((float4 *)y)[i] = rounded_four(((const float4 *)x)[i], q, s, inverse, scaled, index + 4 * i, k0, k1);
    EACH(i, n - fours) y[fours + i] = rounded_by(x[fours + i], q, s, inverse, scaled, index + fours + i, k0, k1);
}

INLINE void scale_of_tile(uint32_t m, const Quantizer &q, const uint32_t *tensor_amax, float *s, float *inverse) {
    const float global = q.scale == NVFP4 ? global_scale(*tensor_amax) : 1.0f;
    scale_of(m, q, q.scale, global, 1.0f / global, s, inverse);
}

/* Blocks of 1 x `width` elements, each by `lanes` threads that move `step` elements at a time (4: all
 * addresses are multiples of 16 bytes). No thread leaves early, for the shuffles. */
KERNEL halfulp_blocks(const float *x, float *y, uint32_t rows, uint32_t columns, Quantizer q, uint32_t k0,
                      uint32_t k1, uint32_t lanes, uint32_t step, const uint32_t *tensor_amax) {
    const uint32_t width = q.tile_columns, across = (columns + width - 1) / width;
    const uint32_t block = (blockIdx.x * blockDim.x + threadIdx.x) / lanes, lane = threadIdx.x % lanes;
    const uint32_t row = block / across, column = block % across * width;
    const uint32_t left = columns - column, n = row < rows ? (left < width ? left : width) : 0;
    const uint32_t at = row * columns + column;
    uint32_t m = 0;
    for (uint32_t i = lane * step; i < n; i += lanes * step)
        m = step == 4 ? larger_of_four(m, *(const float4 *)(x + at + i)) : larger(m, x[at + i]);
    float s, inverse;
    scale_of_tile(largest_of_lanes(m, lanes), q, tensor_amax, &s, &inverse);
    for (uint32_t i = lane * step; i < n; i += lanes * step)
        if (step == 4)
            *(float4 *)(y + at + i) = rounded_four(*(const float4 *)(x + at + i), q, s, inverse, 1, at + i, k0, k1);
        else y[at + i] = rounded_by(x[at + i], q, s, inverse, 1, at + i, k0, k1);
}

/* Rows and tiles of any size, a thread block each. */
KERNEL halfulp_tiles(const float *x, float *y, uint32_t rows, uint32_t columns, Quantizer q, uint32_t k0,
                     uint32_t k1, const uint32_t *tensor_amax) {
    const uint32_t height = q.tile_rows ? q.tile_rows : rows, width = q.tile_columns ? q.tile_columns : columns;
    const uint32_t across = (columns + width - 1) / width;
    const uint32_t row = blockIdx.x / across * height, column = blockIdx.x % across * width;
    const uint32_t h = rows - row < height ? rows - row : height, w = columns - column < width ? columns - column : width;
    uint32_t m = 0;
    for (uint32_t i = threadIdx.x; i < h * w; i += blockDim.x) m = larger(m, x[(row + i / w) * columns + column + i % w]);
    float s, inverse;
    scale_of_tile(largest_of_block(m), q, tensor_amax, &s, &inverse);
    for (uint32_t i = threadIdx.x; i < h * w; i += blockDim.x) {
        const uint32_t at = (row + i / w) * columns + column + i % w;
        y[at] = rounded_by(x[at], q, s, inverse, 1, at, k0, k1);
    }
}

/* The running sum of a GEMM, as halfulp_accumulate of round.c; `first` starts it. */
KERNEL halfulp_accumulate(float *total, const float *part, uint32_t n, Quantizer q, int32_t promote, int32_t first) {
    EACH(i, n) {
        if (first) total[i] = wide(part[i], q, TRUNCATE, 0, 0);
        else if (promote) total[i] += wide(part[i], q, TRUNCATE, 0, 0);
        else total[i] = wide(total[i] + part[i], q, TRUNCATE, 0, 0);
    }
}

KERNEL halfulp_adamw(void *p, const void *g, float *m, float *v, uint32_t n, Quantizer q, int32_t keep, Scalars s,
                     uint32_t k0, uint32_t k1, uint32_t index, int32_t p16, int32_t g16) {
    Job job;
    job.p = p; job.g = g; job.m = m; job.v = v;
    const int rounding = keep ? KEEP : q.rounding;
    EACH(i, n)
        step_one(&job, q, s, rounding, p16, g16, i, rounding == STOCHASTIC ? word(index + i, k0, k1) : 0);
}
