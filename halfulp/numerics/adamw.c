/* One AdamW step in one pass: moments, decoupled decay, update and the rounding of the weight.
 *
 * The order of operations is that of halfulp/optim/adamw.py, bit for bit. Weights and gradients are
 * fp32 or bf16 (p16, g16); weights of 8-bit-exponent formats are rounded here, others by the caller. */

#include "round.h"

enum { KEEP = -1 };

typedef struct { float decay, one_minus_beta1, beta2, one_minus_beta2, correction, eps, lr; } Scalars;

typedef struct {
    void *p; const void *g; float *m, *v; const Quantizer *q; const Scalars *s;
    uint32_t k0, k1, index; int p16, g16;
} Job;

INLINE float load(const void *x, int64_t i, int half) {
    return half ? float_of((uint32_t)((const uint16_t *)x)[i] << 16) : ((const float *)x)[i];
}

INLINE void steps(const Job job, const Quantizer q, const Scalars s, int rounding, int p16, int g16, int64_t begin, uint32_t n) {
    float *restrict m = job.m + begin, *restrict v = job.v + begin;
    for (uint32_t i = 0; i < n; i++) {
        float g = load(job.g, begin + i, g16), p = load(job.p, begin + i, p16);
        float mean = m[i] + (g - m[i]) * s.one_minus_beta1;
        float square = v[i] * s.beta2 + (g * g) * s.one_minus_beta2;
        float next = p * s.decay - mean / (sqrtf(square) * s.correction + s.eps) * s.lr;
        m[i] = mean;
        v[i] = square;
        if (rounding != KEEP) {
            uint32_t random = rounding == STOCHASTIC ? word(job.index + (uint32_t)begin + i, job.k0, job.k1) : 0;
            next = wide(next, q, rounding, random);
        }
        if (p16) ((uint16_t *)job.p)[begin + i] = (uint16_t)(bits_of(next) >> 16);
        else ((float *)job.p)[begin + i] = next;
    }
}

CLONES static void adamw_range(int64_t begin, int64_t end, const void *context) {
    const Job job = *(const Job *)context;
    const Quantizer none = {0}, q = job.q ? *job.q : none;
    const Scalars s = *job.s;
    const int rounding = job.q ? q.rounding : KEEP;
    const int64_t chunk = 1 << 24;
    for (int64_t i = begin; i < end; i += chunk) {
        const uint32_t n = (uint32_t)(end - i < chunk ? end - i : chunk);
        if (job.p16 && job.g16) {
            if (rounding == STOCHASTIC) steps(job, q, s, STOCHASTIC, 1, 1, i, n);
            else if (rounding == TRUNCATE) steps(job, q, s, TRUNCATE, 1, 1, i, n);
            else steps(job, q, s, NEAREST, 1, 1, i, n);
        } else if (rounding == STOCHASTIC) steps(job, q, s, STOCHASTIC, job.p16, job.g16, i, n);
        else if (rounding == NEAREST) steps(job, q, s, NEAREST, job.p16, job.g16, i, n);
        else if (rounding == TRUNCATE) steps(job, q, s, TRUNCATE, job.p16, job.g16, i, n);
        else steps(job, q, s, KEEP, 0, job.g16, i, n);
    }
}

/* q: an 8-bit-exponent format to round the weight to, or NULL. A bf16 weight needs one. */
void halfulp_adamw(ParallelFor parallel, void *p, const void *g, float *m, float *v, int64_t n, const Quantizer *q,
                   const Scalars *s, uint32_t k0, uint32_t k1, uint32_t index, int32_t p16, int32_t g16) {
    const Job job = {p, g, m, v, q, s, k0, k1, index, p16, g16};
    spread(parallel, n, GRAIN, adamw_range, &job);
}
