/* The times that a program measures on itself, and how they are told: percentiles, a histogram, a series over time.
 * They are in shared memory, where no dump reaches them. */
#ifndef BENCH_SAMPLES_H
#define BENCH_SAMPLES_H

#include "common.h"

#include <pthread.h>

#define MAX_SAMPLES ((size_t)1 << 20)
#define SERIES 240

/* Times of what is being measured; `lost` counts those for which there was no room. */
static struct samples {
    pthread_mutex_t lock;
    size_t n, lost;
    uint64_t since_ns;
    uint64_t ns[];
} *samples;
static uint64_t *due; /* of a load's operations, beside their samples */

/* The kernel's swap takes shared memory too. Where it may not be locked it is at least not ours that takes it. */
static void keep(const void *at, size_t bytes)
{
    (void)!mlock(at, bytes);
}

/* The first use of what holds the samples must not be in one of them: `often` of them are used now. */
static void samples_init(size_t often)
{
    samples = shared_alloc(sizeof *samples + MAX_SAMPLES * sizeof samples->ns[0]);
    due = shared_alloc(MAX_SAMPLES * sizeof *due);
    memset(samples->ns, 1, often * sizeof samples->ns[0]);
    memset(due, 1, often * sizeof *due);
    keep(samples, often * sizeof samples->ns[0]);
    pthread_mutex_init(&samples->lock, NULL);
}

static void add_sample(uint64_t due_ns, uint64_t ns)
{
    pthread_mutex_lock(&samples->lock);
    if (samples->n < MAX_SAMPLES) {
        due[samples->n] = due_ns;
        samples->ns[samples->n++] = ns;
    } else {
        samples->lost++;
    }
    pthread_mutex_unlock(&samples->lock);
}

static int compare_ns(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

/* The fields of a reply; the samples are in ascending order, and there is at least one. */
static void print_percentiles(const uint64_t *ns, size_t n)
{
    static const struct {
        const char *key;
        size_t share; /* in thousandths */
    } wanted[] = {{"p50_ns", 500}, {"p90_ns", 900}, {"p99_ns", 990}, {"p999_ns", 999}};
    for (size_t i = 0; i < COUNT_OF(wanted); i++)
        printf("\"%s\":%lu,", wanted[i].key, ns[n * wanted[i].share / 1000]);
    printf("\"max_ns\":%lu", ns[n - 1]);
}

/* The first step above `ns`: four for each power of two, from 256 on. */
static uint64_t step_above(uint64_t ns)
{
    if (ns < 256)
        return 256;
    unsigned quarter = 61 - (unsigned)__builtin_clzll(ns); /* of the power of two below */
    return ((ns >> quarter) + 1) << quarter;
}

static void print_histogram(const uint64_t *ns, size_t n)
{
    printf(",\"histogram\":[");
    for (size_t i = 0; i < n;) {
        size_t first = i;
        uint64_t upper = step_above(ns[i]);
        while (i < n && ns[i] < upper)
            i++;
        printf("%s[%lu,%zu]", first ? "," : "", upper, i - first);
    }
    printf("]");
}

/* The latest operation in each of SERIES equal parts of a time. */
static void print_series(const uint64_t *due_ns, const uint64_t *ns, size_t n, uint64_t since_ns, uint64_t until_ns)
{
    uint64_t latest[SERIES] = {0}, step_ns = (until_ns - since_ns) / SERIES + 1;
    for (size_t i = 0; i < n; i++) {
        size_t at = due_ns[i] < since_ns ? 0 : (due_ns[i] - since_ns) / step_ns;
        if (at < SERIES && ns[i] > latest[at])
            latest[at] = ns[i];
    }
    printf(",\"since_ns\":%lu,\"step_ns\":%lu,\"series\":[", since_ns, step_ns);
    for (size_t i = 0; i < SERIES; i++)
        printf("%s%lu", i ? "," : "", latest[i]);
    printf("]");
}

#endif
