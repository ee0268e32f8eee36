/* What belongs to samples: the C twin of choose.py and of merged in pairs.py; and prefix of keys.py. */

#include "keys.c"

#define MOST_UNITS 13
#define TILE 2048

typedef struct { uint64_t key; uint32_t last, bound; } Known; /* KNOWN of adaptive.py */

typedef struct { Known *slots; uint64_t count; } Table; /* count: a power of two */

typedef struct {
    Job job; /* cuts: keys above are left out; hits [rows][room]: those chosen */
    const int64_t *unit_ends; const uint32_t *priorities; /* [units] of the block */
    const Table *known; int64_t *counts, room; /* [rows]; counts: chosen of each; room for each */
    int64_t *marks; uint32_t *chosen_priorities; int64_t place; /* mark of position 0 */
} Choice;

/* Whether the sample can do without this occurrence. */
INLINE int passed_over(const Known *known, uint64_t key, uint32_t priority) {
    return known->key == key && (priority == known->last || priority > known->bound);
}

/* A key with a bound keeps its slot. */
INLINE void remember(Known *known, uint64_t key, uint32_t priority) {
    if (known->key == key) known->last = priority;
    else if (known->bound == UINT32_MAX) *known = (Known){key, priority, UINT32_MAX};
}

/* The n-grams of a row that end in [first, last), behind the `hits` that it has already; unit: that of
 * `first` or one before. */
INLINE int64_t choose_row(const Choice *choice, int64_t row, int64_t unit, int64_t first, int64_t last, int64_t hits) {
    const Job *job = &choice->job;
    const int64_t n = job->orders[row];
    const uint64_t cut = job->cuts[row], power = power_of(n);
    const Table table = choice->known[row];
    uint64_t keys[GROUP];
    uint8_t near[GROUP];
    for (; first < last; first += GROUP) {
        const int64_t count = last - first < GROUP ? last - first : GROUP;
        const uint64_t *ends = job->sums + first + 1, *begins = ends - n;
        IVDEP for (int64_t j = 0; j < count; j++) keys[j] = ends[j] - begins[j] * power;
        for (int64_t j = 0; j < GROUP; j++) near[j] = j < count && keys[j] <= cut;
        EACH(near, j) {
            const int64_t end = first + j, at = row * choice->room + hits;
            while (choice->unit_ends[unit] <= end) unit++;
            Known *known = table.slots + (keys[j] & (table.count - 1));
            const uint32_t priority = choice->priorities[unit];
            if (passed_over(known, keys[j], priority) || !inside(job, end, n)) continue;
            remember(known, keys[j], priority);
            job->hits[at] = keys[j];
            choice->marks[at] = choice->place + end;
            choice->chosen_priorities[at] = priority;
            hits++;
        }
    }
    return hits;
}

/* Tile by tile, so that what all rows read is in the nearest cache. */
CLONES static int64_t choose(const Choice *choice) {
    const Job *job = &choice->job;
    prefix(job, 1);
    memset(choice->counts, 0, job->rows * sizeof *choice->counts);
    for (int64_t unit = 0, at = job->context; at < job->size; at += TILE) {
        const int64_t last = at + TILE < job->size ? at + TILE : job->size;
        while (choice->unit_ends[unit] <= at) unit++;
        for (int64_t row = 0; row < job->rows; row++) {
            const int64_t first = first_end(job, job->orders[row]);
            choice->counts[row] = choose_row(choice, row, unit, first > at ? first : at, last, choice->counts[row]);
        }
    }
    return job->rows;
}

CLONES static int64_t sums(const Job *job) { prefix(job, 1); return job->size; }

int64_t halfulp_prefix(const Job *job) { return sums(job); }

int64_t halfulp_choose(const Choice *choice) { return choose(choice); }

typedef struct {
    const uint64_t *keys; const uint32_t *priorities; const uint64_t *least; int64_t pairs; /* sorted */
    const uint64_t *new_keys; const uint32_t *new_priorities; const uint64_t *new_marks;
    const int64_t *order; int64_t added; /* order: ascending new keys */
    uint64_t *all_keys; uint32_t *all_priorities; uint64_t *all_least; int64_t *starts; /* what comes of it */
    int64_t distinct;
} Merge;

/* One more of the `count` smallest different priorities; returns how many there are then. */
INLINE int64_t insert(uint32_t *priorities, int64_t count, uint32_t priority) {
    int64_t at = count;
    while (at && priorities[at - 1] > priority) at--;
    if (at == MOST_UNITS || (at && priorities[at - 1] == priority)) return count;
    if (count == MOST_UNITS) count--;
    memmove(priorities + at + 1, priorities + at, (count - at) * sizeof *priorities);
    priorities[at] = priority;
    return count + 1;
}

int64_t halfulp_merge(Merge *m) {
    int64_t out = 0;
    for (int64_t i = 0, d = 0, j = 0; i < m->pairs || j < m->added;) {
        uint64_t key = j < m->added ? m->new_keys[m->order[j]] : UINT64_MAX, mark = UINT64_MAX;
        int64_t count = 0;
        if (i < m->pairs && m->keys[i] <= key) {
            key = m->keys[i];
            mark = m->least[d++];
            for (; i < m->pairs && m->keys[i] == key; i++) m->all_priorities[out + count++] = m->priorities[i];
        }
        for (int64_t at; j < m->added && m->new_keys[at = m->order[j]] == key; j++) {
            count = insert(m->all_priorities + out, count, m->new_priorities[at]);
            if (m->new_marks[at] < mark) mark = m->new_marks[at];
        }
        m->starts[m->distinct] = out;
        m->all_least[m->distinct++] = mark;
        for (; count; count--) m->all_keys[out++] = key;
    }
    return out;
}
