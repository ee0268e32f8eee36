/* Distinct n-grams of a block of tokens: the C twin of near.py, bit for bit. */

#include "keys.c"

#define START (9001u ^ 8u) /* Murmur's seed and the length of a key */
#define FACTOR 0x87c37b91114253d5u /* the hash's first, which the sums have already */
#define LAST 0xc4ceb9fe1a85ec53u
#define SLACK ((uint64_t)1 << 33)
#define SEEN 16384

/* fmix before its last product. */
INLINE uint64_t almost(uint64_t x) {
    x ^= x >> 33; x *= 0xff51afd7ed558ccdu;
    return x ^ x >> 33;
}

typedef struct { uint64_t a, b; } Halves;

/* MurmurHash3_x64_128 of a key, but for the last steps. */
INLINE Halves halves(uint64_t key) {
    const uint64_t a = ((key << 31 | key >> 33) * 0x4cf5ad432745937fu ^ START) + START;
    return (Halves){almost(a), almost(a + START)};
}

/* h2 + SLACK of count <= GROUP keys, but for less than SLACK: see at_most of murmur.py. */
INLINE void about(const uint64_t *ends, const uint64_t *begins, uint64_t power, int64_t count, uint64_t *h2) {
    IVDEP for (int64_t j = 0; j < count; j++) {
        const Halves h = halves(ends[j] - begins[j] * power);
        h2[j] = (h.a + 2 * h.b) * LAST + SLACK;
    }
}

INLINE uint64_t largest_that_counts(const uint8_t *registers, int64_t count) {
    uint8_t least = 255;
    for (int64_t i = 0; i < count; i++) least = registers[i] < least ? registers[i] : least;
    return ~(uint64_t)0 >> least;
}

typedef struct { const Job *job; uint8_t *registers; int64_t row, n; uint64_t cut; int all; } Row; /* all: any hash may matter */

INLINE uint64_t *seen_of(const Row *r, uint64_t key) { return r->job->seen + r->row * SEEN + (key >> 50); }

/* One n-gram whose hash may be low enough to matter; returns how many hits there are then. */
INLINE int64_t take(const Row *r, int64_t end, uint64_t key, int64_t hits) {
    const Halves h = halves(key);
    uint64_t h1 = h.a * LAST, h2 = h.b * LAST;
    h2 ^= h2 >> 33;
    h1 = (h1 ^ h1 >> 33) + h2;
    h2 += h1;
    uint8_t *here = r->registers + (h1 & (((uint64_t)1 << r->job->lg_k) - 1));
    const int zeros = h2 ? __builtin_clzll(h2) : 64, rank = zeros > 62 ? 63 : zeros + 1;
    const int higher = rank > *here, hit = r->cut && h2 <= r->cut && *seen_of(r, key) != key;
    if (!(higher | hit | r->all) || !inside(r->job, end, r->n)) return hits;
    *seen_of(r, key) = key;
    if (higher) *here = rank;
    if (!hit) return hits;
    r->job->hit_rows[hits] = r->row; r->job->hits[hits] = h2;
    return hits + 1;
}

INLINE int64_t row_of(const Job *job, int64_t row, int64_t hits) {
    const int64_t n = job->orders[row], m = (int64_t)1 << job->lg_k, size = job->size;
    uint8_t *registers = job->registers + row * m;
    const uint64_t low = largest_that_counts(registers, m), cut = job->cuts[row], bound = low > cut ? low : cut;
    const Row r = {job, registers, row, n, cut, bound > ~(2 * SLACK)};
    const uint64_t power = power_of(n), most = bound + 2 * SLACK;
    uint64_t h2[GROUP];
    uint8_t near[GROUP];
    for (int64_t first = first_end(job, n); first < size; first += GROUP) {
        const int64_t count = size - first < GROUP ? size - first : GROUP;
        const uint64_t *ends = job->sums + first + 1, *begins = ends - n;
        if (r.all) {
            for (int64_t j = 0; j < count; j++) {
                const uint64_t key = ends[j] - begins[j] * power;
                if (*seen_of(&r, key) != key) hits = take(&r, first + j, key, hits);
            }
            continue;
        }
        if (count == GROUP) about(ends, begins, power, GROUP, h2);
        else about(ends, begins, power, count, h2);
        for (int64_t j = 0; j < GROUP; j++) near[j] = j < count && h2[j] <= most;
        EACH(near, j) hits = take(&r, first + j, ends[j] - begins[j] * power, hits);
    }
    return hits;
}

CLONES static int64_t ngrams(const Job *job) {
    int64_t hits = 0;
    prefix(job, FACTOR);
    for (int64_t row = 0; row < job->rows; row++) hits = row_of(job, row, hits);
    return hits;
}

int64_t halfulp_ngrams(const Job *job) { return ngrams(job); }
