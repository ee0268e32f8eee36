/* One AdamW step in one pass over the parameter. */

#include "adamw.h"

/* Elements from `begin` on that are done in one loop; returns how many. */
INLINE uint32_t steps(const Job *job, const Quantizer q, const Scalars s, int rounding, int p16, int g16,
                      int64_t begin, int64_t left) {
    const uint32_t index = job->index + (uint32_t)begin;
    if (rounding != STOCHASTIC) {
        const uint32_t n = left < 1 << 30 ? (uint32_t)left : 1 << 30;
        IVDEP for (uint32_t i = 0; i < n; i++) step_one(job, q, s, rounding, p16, g16, begin + i, 0);
        return n;
    }
    uint32_t n = run(index, left);
    if (!n) {
        n = ragged(index, left);
        IVDEP for (uint32_t i = 0; i < n; i++)
            step_one(job, q, s, rounding, p16, g16, begin + i, word(index + i, job->k0, job->k1));
        return n;
    }
    const Stream stream = stream_at(index, job->k0, job->k1);
    for (uint32_t b = 0; b < n; b += LANES) {
        const uint32_t block = block_at(&stream, b);
        IVDEP for (uint32_t i = 0; i < LANES; i++)
            step_one(job, q, s, rounding, p16, g16, begin + b + i, mixed(block + stream.lanes[i], stream.k1));
    }
    return n;
}

/* One instantiation per pair of types, so that the loop has no branch. */
INLINE uint32_t typed(const Job *job, const Quantizer q, const Scalars s, int rounding, int64_t begin, int64_t left) {
    if (job->p16 && job->g16) return steps(job, q, s, rounding, 1, 1, begin, left);
    if (job->p16) return steps(job, q, s, rounding, 1, 0, begin, left);
    if (job->g16) return steps(job, q, s, rounding, 0, 1, begin, left);
    return steps(job, q, s, rounding, 0, 0, begin, left);
}

CLONES static void adamw_range(int64_t begin, int64_t end, const void *context) {
    const Job job = *(const Job *)context;
    const Quantizer none = {0}, q = job.q ? *job.q : none;
    const Scalars s = *job.s;
    while (begin < end) {
        const int64_t left = end - begin;
        if (!job.q) begin += typed(&job, q, s, KEEP, begin, left);
        else if (q.rounding == STOCHASTIC) begin += typed(&job, q, s, STOCHASTIC, begin, left);
        else if (q.rounding == NEAREST) begin += typed(&job, q, s, NEAREST, begin, left);
        else begin += typed(&job, q, s, TRUNCATE, begin, left);
    }
}

/* q: an 8-bit-exponent format that does not saturate, to round the weight to, or NULL. A bf16 weight needs one. */
void halfulp_adamw(ParallelFor parallel, void *p, const void *g, float *m, float *v, int64_t n, const Quantizer *q,
                   const Scalars *s, uint32_t k0, uint32_t k1, uint32_t index, int32_t p16, int32_t g16) {
    const Job job = {p, g, m, v, q, s, k0, k1, index, p16, g16};
    spread(parallel, n, GRAIN, adamw_range, &job);
}
