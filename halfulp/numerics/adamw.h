/* One element of an AdamW step: moments, decoupled decay, update and the rounding of the weight.
 *
 * The order of operations is that of halfulp/optim/adamw.py, bit for bit. Weights and gradients are
 * fp32 or bf16 (p16, g16); weights of 8-bit-exponent formats are rounded here, others by the caller. */

#pragma once
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

INLINE void step_one(const Job *job, const Quantizer q, const Scalars s, int rounding, int p16, int g16,
                     int64_t i, uint32_t random) {
    float g = load(job->g, i, g16), p = load(job->p, i, p16);
    float mean = job->m[i] + (g - job->m[i]) * s.one_minus_beta1;
    float square = job->v[i] * s.beta2 + (g * g) * s.one_minus_beta2;
    float next = p * s.decay - mean / (sqrtf(square) * s.correction + s.eps) * s.lr;
    job->m[i] = mean;
    job->v[i] = square;
    if (rounding != KEEP) next = wide(next, q, rounding, 0, random);
    if (p16) ((uint16_t *)job->p)[i] = (uint16_t)(bits_of(next) >> 16);
    else ((float *)job->p)[i] = next;
}
