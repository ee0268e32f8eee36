/* Keys of the n-grams of a block of tokens: the C twin of keys.py, a part of ngrams.c and sample.c. */

#pragma once
#include "../numerics/round.h"

#define BASE 0xd1342543de82ef95u
#define OFFSET 0x9e3779b97f4a7c15u
#define GROUP 128

typedef struct {
    const void *tokens; int64_t width, size, context; /* bytes of a token; tokens; those before the fresh ones */
    const int64_t *starts, *orders; int64_t documents, rows, apart, lg_k;
    uint8_t *registers;   /* [rows][2^lg_k] */
    const uint64_t *cuts; /* [rows]: n-grams with h2 <= cut are handed back; 0: none */
    uint64_t *sums, *seen; /* scratch [size + 1]; [rows][SEEN]: keys met lately */
    int64_t *hit_rows; uint64_t *hits; /* what is handed back */
} Job;

INLINE uint64_t fmix(uint64_t x) {
    x ^= x >> 33; x *= 0xff51afd7ed558ccdu;
    x ^= x >> 33; x *= 0xc4ceb9fe1a85ec53u;
    return x ^ x >> 33;
}

#define MIX(T) for (int64_t i = 0; i < job->size; i++) sums[i] = fmix(((const T *)job->tokens)[i] + OFFSET) * factor

/* sums[i]: key of the first i tokens, times factor. */
INLINE void prefix(const Job *job, uint64_t factor) {
    uint64_t *sums = job->sums + 1, last = 0;
    if (job->width == 1) MIX(uint8_t);
    else if (job->width == 2) MIX(uint16_t);
    else if (job->width == 4) MIX(uint32_t);
    else MIX(uint64_t);
    job->sums[0] = 0;
    for (int64_t i = 0; i < job->size; i++) sums[i] = last = last * BASE + sums[i];
}

/* Whether the n-gram lies in one document (and begins at a multiple of n in it). */
INLINE int inside(const Job *job, int64_t end, int64_t n) {
    int64_t low = 0, high = job->documents;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (job->starts[middle] <= end) low = middle; else high = middle;
    }
    const int64_t length = end - job->starts[low] + 1;
    return length >= n && (!job->apart || length % n == 0);
}

/* The first position where an n-gram can end in the fresh tokens. */
INLINE int64_t first_end(const Job *job, int64_t n) { return job->context > n - 1 ? job->context : n - 1; }

/* B^n */
INLINE uint64_t power_of(int64_t n) {
    uint64_t power = 1;
    for (int64_t i = 0; i < n; i++) power *= BASE;
    return power;
}

/* For each j < GROUP whose near[j] is 1, in order (eight bytes of 0 or 1 at a time, little-endian). */
#define EACH(near, j) \
    for (int64_t word = 0, j; word < GROUP; word += 8) \
        for (uint64_t flags = eight(near + word); flags && (j = word + __builtin_ctzll(flags) / 8, 1); flags &= flags - 1)

INLINE uint64_t eight(const uint8_t *bytes) { uint64_t u; memcpy(&u, bytes, 8); return u; }
