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

INLINE void steps(const Job *job, const Quantizer q, const Scalars s, int rounding, int p16, int g16,
                  int64_t begin, uint32_t n, const uint32_t *random) {
    float *restrict m = job->m + begin, *restrict v = job->v + begin;
    for (uint32_t i = 0; i < n; i++) {
        float g = load(job->g, begin + i, g16), p = load(job->p, begin + i, p16);
        float mean = m[i] + (g - m[i]) * s.one_minus_beta1;
        float square = v[i] * s.beta2 + (g * g) * s.one_minus_beta2;
        float next = p * s.decay - mean / (sqrtf(square) * s.correction + s.eps) * s.lr;
        m[i] = mean;
        v[i] = square;
        if (rounding != KEEP) next = wide(next, q, rounding, rounding == STOCHASTIC ? random[i] : 0);
        if (p16) ((uint16_t *)job->p)[begin + i] = (uint16_t)(bits_of(next) >> 16);
        else ((float *)job->p)[begin + i] = next;
    }
}

/* One instantiation per pair of types, so that the loop has no branch. */
INLINE void typed(const Job *job, const Quantizer q, const Scalars s, int rounding, int64_t begin, uint32_t n,
                  const uint32_t *random) {
    if (job->p16 && job->g16) steps(job, q, s, rounding, 1, 1, begin, n, random);
    else if (job->p16) steps(job, q, s, rounding, 1, 0, begin, n, random);
    else if (job->g16) steps(job, q, s, rounding, 0, 1, begin, n, random);
    else steps(job, q, s, rounding, 0, 0, begin, n, random);
}

CLONES static void adamw_range(int64_t begin, int64_t end, const void *context) {
    const Job job = *(const Job *)context;
    const Quantizer none = {0}, q = job.q ? *job.q : none;
    const Scalars s = *job.s;
    const int rounding = job.q ? q.rounding : KEEP;
    uint32_t random[PIECE];
    while (begin < end) {
        const uint32_t index = job.index + (uint32_t)begin, n = piece(index, end - begin);
        if (rounding == STOCHASTIC) words(random, n, index, job.k0, job.k1);
        if (rounding == STOCHASTIC) typed(&job, q, s, STOCHASTIC, begin, n, random);
        else if (rounding == NEAREST) typed(&job, q, s, NEAREST, begin, n, random);
        else if (rounding == TRUNCATE) typed(&job, q, s, TRUNCATE, begin, n, random);
        else typed(&job, q, s, KEEP, begin, n, random);
        begin += n;
    }
}

/* q: an 8-bit-exponent format to round the weight to, or NULL. A bf16 weight needs one. */
void halfulp_adamw(ParallelFor parallel, void *p, const void *g, float *m, float *v, int64_t n, const Quantizer *q,
                   const Scalars *s, uint32_t k0, uint32_t k1, uint32_t index, int32_t p16, int32_t g16) {
    const Job job = {p, g, m, v, q, s, k0, k1, index, p16, g16};
    spread(parallel, n, GRAIN, adamw_range, &job);
}
