/* The sums behind the counters of one quantizer call; see statistics.py for their definitions. */

#include "scale.h"

enum { BEYOND, NONZERO, DROPPED, ENERGY, LOST, AMAX, SUMS };
#define CHUNK 16384 /* elements that are summed by themselves: the total does not depend on threads */

typedef struct { const float *x, *y; int64_t n; float s, limit; double *sums; } Count;

CLONES static void count_range(int64_t begin, int64_t end, const void *context) {
    const Count job = *(const Count *)context;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t at = chunk * CHUNK, left = job.n - at, n = left < CHUNK ? left : CHUNK;
        const float *x = job.x + at, *y = job.y + at;
        uint32_t beyond = 0, nonzero = 0, dropped = 0, amax = 0;
        double energy = 0, lost = 0;
        _Pragma("omp simd reduction(+ : beyond, nonzero, dropped, energy, lost) reduction(max : amax)")
        for (int64_t i = 0; i < n; i++) {
            const uint32_t bits = bits_of(x[i]) & 0x7fffffffu;
            const float gone = y[i] == 0 ? x[i] : 0;
            beyond += float_of(bits) * job.s > job.limit;
            nonzero += x[i] != 0;
            dropped += gone != 0;
            energy += (double)x[i] * x[i];
            lost += (double)gone * gone;
            amax = bits > amax ? bits : amax;
        }
        const double sums[SUMS] = {beyond, nonzero, dropped, energy, lost, float_of(amax)};
        memcpy(job.sums + chunk * SUMS, sums, sizeof sums);
    }
}

/* sums: [ceil(n / CHUNK)][SUMS]; x s > limit is beyond. */
void halfulp_count(ParallelFor parallel, const float *x, const float *y, int64_t n, float s, float limit, double *sums) {
    const Count job = {x, y, n, s, limit, sums};
    spread(parallel, (n + CHUNK - 1) / CHUNK, 2, count_range, &job);
}

typedef struct { const float *x; int64_t rows, columns; const Quantizer *q; float global, limit; int64_t *beyond; } Tiles;

INLINE int64_t beyond_tile(const float *x, int64_t rows, int64_t columns, int64_t stride, const Tiles *job, const Quantizer q) {
    uint32_t amax = 0;
    for (int64_t r = 0; r < rows; r++) {
        const uint32_t m = largest_bits(x + r * stride, columns);
        amax = m > amax ? m : amax;
    }
    float s, inverse;
    scale_of(amax, q, q.scale, job->global, 1.0f / job->global, &s, &inverse);
    int64_t count = 0;
    if (float_of(amax) * s > job->limit)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < columns; c++) count += fabsf(x[r * stride + c]) * s > job->limit;
    return count;
}

CLONES static void beyond_range(int64_t begin, int64_t end, const void *context) {
    const Tiles *job = context;
    const Quantizer q = *job->q;
    const int64_t height = q.tile_rows ? q.tile_rows : job->rows, width = q.tile_columns ? q.tile_columns : job->columns;
    int64_t count = 0;
    for (int64_t row = begin * height; row < end * height && row < job->rows; row += height) {
        const int64_t rows = job->rows - row < height ? job->rows - row : height;
        for (int64_t column = 0; column < job->columns; column += width) {
            const float *x = job->x + row * job->columns + column;
            const int64_t columns = job->columns - column < width ? job->columns - column : width;
            if (columns == 16) count += beyond_tile(x, rows, 16, job->columns, job, q);
            else if (columns == 32) count += beyond_tile(x, rows, 32, job->columns, job, q);
            else count += beyond_tile(x, rows, columns, job->columns, job, q);
        }
    }
    __atomic_fetch_add(job->beyond, count, __ATOMIC_RELAXED);
}

/* Elements of a [rows, columns] matrix whose product with the scale of their tile is beyond limit. */
int64_t halfulp_beyond(ParallelFor parallel, const float *x, int64_t rows, int64_t columns, const Quantizer *q,
                       uint32_t amax, float limit) {
    int64_t beyond = 0;
    const Tiles job = {x, rows, columns, q, q->scale == NVFP4 ? global_scale(amax) : 1.0f, limit, &beyond};
    const int64_t height = q->tile_rows ? q->tile_rows : rows;
    spread(parallel, columns && height ? (rows + height - 1) / height : 0, GRAIN / (columns * height + 1) + 1, beyond_range, &job);
    return beyond;
}
