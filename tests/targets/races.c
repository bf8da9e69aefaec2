/* MADV_DONTNEED against fills: other threads touch a page at the very moment at which it is discarded. Once madvise has
 * returned the page must be zeros and stay so; an old byte is one line on stderr and exit status 1.
 *
 *   races [--mib 32] [--touchers 2] [--seed 1]
 *
 *   race N SEED     N discards, page after page; every eighth page is verified instead, and every page gets new content
 *   sum             verifies every page
 *   quit            as does the end of input */
#include "content.h"
#include <getopt.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#define MAX_TOUCHERS 8
#define NOTHING (~0ul)

static struct heap heap;
static atomic_ulong current = NOTHING;
static atomic_bool quit;
static atomic_ulong arrived, touched;
static uint64_t touchers = 2;

/* What they read is old, zero or new: only the one who discards knows which of them is right. */
static void *touch(void *argument)
{
    unsigned long seen = NOTHING;
    size_t word = (uintptr_t)argument * 61 % PAGE_WORDS;
    for (unsigned spins = 0; !atomic_load(&quit);) {
        unsigned long now = atomic_load(&current);
        if (now == seen) {
            if (++spins % 32 == 0)
                sched_yield();
            continue;
        }
        seen = now;
        if (now == NOTHING)
            continue;
        atomic_fetch_add(&arrived, 1);
        (void)((volatile uint64_t *)(heap.at + now % heap.npages * PAGE))[word];
        atomic_fetch_add_explicit(&touched, 1, memory_order_relaxed);
    }
    return NULL;
}

static void expect_zeros(size_t page, const char *when)
{
    const volatile uint64_t *words = (const volatile uint64_t *)(heap.at + page * PAGE);
    for (size_t w = 0; w < PAGE_WORDS; w++)
        if (words[w])
            fail("MISMATCH %s page %zu word %zu generation %u: expected zeros found %016lx", when, page, w,
                 heap.identity[page].generation, words[w]);
}

/* Until the others are at the page, and then as long as their fills may be under way: what is to be met is a fill that
 * has been looked up and has not arrived. */
static void let_them_go_first(struct rng *rng, unsigned long before)
{
    uint64_t now = now_ns(), end = now + rng_below(rng, 100000);
    if (rng_below(rng, 8) == 0)
        return;
    for (uint64_t limit = now + NS_PER_MS; atomic_load(&arrived) - before < touchers && now_ns() < limit;)
        sched_yield();
    while (now_ns() < end) {
    }
}

static void race(uint64_t count, struct rng *rng)
{
    uint64_t verified = 0;
    static uint64_t round;
    for (uint64_t n = 0; n < count; n++, round++) {
        size_t page = round % heap.npages;
        unsigned long before = atomic_load(&arrived);
        atomic_store(&current, round);
        let_them_go_first(rng, before);
        if (rng_below(rng, 8) == 0) {
            heap_verify_page(&heap, page, "a touch by others");
            verified++;
        } else {
            if (madvise(heap.at + page * PAGE, PAGE, MADV_DONTNEED) == -1)
                fail_errno("MADV_DONTNEED");
            expect_zeros(page, "after a discard,");
            if (rng_below(rng, 4) == 0)
                sched_yield();
            expect_zeros(page, "a while after a discard,");
        }
        heap_renew_page(&heap, page);
    }
    atomic_store(&current, NOTHING);
    reply("\"discards\":%lu,\"verified\":%lu,\"touched\":%lu", count - verified, verified, atomic_load(&touched));
}

int main(int argc, char **argv)
{
    static const struct option known[] = {
        {"mib", 1, NULL, 'm'}, {"touchers", 1, NULL, 't'}, {"seed", 1, NULL, 's'}, {0}};
    uint64_t mib = 32, seed = 1;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 'm': mib = parse_number("--mib", optarg); break;
        case 't': touchers = parse_number("--touchers", optarg); break;
        case 's': seed = parse_number("--seed", optarg); break;
        default: return 2;
        }
    }
    if (mib == 0 || touchers == 0 || touchers > MAX_TOUCHERS)
        fail("--mib must be positive and --touchers between 1 and %d", MAX_TOUCHERS);
    heap_init(&heap, mib * MIB, seed, false);
    pthread_t thread[MAX_TOUCHERS];
    for (uint64_t t = 0; t < touchers; t++)
        if (pthread_create(&thread[t], NULL, touch, (void *)(uintptr_t)(t + 1)) != 0)
            fail("FAILED pthread_create");
    reply("\"ready\":true,\"pid\":%d", (int)getpid());
    struct command command;
    while (read_command(&command) && strcmp(command.name, "quit") != 0) {
        struct rng rng = {mix64(command.argument[1])};
        if (strcmp(command.name, "race") == 0)
            race(command.argument[0], &rng);
        else if (strcmp(command.name, "sum") == 0)
            reply("\"sum\":\"%016lx\"", heap_sum(&heap));
        else
            reply_error("unknown command");
    }
    atomic_store(&quit, true);
    for (uint64_t t = 0; t < touchers; t++)
        pthread_join(thread[t], NULL);
    reply("\"quit\":true");
    return 0;
}
