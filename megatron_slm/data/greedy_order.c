/* Megatron's greedy rule for blends: sample k is from the corpus with the largest weight * max(k, 1) - drawn, the first
 * of equals, in fp64.
 *
 * A plain loop compares all corpora at every sample. Three observations make the comparisons few:
 *   - Corpora of one weight are drawn in turn, so only the next of them is compared: they are a group.
 *   - A group's value falls by one where it is drawn, and then grows by its weight with every sample. So it is known
 *     when it will reach a level, and before that the group is no candidate. A calendar holds the samples at which
 *     groups become candidates.
 *   - The largest value changes little, or as it did last. So few candidates reach a level that is just below it, and
 *     rises as it does. Where none is left, all groups are compared, and the level is chosen anew.
 * So the result is the plain loop's, to the last tie.
 *
 * Compile without contraction of floating-point operations: weight * k - drawn must be rounded twice.
 * -ffinite-math-only and -fno-signed-zeros let the compiler take the largest of several at once.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LARGE 1e300    /* more than any value */
#define FEWEST 16      /* candidates that a level leaves: comparing fewer is hardly faster */
#define CHOICE_COST 25 /* of choosing a level, for each group, in comparisons */

typedef struct {
    int32_t num_sources, num_groups;
    int32_t *members, *start, *group_of; /* sources by group; where each group's begin; the group of each source */
    int32_t *next;                       /* the member of each group to be drawn next */
    double *weight, *drawn, *source;     /* of each group: its weight; how often `source`, the next member, was drawn */
    int64_t k, comparisons;              /* the next sample; values compared for those before it */
    double level, slope, from;           /* groups below level + slope * (k - from) are no candidates */
    double best;                         /* largest value at sample `from` */
    int32_t wanted, num_candidates;      /* candidates that a new level leaves; that there are */
    int64_t spent;                       /* values compared since the level was chosen */
    int32_t *group, *place;              /* of each candidate; where each group is among them */
    double *candidate_weight, *candidate_drawn, *candidate_source;
    int32_t num_days, *day, *later;      /* calendar: the first group of a day, a sample; the one after each group */
    double *values;                      /* scratch */
} Order;

/* Values are compared eight at a time. */
static inline int32_t padded(int32_t count) { return (count + 7) & ~7; }

static inline double position(int64_t k) { return k > 1 ? (double)k : 1.0; }

static int by_weight(const void *one, const void *other) {
    const double *a = *(const double *const *)one, *b = *(const double *const *)other;
    return *a != *b ? (*a < *b ? -1 : 1) : (a < b ? -1 : a > b);
}

void greedy_free(Order *o) {
    if (!o) return;
    free(o->members), free(o->start), free(o->group_of), free(o->next), free(o->group), free(o->place);
    free(o->weight), free(o->drawn), free(o->source), free(o->values), free(o->day), free(o->later);
    free(o->candidate_weight), free(o->candidate_drawn), free(o->candidate_source), free(o);
}

/* Begins an order; NULL where there is no memory. */
Order *greedy_new(int32_t num_sources, const double *weights) {
    Order *o = calloc(1, sizeof(Order));
    const double **sorted = malloc(num_sources * sizeof(double *));
    if (!o || !sorted) return free(o), free(sorted), NULL;
    o->num_sources = num_sources;
    for (o->num_days = 1024; o->num_days < 4 * num_sources; o->num_days *= 2) {}
    int32_t **numbers[] = {&o->members, &o->start, &o->group_of, &o->next, &o->group, &o->place, &o->later};
    double **reals[] = {&o->weight, &o->drawn, &o->source, &o->values,
                        &o->candidate_weight, &o->candidate_drawn, &o->candidate_source};
    int failed = !(o->day = malloc(o->num_days * sizeof(int32_t)));
    for (int i = 0; i < 7; i++) failed |= !(*numbers[i] = calloc(padded(num_sources + 1), sizeof(int32_t)));
    for (int i = 0; i < 7; i++) failed |= !(*reals[i] = calloc(padded(num_sources), sizeof(double)));
    if (failed) return greedy_free(o), free(sorted), NULL;
    for (int32_t i = 0; i < num_sources; i++) sorted[i] = weights + i;
    qsort(sorted, num_sources, sizeof(double *), by_weight);
    for (int32_t i = 0; i < num_sources; i++) {
        int32_t source = (int32_t)(sorted[i] - weights);
        if (!i || *sorted[i] != *sorted[i - 1]) {
            int32_t g = o->num_groups++;
            o->start[g] = o->next[g] = i, o->weight[g] = *sorted[i], o->source[g] = source;
        }
        o->members[i] = source, o->group_of[source] = o->num_groups - 1;
    }
    o->start[o->num_groups] = num_sources;
    for (int32_t g = o->num_groups; g < padded(o->num_groups); g++) o->drawn[g] = LARGE;
    o->wanted = FEWEST;
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

/* The largest of values; the group's next source, the first of equals, goes to `source`. */
static inline double compare(int32_t count, double at, const double *restrict weight, const double *restrict drawn,
                             const double *restrict sources, double *restrict values, int32_t *source) {
    double best = -LARGE, first = LARGE;
    count = padded(count);
    for (int32_t i = 0; i < count; i++) {
        values[i] = weight[i] * at - drawn[i];
        best = values[i] > best ? values[i] : best;
    }
    for (int32_t i = 0; i < count; i++) {
        double equal = values[i] == best ? sources[i] : LARGE;
        first = equal < first ? equal : first;
    }
    *source = (int32_t)first;
    return best;
}

static inline double level_at(const Order *o, int64_t k) { return o->level + o->slope * (position(k) - o->from); }

/* Makes a group a candidate of sample k if it may reach the level there; else it is looked at again on a later day. */
static inline void enter(Order *o, int32_t g, int64_t k) {
    const double grown = o->weight[g] * position(k), roundings = 0x1p-48 * (grown + o->weight[g] * o->num_days + 1.0);
    const double missing = level_at(o, k) - (grown - o->drawn[g]) - roundings, gained = o->weight[g] - o->slope;
    o->comparisons++;
    if (missing <= 0.0) {
        int32_t c = o->place[g] = o->num_candidates++;
        o->group[c] = g;
        o->candidate_weight[c] = o->weight[g];
        o->candidate_drawn[c] = o->drawn[g], o->candidate_source[c] = o->source[g];
    } else {
        int32_t most = o->num_days - 1, days = missing < gained * (most - 1) ? (int32_t)(missing / gained) + 1 : most;
        int32_t *day = o->day + ((k + days) & most);
        o->later[g] = *day, *day = g;
    }
}

static inline void leave(Order *o, int32_t c) {
    int32_t last = --o->num_candidates;
    o->place[o->group[last]] = c;
    o->group[c] = o->group[last], o->candidate_weight[c] = o->candidate_weight[last];
    o->candidate_drawn[c] = o->candidate_drawn[last], o->candidate_source[c] = o->candidate_source[last];
    o->candidate_weight[last] = 0.0, o->candidate_drawn[last] = LARGE;
}

/* How fast the largest value grew since it was `o->best`; no faster than the slowest group above a level. */
static double trend(const Order *o, double at, double best, double level, int32_t count, const double *weight,
                    const double *drawn) {
    double slowest = LARGE, grown = at > o->from && best > o->best ? (best - o->best) / (at - o->from) : 0.0;
    for (int32_t i = 0; i < count; i++) {
        double of_group = weight[i] * at - drawn[i] >= level ? weight[i] : LARGE;
        slowest = of_group < slowest ? of_group : slowest;
    }
    return grown < slowest ? grown : slowest;
}

/* Values of some groups at a sample, and the largest of them. */
static double evaluate(Order *o, double at, int32_t count, const double *weight, const double *drawn) {
    double best = -LARGE;
    for (int32_t i = 0; i < count; i++) {
        o->values[i] = weight[i] * at - drawn[i];
        best = o->values[i] > best ? o->values[i] : best;
    }
    o->comparisons += count, o->spent += count;
    return best;
}

/* Chooses the level among all groups' values at sample k. */
static void choose_level(Order *o, int64_t k) {
    const int32_t groups = o->num_groups;
    const double at = position(k), best = evaluate(o, at, groups, o->weight, o->drawn);
    o->level = o->wanted < groups ? largest(o->values, groups, o->wanted) : -LARGE;
    o->slope = trend(o, at, best, o->level, groups, o->weight, o->drawn);
    o->best = best, o->from = at, o->spent = 0;
    memset(o->day, -1, o->num_days * sizeof(int32_t));
    for (int32_t c = 0; c < padded(groups); c++) o->candidate_weight[c] = 0.0, o->candidate_drawn[c] = LARGE;
    o->num_candidates = 0;
    for (int32_t g = 0; g < groups; g++) enter(o, g, k);
}

/* Raises the level, so that not many more candidates of sample k are left than are wanted: higher and no flatter, it
 * leaves those out that were left out. */
static void raise_level(Order *o, int64_t k) {
    const int32_t count = o->num_candidates;
    if (count <= o->wanted) return;
    const double *weight = o->candidate_weight, *drawn = o->candidate_drawn, at = position(k), before = level_at(o, k);
    const double best = evaluate(o, at, count, weight, drawn), wanted = largest(o->values, count, o->wanted);
    o->level = wanted > before ? wanted : before;
    const double slope = trend(o, at, best, o->level, count, weight, drawn);
    o->slope = slope > o->slope ? slope : o->slope;
    o->best = best, o->from = at;
    for (int32_t c = count - 1; c >= 0; c--) {
        int32_t g = o->group[c];
        if (weight[c] * at - drawn[c] < o->level) leave(o, c), enter(o, g, k);
    }
}

/* Counts a draw from a group; the group's next member is drawn next. */
static inline void draw(Order *o, int32_t g) {
    if (++o->next[g] == o->start[g + 1]) o->next[g] = o->start[g], o->drawn[g] += 1.0;
    o->source[g] = (double)o->members[o->next[g]];
}

/* Writes the sources of the next `size` samples. */
void greedy_next(Order *o, int64_t size, uint16_t *choice) {
    const int64_t budget = (int64_t)CHOICE_COST * o->num_groups;
    if (!o->k) choose_level(o, 0);
    for (int64_t i = 0; i < size; i++) {
        const int64_t k = o->k++;
        const double at = position(k);
        int32_t source, *day = o->day + (k & (o->num_days - 1));
        for (int32_t g = *day, later; g >= 0; g = later) later = o->later[g], enter(o, g, k);
        *day = -1;

        int is_sure = o->num_candidates > 0;
        if (is_sure) {
            is_sure = compare(o->num_candidates, at, o->candidate_weight, o->candidate_drawn, o->candidate_source,
                              o->values, &source) >= level_at(o, k);
            o->comparisons += o->num_candidates, o->spent += o->num_candidates;
        }
        if (!is_sure) {
            compare(o->num_groups, at, o->weight, o->drawn, o->source, o->values, &source);
            o->comparisons += o->num_groups;
        }
        choice[i] = (uint16_t)source;
        const int32_t g = o->group_of[source], c = o->place[g];
        draw(o, g);

        if (!is_sure) {
            o->wanted += o->wanted / 4 + 1; /* the last choice cost more than the comparisons since */
            choose_level(o, k + 1);
            continue;
        }
        if (o->weight[g] * position(k + 1) - o->drawn[g] >= level_at(o, k + 1))
            o->candidate_drawn[c] = o->drawn[g], o->candidate_source[c] = o->source[g];
        else leave(o, c), enter(o, g, k + 1);
        const int is_paid = o->spent > budget;
        if (is_paid) o->spent = 0, o->wanted -= o->wanted > FEWEST ? 1 + o->wanted / 8 : 0;
        if (is_paid || o->num_candidates > 2 * o->wanted + 8) raise_level(o, k + 1);
    }
}
