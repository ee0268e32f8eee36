/* Distinct n-grams of a block of tokens: the C twin of near.py, bit for bit. */

#include "../numerics/round.h"

#define BASE 0xd1342543de82ef95u
#define OFFSET 0x9e3779b97f4a7c15u
#define START (9001u ^ 8u) /* Murmur's seed and the length of a key */
#define GROUP 128
#define SEEN 16384

typedef struct {
    const void *tokens; int64_t width, size, context; /* bytes of a token; tokens; those before the fresh ones */
    const int64_t *starts, *orders; int64_t documents, rows, apart, lg_k;
    uint8_t *registers;   /* [rows][2^lg_k] */
    const uint64_t *cuts; /* [rows]: n-grams with h2 <= cut are handed back; 0: none */
    uint64_t *sums, *seen; /* scratch [size + 1]; [rows][SEEN]: hashes handed back lately */
    int64_t *hit_rows; uint64_t *hits; /* what is handed back */
} Job;

INLINE uint64_t fmix(uint64_t x) {
    x ^= x >> 33; x *= 0xff51afd7ed558ccdu;
    x ^= x >> 33; x *= 0xc4ceb9fe1a85ec53u;
    return x ^ x >> 33;
}

#define MIX(T) for (int64_t i = 0; i < job->size; i++) sums[i] = fmix(((const T *)job->tokens)[i] + OFFSET)

/* sums[i]: key of the first i tokens. */
INLINE void prefix(const Job *job) {
    uint64_t *sums = job->sums + 1, last = 0;
    if (job->width == 1) MIX(uint8_t);
    else if (job->width == 2) MIX(uint16_t);
    else if (job->width == 4) MIX(uint32_t);
    else MIX(uint64_t);
    job->sums[0] = 0;
    for (int64_t i = 0; i < job->size; i++) sums[i] = last = last * BASE + sums[i];
}

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
    uint64_t power = 1, h1[GROUP], h2[GROUP];
    uint8_t near[GROUP];
    for (int64_t i = 0; i < n; i++) power *= BASE;
    for (int64_t first = job->context > n - 1 ? job->context : n - 1; first < size; first += GROUP) {
        const int64_t count = size - first < GROUP ? size - first : GROUP;
        const uint64_t *ends = job->sums + first + 1;
        if (count == GROUP) hash(ends, ends - n, power, GROUP, h1, h2);
        else hash(ends, ends - n, power, count, h1, h2);
        for (int64_t j = 0; j < GROUP; j++) near[j] = j < count && h2[j] <= bound;
        for (int64_t word = 0; word < GROUP; word += 8) {
            uint64_t flags; /* eight bytes of 0 or 1, the first one lowest (little-endian) */
            memcpy(&flags, near + word, 8);
            for (; flags; flags &= flags - 1) {
                const int64_t j = word + __builtin_ctzll(flags) / 8;
                hits = take(&r, first + j, h1[j], h2[j], hits);
            }
        }
    }
    return hits;
}

CLONES static int64_t ngrams(const Job *job) {
    int64_t hits = 0;
    prefix(job);
    for (int64_t row = 0; row < job->rows; row++) hits = row_of(job, row, hits);
    return hits;
}

typedef struct { uint64_t key; uint32_t last, bound; } Known; /* KNOWN of adaptive.py */

typedef struct {
    Job job; /* cuts: keys above are left out; hits: those chosen, row after row */
    const int64_t *unit_ends; const uint32_t *priorities; /* [units] of the block */
    Known *const *known; int64_t slots, *counts; /* [rows]: chosen of each */
    int64_t *ends; uint32_t *chosen_priorities;
} Choice;

/* Whether the sample can do without this occurrence; else it is remembered. */
INLINE int passed_over(Known *known, uint64_t key, uint32_t priority) {
    if (known->key == key) {
        if (priority == known->last || priority > known->bound) return 1;
        known->last = priority;
    } else if (known->bound == UINT32_MAX) *known = (Known){key, priority, UINT32_MAX};
    return 0;
}

INLINE int64_t choose_row(const Choice *choice, int64_t row, int64_t hits) {
    const Job *job = &choice->job;
    const int64_t n = job->orders[row], size = job->size, before = hits;
    const uint64_t cut = job->cuts[row];
    uint64_t power = 1, keys[GROUP];
    uint8_t near[GROUP];
    for (int64_t i = 0; i < n; i++) power *= BASE;
    for (int64_t unit = 0, first = job->context > n - 1 ? job->context : n - 1; first < size; first += GROUP) {
        const int64_t count = size - first < GROUP ? size - first : GROUP;
        const uint64_t *ends = job->sums + first + 1, *begins = ends - n;
        IVDEP for (int64_t j = 0; j < count; j++) keys[j] = ends[j] - begins[j] * power;
        for (int64_t j = 0; j < GROUP; j++) near[j] = j < count && keys[j] <= cut;
        for (int64_t word = 0; word < GROUP; word += 8) {
            uint64_t flags; /* as in row_of */
            memcpy(&flags, near + word, 8);
            for (; flags; flags &= flags - 1) {
                const int64_t j = word + __builtin_ctzll(flags) / 8, end = first + j;
                while (choice->unit_ends[unit] <= end) unit++;
                const uint32_t priority = choice->priorities[unit];
                if (!inside(job, end, n)) continue;
                if (passed_over(choice->known[row] + keys[j] % choice->slots, keys[j], priority)) continue;
                job->hits[hits] = keys[j];
                choice->ends[hits] = end;
                choice->chosen_priorities[hits++] = priority;
            }
        }
    }
    return choice->counts[row] = hits - before, hits;
}

CLONES static void choose(const Choice *choice) {
    int64_t hits = 0;
    prefix(&choice->job);
    for (int64_t row = 0; row < choice->job.rows; row++) hits = choose_row(choice, row, hits);
}

void halfulp_choose(const Choice *choice) { choose(choice); }

int64_t halfulp_ngrams(const Job *job) { return ngrams(job); }
