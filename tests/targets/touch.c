/* A warm heap with content as compressible as that of real programs, and what a program feels when it uses it: how long
 * each touch takes, how late the operations of a paced load are, what fresh memory costs. For measurements: a touch is
 * one load, checked by the page's first word, which no other page has; `sum` verifies every byte. Expectations and
 * samples are in shared memory. Commands are lines on stdin; each reply is one JSON line, and a wrong byte is exit
 * status 1.
 *
 *   touch [--mib 512] [--seed 1]
 *
 *   sparse N SEED      reads N different pages in random order
 *   random SEED        reads every page in random order
 *   sequential         reads every page in order of addresses
 *   load THREADS RATE  from now on THREADS threads verify and rewrite random pages, RATE a second in all; 0 ends them
 *   stalls             of the load since the last "stalls": how late operations were done; "histogram" by powers of two
 *   fresh PAGES HOLE   first writes to PAGES fresh pages in a mapping of its own: in a row, or with HOLE in holes of
 *                      HOLE pages between present ones
 *   sum, where, quit   verifies every page; address and size of the heap; as does the end of input
 *
 * The first three reply with "pages", "total_ns" and percentiles of the single touches. */
#include "content.h"
#include <getopt.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/prctl.h>

#define MAX_WORKERS 64
#define MAX_SAMPLES ((size_t)1 << 20)
#define FRESH_PAGES ((size_t)16384)
#define ANCHOR_PAGES ((size_t)32) /* makes the mapping of fresh memory one that is worth a dump */
#define ANCHOR_INDEX 0xa0000000u

static struct heap heap;
static uint32_t *order;
static char *arena;

/* Times of what is being measured; `lost` counts those for which there was no room. */
static struct samples {
    pthread_mutex_t lock;
    size_t n, lost;
    uint64_t ns[];
} *samples;

static struct worker {
    pthread_t thread;
    unsigned number;
} workers[MAX_WORKERS];
static unsigned nworkers;
static uint64_t interval_ns;
static atomic_bool working;

static void add_sample(uint64_t ns)
{
    pthread_mutex_lock(&samples->lock);
    if (samples->n < MAX_SAMPLES)
        samples->ns[samples->n++] = ns;
    else
        samples->lost++;
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

/* ---- touches ---- */

static void shuffle(size_t count, uint64_t seed)
{
    struct rng rng = {mix64(seed)};
    for (size_t i = 0; i < heap.npages; i++)
        order[i] = (uint32_t)i;
    for (size_t i = 0; i < count; i++) {
        size_t other = i + rng_below(&rng, heap.npages - i);
        uint32_t page = order[i];
        order[i] = order[other];
        order[other] = page;
    }
}

static void do_touch(size_t count)
{
    uint64_t begin_ns = now_ns(), last_ns = begin_ns;
    for (size_t i = 0; i < count; i++) {
        size_t page = order[i];
        struct identity identity = heap.identity[page];
        uint64_t word = *(volatile uint64_t *)(heap.at + page * PAGE);
        uint64_t now = now_ns();
        if (word != (((uint64_t)identity.generation << 32) | identity.index))
            fail("MISMATCH after touch address %p page %zu generation %u: found %016lx",
                 (const void *)(heap.at + page * PAGE), page, identity.generation, word);
        samples->ns[i] = now - last_ns;
        last_ns = now;
    }
    qsort(samples->ns, count, sizeof samples->ns[0], compare_ns);
    printf("{\"ok\":true,\"pages\":%zu,\"total_ns\":%lu,", count, last_ns - begin_ns);
    print_percentiles(samples->ns, count);
    puts("}");
    fflush(stdout);
}

/* ---- load ---- */

static void rewrite_page(size_t page)
{
    struct identity *identity = &heap.identity[page];
    heap_verify_page(&heap, page, "load");
    identity->generation++;
    identity->index = (uint32_t)page;
    fill_page(heap.at + page * PAGE, heap.seed, *identity);
}

/* An operation is as late as the program's user feels it: from when it was due, not from when its turn came. */
static void *work(void *argument)
{
    const struct worker *worker = argument;
    struct rng rng = {mix64(now_ns() + worker->number)};
    uint64_t due_ns = now_ns() + interval_ns * worker->number / nworkers;
    prctl(PR_SET_TIMERSLACK, 1);
    while (atomic_load(&working)) {
        struct timespec due = {.tv_sec = (time_t)(due_ns / NS_PER_S), .tv_nsec = (long)(due_ns % NS_PER_S)};
        while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &due, NULL) == EINTR) {
        }
        rewrite_page(rng_below(&rng, heap.npages / nworkers) * nworkers + worker->number);
        add_sample(now_ns() - due_ns);
        due_ns += interval_ns;
    }
    return NULL;
}

static void end_load(void)
{
    atomic_store(&working, false);
    for (unsigned i = 0; i < nworkers; i++)
        pthread_join(workers[i].thread, NULL);
    nworkers = 0;
}

static void do_load(uint64_t threads, uint64_t rate)
{
    if (threads > MAX_WORKERS || threads > heap.npages || (threads && (rate == 0 || rate > NS_PER_S))) {
        reply_error("load wants up to %d threads and their rate", MAX_WORKERS);
        return;
    }
    end_load();
    samples->n = samples->lost = 0;
    nworkers = (unsigned)threads;
    interval_ns = threads ? NS_PER_S * threads / rate : 0;
    atomic_store(&working, true);
    for (unsigned i = 0; i < nworkers; i++) {
        workers[i].number = i;
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]) != 0)
            fail("FAILED pthread_create");
    }
    reply("\"threads\":%u", nworkers);
}

static void print_histogram(const uint64_t *ns, size_t n)
{
    printf("\"histogram\":[");
    for (size_t i = 0, upper = 1024; i < n; upper *= 2) {
        size_t first = i;
        while (i < n && ns[i] < upper)
            i++;
        if (i > first)
            printf("%s[%zu,%zu]", first ? "," : "", upper, i - first);
    }
    printf("]");
}

static void do_stalls(void)
{
    uint64_t *ns = shared_alloc(MAX_SAMPLES * sizeof *ns);
    pthread_mutex_lock(&samples->lock);
    size_t n = samples->n, lost = samples->lost;
    memcpy(ns, samples->ns, n * sizeof *ns);
    samples->n = samples->lost = 0;
    pthread_mutex_unlock(&samples->lock);
    qsort(ns, n, sizeof *ns, compare_ns);
    printf("{\"ok\":true,\"operations\":%zu,\"lost\":%zu,", n, lost);
    if (n) {
        print_percentiles(ns, n);
        printf(",");
    }
    print_histogram(ns, n);
    puts("}");
    fflush(stdout);
    munmap(ns, MAX_SAMPLES * sizeof *ns);
}

/* ---- fresh memory ---- */

static void arena_init(void)
{
    char *at = heap_alloc((ANCHOR_PAGES + FRESH_PAGES + 2) * PAGE);
    /* Neighbours that cannot merge with it: what the heap's mapping does is not what this one does. */
    if (mprotect(at, PAGE, PROT_NONE) == -1 ||
        mprotect(at + (ANCHOR_PAGES + FRESH_PAGES + 1) * PAGE, PAGE, PROT_NONE) == -1)
        fail_errno("mprotect of the gaps");
    arena = at + PAGE;
    for (size_t i = 0; i < ANCHOR_PAGES; i++)
        fill_page(arena + i * PAGE, heap.seed, (struct identity){ANCHOR_INDEX + (uint32_t)i, 1});
}

static void discard(char *at, size_t npages)
{
    if (madvise(at, npages * PAGE, MADV_DONTNEED) == -1)
        fail_errno("MADV_DONTNEED");
}

static bool is_fresh(size_t page, size_t hole)
{
    return hole == 0 || (page / hole) % 2 == 1;
}

static void do_fresh(size_t count, size_t hole)
{
    char *at = arena + ANCHOR_PAGES * PAGE;
    size_t npages = hole ? 2 * count : count, done = 0;
    if (count == 0 || npages > FRESH_PAGES || (hole && count % hole)) {
        reply_error("fresh wants some pages, %zu at most, that fill their holes", FRESH_PAGES / 2);
        return;
    }
    discard(at, npages);
    if (hole) {
        for (size_t i = 0; i < npages; i++)
            *(uint64_t *)(at + i * PAGE) = 1;
        for (size_t i = hole; i < npages; i += 2 * hole)
            discard(at + i * PAGE, hole);
    }
    uint64_t begin_ns = now_ns(), last_ns = begin_ns;
    for (size_t i = 0; i < npages; i++) {
        if (!is_fresh(i, hole))
            continue;
        /* One access that writes, as a program's first is, and that sees what was there. */
        uint64_t old = __atomic_exchange_n((uint64_t *)(at + i * PAGE), ~0ull, __ATOMIC_RELAXED), now = now_ns();
        if (old)
            fail("MISMATCH after fresh page %zu: found %016lx", i, old);
        samples->ns[done++] = now - last_ns;
        last_ns = now;
    }
    for (size_t i = 0; i < npages; i++)
        for (size_t w = 1; w < PAGE_WORDS; w++)
            if (((uint64_t *)(at + i * PAGE))[w])
                fail("MISMATCH after fresh page %zu word %zu is not zero", i, w);
    for (size_t i = 0; i < ANCHOR_PAGES; i++)
        expect_page(&heap, arena + i * PAGE, (struct identity){ANCHOR_INDEX + (uint32_t)i, 1}, "fresh");
    discard(at, npages);
    qsort(samples->ns, done, sizeof samples->ns[0], compare_ns);
    printf("{\"ok\":true,\"pages\":%zu,\"total_ns\":%lu,", done, last_ns - begin_ns);
    print_percentiles(samples->ns, done);
    puts("}");
    fflush(stdout);
}

/* ---- commands ---- */

/* What cannot be while a load changes pages and takes samples; an error was replied when this says no. */
static void run_quiet_command(const char *name, uint64_t first, uint64_t second)
{
    if (nworkers) {
        reply_error("a load runs");
    } else if (strcmp(name, "sparse") == 0) {
        if (first == 0 || first > heap.npages) {
            reply_error("sparse wants a number of pages that the heap has");
            return;
        }
        shuffle(first, second);
        do_touch(first);
    } else if (strcmp(name, "random") == 0) {
        shuffle(heap.npages, first);
        do_touch(heap.npages);
    } else if (strcmp(name, "sequential") == 0) {
        shuffle(0, 0);
        do_touch(heap.npages);
    } else if (strcmp(name, "fresh") == 0) {
        do_fresh(first, second);
    } else if (strcmp(name, "sum") == 0) {
        reply("\"sum\":\"%016lx\"", heap_sum(&heap));
    } else {
        reply_error("unknown command");
    }
}

static void run_command(const struct command *command)
{
    if (strcmp(command->name, "load") == 0)
        do_load(command->argument[0], command->argument[1]);
    else if (strcmp(command->name, "stalls") == 0)
        do_stalls();
    else if (strcmp(command->name, "where") == 0)
        reply("\"address\":%lu,\"bytes\":%lu", (unsigned long)heap.at, heap.npages * PAGE);
    else
        run_quiet_command(command->name, command->argument[0], command->argument[1]);
}

int main(int argc, char **argv)
{
    static const struct option known[] = {{"mib", 1, NULL, 'm'}, {"seed", 1, NULL, 's'}, {0}};
    size_t mib = 512;
    uint64_t seed = 1;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 'm': mib = parse_number("--mib", optarg); break;
        case 's': seed = parse_number("--seed", optarg); break;
        default: return 2;
        }
    }
    if (mib == 0 || mib * MIB / PAGE > MAX_SAMPLES)
        fail("--mib must be from 1 to %zu", MAX_SAMPLES * PAGE / MIB);
    samples = shared_alloc(sizeof *samples + MAX_SAMPLES * sizeof samples->ns[0]);
    order = shared_alloc(mib * MIB / PAGE * sizeof *order);
    /* The first use of what holds the samples must not be in one of them. */
    memset(samples->ns, 1, MAX_SAMPLES * sizeof samples->ns[0]);
    pthread_mutex_init(&samples->lock, NULL);
    heap_init(&heap, mib * MIB, seed, false);
    arena_init();
    reply("\"ready\":true,\"pid\":%d", (int)getpid());
    struct command command;
    while (read_command(&command)) {
        if (strcmp(command.name, "quit") == 0) {
            end_load();
            reply("\"quit\":true");
            break;
        }
        run_command(&command);
    }
    return 0;
}
