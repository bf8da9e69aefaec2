/* A warm heap with content as compressible as that of real programs, and what a program feels when it uses it: how long
 * each touch takes, how late the operations of a paced load are, what fresh memory costs. For measurements: a touch is
 * one load, checked by the page's first word, which no other page has; `sum` verifies every byte. Expectations and
 * samples are in shared memory. Commands are lines on stdin; each reply is one JSON line, and a wrong byte is exit
 * status 1.
 *
 *   load [--mib 512] [--seed 1] [--huge] [--members FILE]
 *
 * --huge: the heap is of huge pages, where the kernel has them. --members: the control group's file that the pid is
 * written to before there is a heap.
 *
 *   sparse N SEED T    reads N different pages in random order, by T threads at once (1 when left out)
 *   random SEED        reads every page in random order
 *   sequential         reads every page in order of addresses
 *   set N SEED         reads in random order N pages that are always the same
 *   change N SEED      rewrites N different pages, which must be as they should
 *   load THREADS RATE  from now on THREADS threads verify and rewrite random pages, RATE a second in all; 0 ends them
 *   stalls             of the load since the last "stalls": how late operations were done; "series" has the latest
 *                      operation in each of equal parts of that time
 *   fresh PAGES HOLE   first writes to PAGES fresh pages in a mapping of its own: in a row, or with HOLE in holes of
 *                      HOLE pages between present ones
 *   sum, where, quit   verifies every page; address and size of the heap; as does the end of input
 *
 * Those that read reply with "pages", "total_ns" and percentiles of the single touches. "histogram" has pairs: how many
 * took less than so many ns; four steps for each power of two. */
#include "content.h"
#include "samples.h"

#include <getopt.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/prctl.h>

#define MAX_WORKERS 64
#define SET_SEED 20200101u
#define FRESH_PAGES ((size_t)16384)
#define ANCHOR_PAGES ((size_t)32) /* makes the mapping of fresh memory one that is worth a dump */
#define ANCHOR_INDEX 0xa0000000u

static struct heap heap;
static uint32_t *order;
static char *arena;

static struct worker {
    pthread_t thread;
    unsigned number;
} workers[MAX_WORKERS];
static unsigned nworkers;
static uint64_t interval_ns;
static atomic_bool working;

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

/* Reads the pages order[from] to order[to - 1]; each sample has the place of its page. */
static void touch_pages(size_t from, size_t to)
{
    uint64_t last_ns = now_ns();
    for (size_t i = from; i < to; i++) {
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
}

static struct toucher {
    pthread_t thread;
    size_t from, to;
} touchers[MAX_WORKERS];
static pthread_barrier_t touchers_start;

static void *touch(void *argument)
{
    const struct toucher *toucher = argument;
    pthread_barrier_wait(&touchers_start);
    touch_pages(toucher->from, toucher->to);
    return NULL;
}

/* Reads `count` pages of `order` by some threads; returns how long that took. */
static uint64_t touch_by_threads(size_t count, unsigned threads)
{
    pthread_barrier_init(&touchers_start, NULL, threads + 1);
    for (unsigned i = 0; i < threads; i++) {
        touchers[i].from = count * i / threads;
        touchers[i].to = count * (i + 1) / threads;
        if (pthread_create(&touchers[i].thread, NULL, touch, &touchers[i]) != 0)
            fail("FAILED pthread_create");
    }
    pthread_barrier_wait(&touchers_start);
    uint64_t begin_ns = now_ns();
    for (unsigned i = 0; i < threads; i++)
        pthread_join(touchers[i].thread, NULL);
    uint64_t took_ns = now_ns() - begin_ns;
    pthread_barrier_destroy(&touchers_start);
    return took_ns;
}

static void do_touch(size_t count, unsigned threads)
{
    uint64_t took_ns;
    if (threads > 1) {
        took_ns = touch_by_threads(count, threads);
    } else {
        uint64_t begin_ns = now_ns();
        touch_pages(0, count);
        took_ns = now_ns() - begin_ns;
    }
    qsort(samples->ns, count, sizeof samples->ns[0], compare_ns);
    printf("{\"ok\":true,\"pages\":%zu,\"total_ns\":%lu,", count, took_ns);
    print_percentiles(samples->ns, count);
    print_histogram(samples->ns, count);
    puts("}");
    fflush(stdout);
}

/* The set is chosen by a seed of its own; only its order is another each time. */
static void choose_set(size_t count, uint64_t seed)
{
    shuffle(count, SET_SEED);
    struct rng rng = {mix64(seed)};
    for (size_t i = 0; i < count; i++) {
        size_t other = i + rng_below(&rng, count - i);
        uint32_t page = order[i];
        order[i] = order[other];
        order[other] = page;
    }
}

static void rewrite_page(size_t page, const char *after)
{
    struct identity *identity = &heap.identity[page];
    heap_verify_page(&heap, page, after);
    identity->generation++;
    identity->index = (uint32_t)page;
    fill_page(heap.at + page * PAGE, heap.seed, *identity);
}

static void do_change(size_t count, uint64_t seed)
{
    shuffle(count, seed);
    for (size_t i = 0; i < count; i++)
        rewrite_page(order[i], "change");
    reply("\"pages\":%zu", count);
}

/* ---- load ---- */

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
        rewrite_page(rng_below(&rng, heap.npages / nworkers) * nworkers + worker->number, "load");
        add_sample(due_ns, now_ns() - due_ns);
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
    samples->since_ns = now_ns();
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

static void do_stalls(void)
{
    uint64_t *copy = shared_alloc(2 * MAX_SAMPLES * sizeof *copy), *ns = copy, *due_ns = copy + MAX_SAMPLES;
    pthread_mutex_lock(&samples->lock);
    size_t n = samples->n, lost = samples->lost;
    uint64_t since_ns = samples->since_ns, until_ns = now_ns();
    memcpy(ns, samples->ns, n * sizeof *ns);
    memcpy(due_ns, due, n * sizeof *due_ns);
    samples->n = samples->lost = 0;
    samples->since_ns = until_ns;
    pthread_mutex_unlock(&samples->lock);
    printf("{\"ok\":true,\"operations\":%zu,\"lost\":%zu", n, lost);
    print_series(due_ns, ns, n, since_ns, until_ns);
    qsort(ns, n, sizeof *ns, compare_ns);
    if (n) {
        printf(",");
        print_percentiles(ns, n);
    }
    print_histogram(ns, n);
    puts("}");
    fflush(stdout);
    munmap(copy, 2 * MAX_SAMPLES * sizeof *copy);
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
    print_histogram(samples->ns, done);
    puts("}");
    fflush(stdout);
}

/* ---- commands ---- */

static bool is_share(const char *name, uint64_t count)
{
    if (count > 0 && count <= heap.npages)
        return true;
    reply_error("%s wants a number of pages that the heap has", name);
    return false;
}

/* What cannot be while a load changes pages and takes samples; an error was replied when this says no. */
static void run_quiet_command(const char *name, uint64_t first, uint64_t second, uint64_t third)
{
    if (nworkers) {
        reply_error("a load runs");
    } else if (strcmp(name, "sparse") == 0) {
        if (third > MAX_WORKERS) {
            reply_error("sparse wants up to %d threads", MAX_WORKERS);
        } else if (is_share(name, first)) {
            shuffle(first, second);
            do_touch(first, (unsigned)third);
        }
    } else if (strcmp(name, "random") == 0) {
        shuffle(heap.npages, first);
        do_touch(heap.npages, 1);
    } else if (strcmp(name, "sequential") == 0) {
        shuffle(0, 0);
        do_touch(heap.npages, 1);
    } else if (strcmp(name, "set") == 0) {
        if (is_share(name, first)) {
            choose_set(first, second);
            do_touch(first, 1);
        }
    } else if (strcmp(name, "change") == 0) {
        if (is_share(name, first))
            do_change(first, second);
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
        run_quiet_command(command->name, command->argument[0], command->argument[1], command->argument[2]);
}

static void join_group(const char *members)
{
    FILE *file = fopen(members, "w");
    if (!file || fprintf(file, "%d\n", (int)getpid()) < 0 || fclose(file) != 0)
        fail_errno(members);
}

int main(int argc, char **argv)
{
    static const struct option known[] = {{"mib", 1, NULL, 'm'}, {"seed", 1, NULL, 's'}, {"huge", 0, NULL, 'h'},
                                          {"members", 1, NULL, 'g'}, {0}};
    size_t mib = 512;
    bool huge = false;
    uint64_t seed = 1;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 'm': mib = parse_number("--mib", optarg); break;
        case 's': seed = parse_number("--seed", optarg); break;
        case 'h': huge = true; break;
        case 'g': join_group(optarg); break;
        default: return 2;
        }
    }
    if (mib == 0 || mib * MIB / PAGE > MAX_SAMPLES)
        fail("--mib must be from 1 to %zu", MAX_SAMPLES * PAGE / MIB);
    samples_init(mib * MIB / PAGE);
    order = shared_alloc(mib * MIB / PAGE * sizeof *order);
    heap_init(&heap, mib * MIB, seed, huge);
    keep(order, heap.npages * sizeof *order);
    keep(heap.identity, heap.npages * sizeof *heap.identity);
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
