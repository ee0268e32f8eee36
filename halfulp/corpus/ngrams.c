/* Distinct n-grams of a block of tokens: the C twin of near.py, bit for bit. */

#include "keys.c"

#define START (9001u ^ 8u) /* Murmur's seed and the length of a key */
#define SEEN 16384

/* MurmurHash3_x64_128 of count <= GROUP keys. */
INLINE void hash(const uint64_t *ends, const uint64_t *begins, uint64_t power, int64_t count, uint64_t *h1, uint64_t *h2) {
    IVDEP for (int64_t j = 0; j < count; j++) {
        uint64_t k = (ends[j] - begins[j] * power) * 0x87c37b91114253d5u;
        k = (k << 31 | k >> 33) * 0x4cf5ad432745937fu;
        const uint64_t a = (k ^ START) + START, b = fmix(a + START);
        h1[j] = fmix(a) + b;
        h2[j] = h1[j] + b;
    }
}

INLINE uint64_t largest_that_counts(const uint8_t *registers, int64_t count) {
    uint8_t least = 255;
    for (int64_t i = 0; i < count; i++) least = registers[i] < least ? registers[i] : least;
    return ~(uint64_t)0 >> least;
}

typedef struct { const Job *job; uint8_t *registers; int64_t row, n; uint64_t cut; } Row;

/* One n-gram whose hash is low enough to matter; returns how many hits there are then. */
INLINE int64_t take(const Row *r, int64_t end, uint64_t h1, uint64_t h2, int64_t hits) {
    uint8_t *here = r->registers + (h1 & (((uint64_t)1 << r->job->lg_k) - 1));
    const int zeros = h2 ? __builtin_clzll(h2) : 64, rank = zeros > 62 ? 63 : zeros + 1;
    uint64_t *seen = r->job->seen + r->row * SEEN + h2 % SEEN;
    const int higher = rank > *here, hit = r->cut && h2 <= r->cut && *seen != h2;
    if (!(higher | hit) || !inside(r->job, end, r->n)) return hits;
    if (higher) *here = rank;
    if (!hit) return hits;
    *seen = h2;
    r->job->hit_rows[hits] = r->row; r->job->hits[hits] = h2;
    return hits + 1;
}

INLINE int64_t row_of(const Job *job, int64_t row, int64_t hits) {
    const int64_t n = job->orders[row], m = (int64_t)1 << job->lg_k, size = job->size;
    const Row r = {job, job->registers + row * m, row, n, job->cuts[row]};
    const uint64_t low = largest_that_counts(r.registers, m), bound = low > r.cut ? low : r.cut;
    const uint64_t power = power_of(n);
    uint64_t h1[GROUP], h2[GROUP];
    uint8_t near[GROUP];
    for (int64_t first = first_end(job, n); first < size; first += GROUP) {
        const int64_t count = size - first < GROUP ? size - first : GROUP;
        const uint64_t *ends = job->sums + first + 1;
        if (count == GROUP) hash(ends, ends - n, power, GROUP, h1, h2);
        else hash(ends, ends - n, power, count, h1, h2);
        for (int64_t j = 0; j < GROUP; j++) near[j] = j < count && h2[j] <= bound;
        EACH(near, j) hits = take(&r, first + j, h1[j], h2[j], hits);
    }
    return hits;
}

CLONES static int64_t ngrams(const Job *job) {
    int64_t hits = 0;
    prefix(job);
    for (int64_t row = 0; row < job->rows; row++) hits = row_of(job, row, hits);
    return hits;
}

int64_t halfulp_ngrams(const Job *job) { return ngrams(job); }
