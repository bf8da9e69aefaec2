/* Many threads that touch one page at the same moment, again and again, on command: each page must arrive once and
 * right for all of them. Replies are JSON lines as those of hold; a wrong byte is one line on stderr, exit status 1.
 *
 *   same_page [--mib 64] [--threads 16] [--seed 1]
 *
 *   read N SEED     N rounds: all threads meet at a barrier, then read the same random page and verify all of it
 *   write N SEED    N rounds: all threads write a slot of their own in the same random page; its bytes are verified
 *   discard N SEED  N rounds: one thread discards a random page while all others read it; then it must be zeros
 *   sum             verifies every page; "sum" is a checksum of all bytes in hex
 *   quit            as does the end of input */
#include "content.h"
#include <getopt.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/mman.h>

#define MAX_THREADS 64

static struct heap heap;
static unsigned nthreads = 16;
static pthread_barrier_t barrier;
static atomic_uint arrived; /* threads that spin right before the access: a futex would wake them one by one */

enum kind { READ, WRITE, DISCARD };

static struct {
    enum kind kind;
    bool quit;
    uint64_t rounds, seed;
} job;

static atomic_ulong slowest_ns;

static size_t slot_word(unsigned thread)
{
    return PAGE_WORDS / MAX_THREADS * (thread + 1) - 1;
}

static uint64_t slot_value(uint64_t round, unsigned thread)
{
    return mix64(job.seed ^ round << 8 ^ thread);
}

static void meet(void)
{
    unsigned ticket = atomic_fetch_add(&arrived, 1), all = (ticket / nthreads + 1) * nthreads;
    for (unsigned spins = 0; (int)(atomic_load(&arrived) - all) < 0; spins++)
        if (spins % 64 == 63)
            sched_yield();
}

static void verify_slots(const uint64_t *words, struct identity identity, uint64_t round)
{
    uint64_t expected[PAGE_WORDS];
    fill_page(expected, heap.seed, identity);
    for (unsigned t = 0; t < nthreads; t++)
        expected[slot_word(t)] = slot_value(round, t);
    for (size_t w = 0; w < PAGE_WORDS; w++)
        if (words[w] != expected[w])
            fail("MISMATCH after writes by %u threads, address %p: expected %016lx found %016lx", nthreads,
                 (const void *)(words + w), expected[w], words[w]);
}

/* Whoever answers a reader's fault late must not bring back what was discarded meanwhile. */
static void verify_discarded(size_t page)
{
    const uint64_t *words = (const uint64_t *)(heap.at + page * PAGE);
    for (size_t w = 0; w < PAGE_WORDS; w++)
        if (words[w])
            fail("MISMATCH after a discard among readers, address %p: expected zeros found %016lx",
                 (const void *)(words + w), words[w]);
}

static void access_page(unsigned thread, uint64_t round, size_t page)
{
    volatile uint64_t *words = (volatile uint64_t *)(heap.at + page * PAGE);
    if (job.kind == WRITE)
        words[slot_word(thread)] = slot_value(round, thread);
    else if (job.kind == READ || thread)
        (void)words[slot_word(thread)];
    else if (madvise(heap.at + page * PAGE, PAGE, MADV_DONTNEED) == -1)
        fail_errno("MADV_DONTNEED");
}

static void run_job(unsigned thread)
{
    struct rng rng = {mix64(job.seed)};
    for (uint64_t round = 0; round < job.rounds; round++) {
        size_t page = rng_below(&rng, heap.npages);
        meet();
        uint64_t start_ns = now_ns();
        access_page(thread, round, page);
        uint64_t took_ns = now_ns() - start_ns;
        if (took_ns > atomic_load(&slowest_ns))
            atomic_store(&slowest_ns, took_ns);
        if (job.kind != READ) {
            /* Nobody writes the page while the first thread verifies it and makes it whole again. */
            pthread_barrier_wait(&barrier);
            if (thread == 0) {
                if (job.kind == WRITE)
                    verify_slots((const uint64_t *)(heap.at + page * PAGE), heap.identity[page], round);
                else
                    verify_discarded(page);
                heap_renew_page(&heap, page);
            }
            pthread_barrier_wait(&barrier);
        } else {
            heap_verify_page(&heap, page, "read by all threads");
        }
    }
}

static void *work(void *argument)
{
    unsigned thread = (unsigned)(uintptr_t)argument;
    for (;;) {
        pthread_barrier_wait(&barrier);
        if (job.quit)
            return NULL;
        run_job(thread);
        pthread_barrier_wait(&barrier);
    }
}

static void start_job(enum kind kind, uint64_t rounds, uint64_t seed)
{
    job.kind = kind;
    job.rounds = rounds;
    job.seed = seed;
    atomic_store(&slowest_ns, 0);
    pthread_barrier_wait(&barrier);
    run_job(0);
    pthread_barrier_wait(&barrier);
    reply("\"rounds\":%lu,\"threads\":%u,\"max_ns\":%lu", rounds, nthreads, atomic_load(&slowest_ns));
}

int main(int argc, char **argv)
{
    static const struct option known[] = {
        {"mib", 1, NULL, 'm'}, {"threads", 1, NULL, 't'}, {"seed", 1, NULL, 's'}, {0}};
    uint64_t mib = 64, seed = 1;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 'm': mib = parse_number("--mib", optarg); break;
        case 't': nthreads = (unsigned)parse_number("--threads", optarg); break;
        case 's': seed = parse_number("--seed", optarg); break;
        default: return 2;
        }
    }
    if (mib == 0 || nthreads == 0 || nthreads > MAX_THREADS)
        fail("--mib must be positive and --threads between 1 and %d", MAX_THREADS);
    heap_init(&heap, mib * MIB, seed, false);
    pthread_barrier_init(&barrier, NULL, nthreads);
    pthread_t thread[MAX_THREADS];
    for (unsigned i = 1; i < nthreads; i++)
        if (pthread_create(&thread[i], NULL, work, (void *)(uintptr_t)i) != 0)
            fail("FAILED pthread_create");
    reply("\"ready\":true,\"pid\":%d", (int)getpid());
    struct command command;
    while (read_command(&command) && strcmp(command.name, "quit") != 0) {
        if (strcmp(command.name, "read") == 0)
            start_job(READ, command.argument[0], command.argument[1]);
        else if (strcmp(command.name, "write") == 0)
            start_job(WRITE, command.argument[0], command.argument[1]);
        else if (strcmp(command.name, "discard") == 0)
            start_job(DISCARD, command.argument[0], command.argument[1]);
        else if (strcmp(command.name, "sum") == 0)
            reply("\"sum\":\"%016lx\"", heap_sum(&heap));
        else
            reply_error("unknown command");
    }
    job.quit = true;
    pthread_barrier_wait(&barrier);
    for (unsigned i = 1; i < nthreads; i++)
        pthread_join(thread[i], NULL);
    reply("\"quit\":true");
    return 0;
}
