/* Megatron's greedy rule for blends: sample k is from the corpus with the largest weight * max(k, 1) - drawn, the first
 * of equals, in fp64.
 *
 * A plain loop compares all corpora at every sample. Here only those are compared that can be the largest: `level` is a
 * value that the largest has always exceeded, and a corpus sleeps until the sample where it can reach it. Corpora that
 * wake at sample k are in a list of their own. Where the largest falls short of the level, the level was too high: it is
 * lowered, all corpora are looked at again, and nothing has been chosen meanwhile. So the result is the plain loop's, to
 * the last tie.
 *
 * Compile without contraction of floating-point operations: weight * k - drawn must be rounded twice.
 * -ffinite-math-only and -fno-signed-zeros let the compiler take the largest of several at once.
 */
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#define HORIZON 65536 /* samples ahead that have a list; corpora that sleep longer are looked at again then */

typedef struct {
    int32_t sources;
    const double *weights;
    int64_t *drawn;
    double level;
    int32_t num_active;             /* corpora that are compared: */
    double *active, *weight, *count; /* their numbers, weights and samples so far, one after the other */
    int32_t *place;                 /* of each corpus among these */
    int32_t *first, *next;       /* lists of the corpora that wake at each sample of the horizon, -1 at their ends */
} State;

static inline double position(int64_t k) { return k > 1 ? (double)k : 1.0; }

static void put(State *s, int32_t source, int64_t k) {
    double wake = ((double)s->drawn[source] + s->level) / s->weights[source]; /* where it reaches the level */
    double ahead = floor(wake) - 1.0 - (double)k;                            /* one early, for roundings */
    if (!(ahead >= 1.0)) {
        s->place[source] = s->num_active;
        s->active[s->num_active] = (double)source;
        s->weight[s->num_active] = s->weights[source];
        s->count[s->num_active++] = (double)s->drawn[source];
        return;
    }
    int64_t at = (k + (ahead < HORIZON - 1 ? (int64_t)ahead : HORIZON - 1)) % HORIZON;
    s->next[source] = s->first[at];
    s->first[at] = source;
}

static void put_all(State *s, int64_t k, double level) {
    s->level = level;
    s->num_active = 0;
    for (int32_t at = 0; at < HORIZON; at++) s->first[at] = -1;
    for (int32_t source = 0; source < s->sources; source++) put(s, source, k);
}

/* Fills choice [size] and counts [size / every + 1, sources]: those before each block of `every` samples.
 * Returns 0, or 1 where there is no memory. */
int greedy_order(int32_t sources, const double *weights, int64_t size, int64_t every, uint16_t *choice, int64_t *counts) {
    State s = {sources, weights, calloc(sources, sizeof(int64_t)), 0.0, 0, malloc(sources * sizeof(double)),
               malloc(sources * sizeof(double)), malloc(sources * sizeof(double)), malloc(sources * sizeof(int32_t)),
               malloc(HORIZON * sizeof(int32_t)), malloc(sources * sizeof(int32_t))};
    double *errors = malloc(sources * sizeof(double));
    int failed = !s.drawn || !s.active || !s.weight || !s.count || !s.place || !s.first || !s.next || !errors;
    double lowest = DBL_MAX;         /* of the largest, since the level was set */
    int64_t compared = 0, since = 0; /* comparisons and samples since then */
    if (!failed) put_all(&s, 0, 0.0);
    for (int64_t k = 0; k < size && !failed; k++) {
        if (k % every == 0)
            for (int32_t i = 0; i < sources; i++) counts[k / every * sources + i] = s.drawn[i];
        int32_t woken = s.first[k % HORIZON];
        s.first[k % HORIZON] = -1;
        while (woken >= 0) {
            int32_t after = s.next[woken];
            put(&s, woken, k);
            woken = after;
        }
        double at = position(k), best;
        for (;;) {
            best = -DBL_MAX;
            for (int32_t i = 0; i < s.num_active; i++) {
                errors[i] = s.weight[i] * at - s.count[i];
                best = errors[i] > best ? errors[i] : best;
            }
            if (best >= s.level) break;
            put_all(&s, k, (s.num_active ? best : s.level) - 0.02); /* too high a level */
            lowest = DBL_MAX, compared = since = 0;
        }
        double first = DBL_MAX; /* of equals */
        for (int32_t i = 0; i < s.num_active; i++) {
            double equal = errors[i] == best ? s.active[i] : DBL_MAX;
            first = equal < first ? equal : first;
        }
        int32_t chosen = (int32_t)first, place = s.place[chosen], last = --s.num_active;
        lowest = best < lowest ? best : lowest;
        compared += s.num_active, since++;
        choice[k] = (uint16_t)chosen;
        s.active[place] = s.active[last], s.weight[place] = s.weight[last], s.count[place] = s.count[last];
        s.place[(int32_t)s.active[place]] = place;
        s.drawn[chosen]++;
        put(&s, chosen, k);
        if (since >= HORIZON && compared > 16 * since && lowest - s.level > 0.005) { /* too low a level */
            put_all(&s, k, lowest - 0.001);
            lowest = DBL_MAX, compared = since = 0;
        }
    }
    if (!failed && size % every == 0)
        for (int32_t i = 0; i < sources; i++) counts[size / every * sources + i] = s.drawn[i];
    free(s.drawn), free(s.active), free(s.weight), free(s.count), free(s.place), free(s.first), free(s.next), free(errors);
    return failed;
}
