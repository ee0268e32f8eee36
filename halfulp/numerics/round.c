/* Rounding of whole tensors: per element, per tensor, per row, block and 2-D tile. */

#include "scale.h"

INLINE float one(float x, const Quantizer q, int rounding, int kind, int scaled, float s, float inverse,
                 uint32_t random) {
    float r = rounded(scaled ? x * s : x, q, rounding, kind, random);
    return scaled ? r * inverse : r;
}

INLINE void span(const float *x, float *y, uint32_t n, const Quantizer q, int rounding, int kind,
                 int scaled, float s, float inverse, const uint32_t *random) {
    IVDEP for (uint32_t i = 0; i < n; i++)
        y[i] = one(x[i], q, rounding, kind, scaled, s, inverse, rounding == STOCHASTIC ? random[i] : 0);
}

/* One instantiation per rounding, so that the loop has no branch. */
INLINE void spans(const float *x, float *y, uint32_t n, const Quantizer q, int kind, int scaled,
                  float s, float inverse, const uint32_t *random) {
    if (q.rounding == NEAREST) span(x, y, n, q, NEAREST, kind, scaled, s, inverse, random);
    else if (q.rounding == STOCHASTIC) span(x, y, n, q, STOCHASTIC, kind, scaled, s, inverse, random);
    else span(x, y, n, q, TRUNCATE, kind, scaled, s, inverse, random);
}

/* Stochastic, n whole blocks: every word is used where it is made. */
INLINE void blocks(const float *x, float *y, uint32_t n, const Quantizer q, int kind, int scaled, float s,
                   float inverse, const Stream *stream) {
    for (uint32_t b = 0; b < n; b += LANES) {
        const uint32_t block = block_at(stream, b);
        IVDEP for (uint32_t i = 0; i < LANES; i++)
            y[b + i] = one(x[b + i], q, STOCHASTIC, kind, scaled, s, inverse, mixed(block + stream->lanes[i], stream->k1));
    }
}

typedef struct {
    const float *x; float *y; int64_t rows, columns; const Quantizer *q;
    uint32_t k0, k1, index, *amax; float s, inverse, global;
} Job;

/* One element per index: a run of blocks, a ragged end, or without random words everything. */
INLINE uint32_t stretch(const Job *job, const Quantizer q, int kind, int scaled, int64_t begin, int64_t left) {
    const float *x = job->x + begin;
    float *y = job->y + begin;
    const uint32_t index = job->index + (uint32_t)begin;
    if (q.rounding != STOCHASTIC) {
        const uint32_t n = left < 1 << 30 ? (uint32_t)left : 1 << 30;
        spans(x, y, n, q, kind, scaled, job->s, job->inverse, 0);
        return n;
    }
    uint32_t random[LANES], n = run(index, left);
    if (n) {
        const Stream stream = stream_at(index, job->k0, job->k1);
        blocks(x, y, n, q, kind, scaled, job->s, job->inverse, &stream);
        return n;
    }
    n = ragged(index, left);
    words(random, n, index, job->k0, job->k1);
    span(x, y, n, q, STOCHASTIC, kind, scaled, job->s, job->inverse, random);
    return n;
}

CLONES static void round_range(int64_t begin, int64_t end, const void *context) {
    const Job job = *(const Job *)context;
    const Quantizer q = *job.q;
    while (begin < end) {
        const int64_t left = end - begin;
        if (q.scale != NONE) begin += stretch(&job, q, SATURATE, 1, begin, left);
        else if (q.kind == WIDE) begin += stretch(&job, q, WIDE, 0, begin, left);
        else if (q.kind == WIDE_SATURATE) begin += stretch(&job, q, WIDE_SATURATE, 0, begin, left);
        else if (q.kind == SATURATE) begin += stretch(&job, q, SATURATE, 0, begin, left);
        else begin += stretch(&job, q, OVERFLOW, 0, begin, left);
    }
}

CLONES static void amax_range(int64_t begin, int64_t end, const void *context) {
    const Job *job = context;
    uint32_t m = largest_bits(job->x + begin, end - begin);
    uint32_t old = __atomic_load_n(job->amax, __ATOMIC_RELAXED);
    while (m > old && !__atomic_compare_exchange_n(job->amax, &old, m, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

#define ROW 2048 /* elements of a row of tiles that are rounded at a time */
#define STRIP 64 /* tiles */

/* Elements from `at` on: tiles of `width` columns side by side, or a piece of one. */
INLINE void row_of_tiles(const Job *job, const Quantizer q, int64_t at, int tiles, uint32_t width,
                         const float *s, const float *inverse) {
    uint32_t random[ROW];
    if (q.rounding == STOCHASTIC) words(random, tiles * width, job->index + (uint32_t)at, job->k0, job->k1);
    for (int t = 0; t < tiles; t++, at += width)
        spans(job->x + at, job->y + at, width, q, SATURATE, 1, s[t], inverse[t], random + t * width);
}

/* Up to STRIP tiles of one band: all maxima, then all scales (vectorized), then the rounding. */
INLINE void strip(const Job *job, const Quantizer q, int64_t row, int64_t rows, int64_t column, int tiles, uint32_t width) {
    uint32_t amax[STRIP] = {0};
    float s[STRIP], inverse[STRIP];
    for (int64_t r = row; r < row + rows; r++)
        for (int t = 0; t < tiles; t++) {
            uint32_t m = largest_bits(job->x + r * job->columns + column + t * width, width);
            amax[t] = m > amax[t] ? m : amax[t];
        }
    scales(amax, STRIP, q, job->global, s, inverse);
    for (int64_t r = row; r < row + rows; r++) {
        const int64_t at = r * job->columns + column;
        if (width <= ROW) row_of_tiles(job, q, at, tiles, width, s, inverse);
        else for (uint32_t c = 0; c < width; c += ROW)
            row_of_tiles(job, q, at + c, 1, width - c < ROW ? width - c : ROW, s, inverse);
    }
}

/* The common tile widths get loops of constant length. */
INLINE void strips(const Job *job, const Quantizer q, int64_t row, int64_t rows, int64_t *column, uint32_t width) {
    const int fit = width < ROW ? ROW / width : 1, most = fit < STRIP ? fit : STRIP;
    for (int64_t left; (left = (job->columns - *column) / width) > 0;) {
        const int tiles = left < most ? (int)left : most;
        strip(job, q, row, rows, *column, tiles, width);
        *column += (int64_t)tiles * width;
    }
}

CLONES static void tile_range(int64_t begin, int64_t end, const void *context) {
    const Job job = *(const Job *)context;
    const Quantizer q = *job.q;
    const int64_t height = q.tile_rows ? q.tile_rows : job.rows;
    const uint32_t width = (uint32_t)(q.tile_columns ? q.tile_columns : job.columns);
    for (int64_t band = begin; band < end; band++) {
        const int64_t row = band * height, left = job.rows - row, rows = left < height ? left : height;
        int64_t column = 0;
        if (width == 16) strips(&job, q, row, rows, &column, 16);
        else if (width == 32) strips(&job, q, row, rows, &column, 32);
        else strips(&job, q, row, rows, &column, width);
        if (column < job.columns) strip(&job, q, row, rows, column, 1, (uint32_t)(job.columns - column));
    }
}

/* Elements; with q->scale = GIVEN, x is multiplied by *given before and divided by it after. */
void halfulp_round(ParallelFor parallel, const float *x, float *y, int64_t n, const Quantizer *q,
                   uint32_t k0, uint32_t k1, uint32_t index, const float *given) {
    const float s = q->scale == GIVEN ? *given : 1.0f;
    const Job job = {x, y, 1, n, q, k0, k1, index, 0, s, 1.0f / s, 1.0f};
    spread(parallel, n, GRAIN, round_range, &job);
}

/* Returns the bits of max |x|. */
uint32_t halfulp_amax(ParallelFor parallel, const float *x, int64_t n) {
    uint32_t amax = 0;
    const Job job = {x, 0, 1, n, 0, 0, 0, 0, &amax, 1.0f, 1.0f, 1.0f};
    spread(parallel, n, GRAIN, amax_range, &job);
    return amax;
}

/* One scale for the whole tensor, from its own amax. */
void halfulp_tensor(ParallelFor parallel, const float *x, float *y, int64_t n, const Quantizer *q,
                    uint32_t k0, uint32_t k1, uint32_t index) {
    Job job = {x, y, 1, n, q, k0, k1, index, 0, 1.0f, 1.0f, 1.0f};
    scale_of(halfulp_amax(parallel, x, n), *q, q->scale, 1.0f, 1.0f, &job.s, &job.inverse);
    spread(parallel, n, GRAIN, round_range, &job);
}

/* Rows, blocks and 2-D tiles of a [rows, columns] matrix. */
void halfulp_tiles(ParallelFor parallel, const float *x, float *y, int64_t rows, int64_t columns,
                   const Quantizer *q, uint32_t k0, uint32_t k1, uint32_t index) {
    Job job = {x, y, rows, columns, q, k0, k1, index, 0, 1.0f, 1.0f, 1.0f};
    if (q->scale == NVFP4) job.global = global_scale(halfulp_amax(parallel, x, rows * columns));
    const int64_t height = q->tile_rows ? q->tile_rows : rows;
    const int64_t bands = height ? (rows + height - 1) / height : 0;
    spread(parallel, columns ? bands : 0, GRAIN / (columns * height + 1) + 1, tile_range, &job);
}

typedef struct { float *total; const float *part; const Quantizer *q; int promote; } Sum;

CLONES static void accumulate_range(int64_t begin, int64_t end, const void *context) {
    const Sum sum = *(const Sum *)context;
    const Quantizer q = *sum.q;
    float *total = sum.total;
    const float *part = sum.part;
    if (sum.promote) for (int64_t i = begin; i < end; i++) total[i] += wide(part[i], q, TRUNCATE, 0, 0);
    else for (int64_t i = begin; i < end; i++) total[i] = wide(total[i] + part[i], q, TRUNCATE, 0, 0);
}

/* The running sum of a GEMM with few fraction bits: part (promote) or the new total is truncated. */
void halfulp_accumulate(ParallelFor parallel, float *total, const float *part, int64_t n, const Quantizer *q,
                        int32_t promote) {
    const Sum sum = {total, part, q, promote};
    spread(parallel, n, GRAIN, accumulate_range, &sum);
}
