/* A program that does everything to its memory that programs do, in several threads, and verifies each byte: random
 * read-modify-write, discards, unmapping, remapping, protection, forks, O_DIRECT reads and guards. Runs for a time,
 * then prints what it did as one JSON line; the first wrong byte is one line on stderr and exit status 1.
 *
 *   churn [--threads 8] [--seconds 10] [--mib 256] [--areas 4] [--seed 1] [--pace US] [--window PERCENT]
 *         [--thp PERCENT] [--direct FILE] [--guards] [--ops NAME=WEIGHT,...] [--only NAME=WEIGHT,...] [--strict-mremap]
 *         [--slow MS]
 *
 * --slow lists operations that took longer, by their start (CLOCK_MONOTONIC) and duration in nanoseconds.
 * --window keeps reads and writes inside that share of an area, which wanders; --only sets all other weights to 0.
 * SIGTERM and SIGINT end it early and orderly. */
#include "operations.h"
#include <fcntl.h>
#include <getopt.h>
#include <stdatomic.h>

#define MAX_SLOW 8192

static atomic_bool stop;
static pthread_barrier_t filled;

static uint64_t total_weight(void)
{
    uint64_t total = 0;
    for (size_t i = 0; i < COUNT_OF(operations); i++)
        total += operations[i].weight;
    return total;
}

static struct {
    uint64_t start_ns, duration_ns;
} slow[MAX_SLOW];
static atomic_uint nslow;

static void note_time(uint64_t start_ns)
{
    uint64_t duration_ns = now_ns() - start_ns;
    if (duration_ns < options.slow_ms * NS_PER_MS)
        return;
    unsigned i = atomic_fetch_add(&nslow, 1);
    if (i < MAX_SLOW) {
        slow[i].start_ns = start_ns;
        slow[i].duration_ns = duration_ns;
    }
}

static size_t pick_operation(struct worker *worker, uint64_t total)
{
    uint64_t pick = rng_below(&worker->rng, total);
    size_t i = 0;
    while (pick >= operations[i].weight)
        pick -= operations[i++].weight;
    return i;
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    uint64_t total = total_weight();
    here = (struct whereabouts){.who = "churn", .thread = worker->number, .operation = "start"};
    for (unsigned a = 0; a < options.areas; a++) {
        struct area *area = &worker->area[a];
        area_map(area, pick_size(worker, area));
        for (uint32_t page = 0; page < area->hi; page++) {
            struct view view = area_view(area, page);
            write_page(&view, ++worker->serial);
        }
    }
    pthread_barrier_wait(&filled);
    while (!atomic_load_explicit(&stop, memory_order_relaxed)) {
        size_t i = pick_operation(worker, total);
        here.operation = operations[i].name;
        here.serial++;
        uint64_t start_ns = now_ns();
        operations[i].run(worker);
        if (options.slow_ms)
            note_time(start_ns);
        worker->done[i]++;
        if (options.pace_us)
            sleep_ns(options.pace_us * 1000ull);
    }
    here.operation = "end";
    for (int i = 0; i < CHILD_SLOTS; i++)
        while (worker->child[i].pid)
            child_reap(&worker->child[i], true);
    for (unsigned a = 0; a < options.areas; a++) {
        const struct area *area = &worker->area[a];
        for (uint32_t page = area->lo; page < area->hi; page++) {
            area_check(area, page);
            worker->pages++;
            worker->live_pages += !all_zero(&area->shadow[page], sizeof *area->shadow);
        }
    }
    return NULL;
}

static void parse_weights(char *list, bool only)
{
    for (size_t i = 0; only && i < COUNT_OF(operations); i++)
        operations[i].weight = 0;
    for (char *item = strtok(list, ","); item; item = strtok(NULL, ",")) {
        char *value = strchr(item, '=');
        if (value)
            *value++ = '\0';
        size_t i = 0;
        while (i < COUNT_OF(operations) && strcmp(operations[i].name, item) != 0)
            i++;
        if (i == COUNT_OF(operations))
            fail("no operation is called '%s'", item);
        operations[i].weight = value ? (unsigned)parse_number(item, value) : 1;
    }
}

static void parse_options(int argc, char **argv)
{
    enum { THREADS, SECONDS, MIBS, AREAS, SEED, PACE, WINDOW, THP, SLOW, DIRECT, GUARDS, OPS, ONLY, STRICT };
    static const struct option known[] = {
        {"threads", 1, NULL, THREADS}, {"seconds", 1, NULL, SECONDS}, {"mib", 1, NULL, MIBS},
        {"areas", 1, NULL, AREAS},     {"seed", 1, NULL, SEED},       {"pace", 1, NULL, PACE},
        {"window", 1, NULL, WINDOW},   {"thp", 1, NULL, THP},         {"direct", 1, NULL, DIRECT},
        {"guards", 0, NULL, GUARDS},   {"ops", 1, NULL, OPS},         {"only", 1, NULL, ONLY},
        {"strict-mremap", 0, NULL, STRICT}, {"slow", 1, NULL, SLOW}, {0},
    };
    int option, index = 0;
    while ((option = getopt_long(argc, argv, "", known, &index)) != -1) {
        uint64_t number = option < DIRECT && option >= 0 ? parse_number(known[index].name, optarg) : 0;
        switch (option) {
        case THREADS: options.threads = (unsigned)number; break;
        case SECONDS: options.seconds = (unsigned)number; break;
        case MIBS: options.mib = number; break;
        case AREAS: options.areas = (unsigned)number; break;
        case SEED: options.seed = number; break;
        case PACE: options.pace_us = (unsigned)number; break;
        case WINDOW: options.window = (unsigned)number; break;
        case THP: options.thp = (unsigned)number; break;
        case SLOW: options.slow_ms = number; break;
        case DIRECT: options.direct = optarg; break;
        case GUARDS: options.guards = true; break;
        case OPS: parse_weights(optarg, false); break;
        case ONLY: parse_weights(optarg, true); break;
        case STRICT: options.strict_mremap = true; break;
        default: exit(2);
        }
    }
    if (!options.threads || !options.areas || options.areas > MAX_AREAS || !options.window || options.window > 100)
        fail("--threads, --areas (at most %d) and --window (at most 100) must be positive", MAX_AREAS);
    if (!options.mib || options.mib * MIB / PAGE / options.threads / options.areas < 64)
        fail("--mib %zu is less than 64 pages an area", options.mib);
    for (size_t i = 0; i < COUNT_OF(operations); i++)
        if ((operations[i].run == do_direct && !options.direct) || (operations[i].run == do_guard && !options.guards))
            operations[i].weight = 0;
    if (total_weight() == 0)
        fail("no operation has a weight");
}

static void open_direct_file(void)
{
    int fd = open(options.direct, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd == -1)
        fail_errno(options.direct);
    uint64_t page[PAGE / sizeof(uint64_t)];
    for (uint32_t block = 0; block < FILE_BLOCKS; block++) {
        for (size_t line = 0; line < PAGE_LINES; line++)
            file_line(page + line * LINE_WORDS, block, line);
        if (write(fd, page, PAGE) != (ssize_t)PAGE)
            fail_errno(options.direct);
    }
    if (fsync(fd) == -1 || close(fd) == -1)
        fail_errno(options.direct);
    direct_fd = open(options.direct, O_RDONLY | O_DIRECT | O_CLOEXEC);
    if (direct_fd == -1)
        fail_errno("open with O_DIRECT");
}

static void worker_init(struct worker *worker, unsigned number)
{
    worker->number = number;
    worker->rng.state = mix64(options.seed + number);
    if (pipe(worker->pipe) == -1)
        fail_errno("pipe");
    /* Sizes wander between a third and five sixths of the capacity: on average the areas fill --mib. */
    uint32_t capacity = (uint32_t)(options.mib * MIB / PAGE / options.threads / options.areas * 12 / 7);
    for (unsigned a = 0; a < options.areas; a++) {
        worker->area[a] = (struct area){
            .capacity = capacity,
            .huge = rng_below(&worker->rng, 100) < options.thp,
            .tag = (uint64_t)(number + 1) << 40 | (uint64_t)a << 32,
            .shadow = shared_alloc(capacity * sizeof(struct shadow)),
        };
    }
}

static void print_result(const struct worker *workers, double seconds)
{
    uint64_t forks = 0, refused = 0, refused_whole = 0, grown_in_place = 0, pages = 0, live_pages = 0;
    for (unsigned t = 0; t < options.threads; t++) {
        refused += workers[t].refused;
        refused_whole += workers[t].refused_whole;
        grown_in_place += workers[t].grown_in_place;
        pages += workers[t].pages;
        live_pages += workers[t].live_pages;
    }
    printf("{\"target\":\"churn\",\"ops\":{");
    for (size_t i = 0; i < COUNT_OF(operations); i++) {
        uint64_t sum = 0;
        for (unsigned t = 0; t < options.threads; t++)
            sum += workers[t].done[i];
        if (operations[i].run == do_fork)
            forks = sum;
        printf("%s\"%s\":%lu", i ? "," : "", operations[i].name, sum);
    }
    printf("},\"slow\":[");
    for (unsigned i = 0; i < atomic_load(&nslow) && i < MAX_SLOW; i++)
        printf("%s[%lu,%lu]", i ? "," : "", slow[i].start_ns, slow[i].duration_ns);
    printf("],\"pages\":%lu,\"live_pages\":%lu,\"forks\":%lu,\"grown_in_place\":%lu,\"refused\":%lu,"
           "\"refused_whole\":%lu,\"threads\":%u,\"seed\":%lu,\"seconds\":%.3f,\"errors\":0}\n",
           pages, live_pages, forks, grown_in_place, refused, refused_whole, options.threads, options.seed, seconds);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    parse_options(argc, argv);
    line_seed = mix64(options.seed) | 1;
    catch_faults();
    if (options.direct)
        open_direct_file();
    struct worker *workers = shared_alloc(options.threads * sizeof *workers);
    sigset_t end_signals = block_end_signals();
    pthread_barrier_init(&filled, NULL, options.threads + 1);
    for (unsigned t = 0; t < options.threads; t++) {
        worker_init(&workers[t], t);
        if (pthread_create(&workers[t].thread, NULL, work, &workers[t]) != 0)
            fail("FAILED pthread_create");
    }
    pthread_barrier_wait(&filled);
    reply("\"ready\":true,\"pid\":%d", (int)getpid());
    uint64_t start_ns = now_ns();
    wait_for_end(&end_signals, start_ns + options.seconds * NS_PER_S);
    atomic_store(&stop, true);
    for (unsigned t = 0; t < options.threads; t++)
        pthread_join(workers[t].thread, NULL);
    print_result(workers, (double)(now_ns() - start_ns) / 1e9);
    return 0;
}
