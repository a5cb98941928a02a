/* Megatron's greedy rule for blends: sample k is from the corpus with the largest weight * max(k, 1) - drawn, the first
 * of equals, in fp64.
 *
 * A plain loop compares all corpora at every sample. Two observations make the comparisons few:
 *   - Corpora of one weight are drawn in turn, so only the next of them is compared: they are a group.
 *   - Within a block of samples, few groups can be the largest. The candidates are those with the largest value at the
 *     end of the block; only they are compared. Those of the others are lines in k, and the largest of lines is below
 *     the chord through its ends. Where the largest candidate is not above that chord, by more than the roundings, all
 *     groups are compared for that sample, and a new block begins.
 * So the result is the plain loop's, to the last tie.
 *
 * Compile without contraction of floating-point operations: weight * k - drawn must be rounded twice.
 * -ffinite-math-only and -fno-signed-zeros let the compiler take the largest of several at once.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    int32_t num_sources, num_groups;
    int32_t *members, *start, *group_of; /* sources by group; where each group's begin; the group of each source */
    int32_t *next;                       /* the member of each group to be drawn next */
    double *weight, *drawn, *source;     /* of each group: its weight; how often `source`, the next member, was drawn */
    int64_t k, comparisons;              /* the next sample; values compared for those before it */
    int32_t block, wanted;               /* samples of a block, and the candidates it should have */
    double threshold;                    /* of the candidates' values at the end of the block */
    int32_t num_candidates;
    int32_t *group, *place;              /* of each candidate; of each group among them */
    double *candidate_weight, *candidate_drawn, *candidate_source;
    double *values, *ends;               /* scratch */
} Order;

static inline double position(int64_t k) { return k > 1 ? (double)k : 1.0; }

static int by_weight(const void *one, const void *other) {
    const double *a = *(const double *const *)one, *b = *(const double *const *)other;
    return *a != *b ? (*a < *b ? -1 : 1) : (a < b ? -1 : a > b);
}

void greedy_free(Order *o) {
    if (!o) return;
    free(o->members), free(o->start), free(o->group_of), free(o->next), free(o->group), free(o->place);
    free(o->weight), free(o->drawn), free(o->source), free(o->values), free(o->ends);
    free(o->candidate_weight), free(o->candidate_drawn), free(o->candidate_source), free(o);
}

/* Begins an order; NULL where there is no memory. */
Order *greedy_new(int32_t num_sources, const double *weights) {
    Order *o = calloc(1, sizeof(Order));
    const double **sorted = malloc(num_sources * sizeof(double *));
    if (!o || !sorted) return free(o), free(sorted), NULL;
    int32_t **numbers[] = {&o->members, &o->start, &o->group_of, &o->next, &o->group, &o->place};
    double **reals[] = {&o->weight, &o->drawn, &o->source, &o->values, &o->ends,
                        &o->candidate_weight, &o->candidate_drawn, &o->candidate_source};
    int failed = 0;
    for (int i = 0; i < 6; i++) failed |= !(*numbers[i] = calloc(num_sources + 8, sizeof(int32_t)));
    for (int i = 0; i < 8; i++) failed |= !(*reals[i] = calloc(num_sources + 8, sizeof(double)));
    if (failed) return greedy_free(o), free(sorted), NULL;
    o->num_sources = num_sources;
    for (int32_t i = 0; i < num_sources; i++) sorted[i] = weights + i;
    qsort(sorted, num_sources, sizeof(double *), by_weight);
    for (int32_t i = 0; i < num_sources; i++) {
        int32_t source = (int32_t)(sorted[i] - weights);
        if (!i || *sorted[i] != *sorted[i - 1]) {
            int32_t g = o->num_groups++;
            o->start[g] = o->next[g] = i, o->weight[g] = *sorted[i], o->source[g] = source;
        }
        o->place[i] = -1;
        o->members[i] = source, o->group_of[source] = o->num_groups - 1;
    }
    o->start[o->num_groups] = num_sources;
    o->block = 16 + (int32_t)(2.0 * sqrt((double)o->num_groups));
    o->wanted = o->block + o->block / 2;
    o->threshold = DBL_MAX;
    for (int32_t g = o->num_groups; g % 8; g++) o->drawn[g] = DBL_MAX;
    free(sorted);
    return o;
}

/* How often each source was drawn. */
void greedy_drawn(const Order *o, int64_t *drawn) {
    for (int32_t g = 0; g < o->num_groups; g++)
        for (int32_t i = o->start[g]; i < o->start[g + 1]; i++)
            drawn[o->members[i]] = (int64_t)o->drawn[g] + (i < o->next[g]);
}

/* How many values were compared: what the samples so far have cost. */
int64_t greedy_comparisons(const Order *o) { return o->comparisons; }

/* The rank-th largest of `count` values, which are reordered. */
static double largest(double *values, int32_t count, int32_t rank) {
    int32_t low = 0, high = count - 1;
    while (low < high) {
        double pivot = values[low + (high - low) / 2];
        int32_t i = low, j = high;
        while (i <= j) {
            while (values[i] > pivot) i++;
            while (values[j] < pivot) j--;
            if (i <= j) {
                double value = values[i];
                values[i++] = values[j], values[j--] = value;
            }
        }
        if (rank <= j) high = j;
        else if (rank >= i) low = i;
        else break;
    }
    return values[rank];
}

typedef struct {
    double first, slope; /* above the values of all groups that are no candidates, from the block's first sample on */
} Chord;

/* Chooses the candidates of the samples [k, end). */
static Chord choose_candidates(Order *o, int64_t end) {
    int32_t groups = o->num_groups, enough = 0, count = 0;
    const double *weight = o->weight, *drawn = o->drawn;
    double *ends = o->ends, first = position(o->k), last = position(end - 1);
    o->comparisons += 2 * groups; /* with the threshold, and of what is below it */
    for (int32_t g = 0; g < groups; g++) {
        ends[g] = weight[g] * last - drawn[g];
        enough += ends[g] >= o->threshold;
    }
    if (o->wanted >= groups) o->threshold = -DBL_MAX;
    else if (enough < o->wanted - o->wanted / 8 || enough > o->wanted + o->wanted / 2) {
        memcpy(o->values, ends, groups * sizeof(double));
        o->threshold = largest(o->values, groups, o->wanted + o->wanted / 8);
    }
    double threshold = o->threshold, above_first = -DBL_MAX, above_last = -DBL_MAX, heaviest = 0.0;
    for (int32_t g = 0; g < groups; g++) {
        double at_first = ends[g] < threshold ? weight[g] * first - drawn[g] : -DBL_MAX;
        double at_last = ends[g] < threshold ? ends[g] : -DBL_MAX;
        double other = ends[g] < threshold ? weight[g] : 0.0;
        above_first = at_first > above_first ? at_first : above_first;
        above_last = at_last > above_last ? at_last : above_last;
        heaviest = other > heaviest ? other : heaviest;
    }
    for (int32_t c = 0; c < o->num_candidates; c++) o->place[o->group[c]] = -1;
    for (int32_t g = 0; g < groups; g++) {
        o->group[count] = g;
        count += ends[g] >= threshold;
    }
    o->num_candidates = count;
    for (int32_t c = 0; c < count; c++) {
        int32_t g = o->group[c];
        o->place[g] = c;
        o->candidate_weight[c] = weight[g], o->candidate_drawn[c] = drawn[g], o->candidate_source[c] = o->source[g];
    }
    for (int32_t c = count; c % 8; c++) o->candidate_weight[c] = 0.0, o->candidate_drawn[c] = DBL_MAX;
    if (count == groups) return (Chord){-DBL_MAX, 0.0};
    double roundings = 0x1p-50 * (heaviest * last + fabs(above_first) + fabs(above_last) + 1.0);
    int64_t steps = end - 1 - o->k;
    return (Chord){above_first + roundings, steps ? (above_last - above_first) / (double)steps : 0.0};
}

/* The largest of values; the group's next source, the first of equals, goes to `source`. */
static inline double compare(int32_t count, double at, const double *restrict weight, const double *restrict drawn,
                             const double *restrict sources, double *restrict values, int32_t *source) {
    double best = -DBL_MAX, first = DBL_MAX;
    count = (count + 7) & ~7;
    for (int32_t i = 0; i < count; i++) {
        values[i] = weight[i] * at - drawn[i];
        best = values[i] > best ? values[i] : best;
    }
    for (int32_t i = 0; i < count; i++) {
        double equal = values[i] == best ? sources[i] : DBL_MAX;
        first = equal < first ? equal : first;
    }
    *source = (int32_t)first;
    return best;
}

static inline void draw(Order *o, int32_t source) {
    int32_t g = o->group_of[source], c = o->place[g];
    if (++o->next[g] == o->start[g + 1]) o->next[g] = o->start[g], o->drawn[g] += 1.0;
    o->source[g] = (double)o->members[o->next[g]];
    if (c >= 0) o->candidate_drawn[c] = o->drawn[g], o->candidate_source[c] = o->source[g];
    o->k++;
}

/* Writes the sources of the next `size` samples. */
void greedy_next(Order *o, int64_t size, uint16_t *choice) {
    const int64_t first = o->k, stop = first + size;
    while (o->k < stop) {
        int64_t begin = o->k, end = begin + o->block < stop ? begin + o->block : stop;
        Chord others = choose_candidates(o, end);
        int is_sure = 1;
        while (o->k < end && is_sure) {
            int32_t source;
            double at = position(o->k);
            double best = compare(o->num_candidates, at, o->candidate_weight, o->candidate_drawn, o->candidate_source,
                                  o->values, &source);
            is_sure = best > others.first + others.slope * (double)(o->k - begin);
            o->comparisons += o->num_candidates + (is_sure ? 0 : o->num_groups);
            if (!is_sure) compare(o->num_groups, at, o->weight, o->drawn, o->source, o->values, &source);
            choice[o->k - first] = (uint16_t)source;
            draw(o, source);
        }
        if (is_sure) o->wanted -= o->wanted > 8;
        else o->wanted = o->wanted + 8 < o->num_groups ? o->wanted + 8 : o->num_groups;
    }
}
