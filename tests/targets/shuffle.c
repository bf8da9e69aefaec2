/* Threads that each mremap an area of their own, again and again, to another size and onto a fresh reservation:
 * what one of them gives up is where the next one lands at once. So unmaps and moves of different threads meet at
 * the same addresses, and who hears of them may hear of them in another order than they happened in. Replies are
 * JSON lines as those of hold; a wrong byte is one line on stderr and exit status 1.
 *
 *   shuffle [--threads 2] [--pages 4096] [--seed 1]
 *
 *   go ROUNDS       each thread moves its area ROUNDS times, verifies four pages after each move and renews one
 *   sum             verifies every page
 *   quit            as does the end of input */
#include "content.h"
#include <getopt.h>
#include <pthread.h>

#define MAX_THREADS 16

struct shuffler {
    pthread_t thread;
    struct heap heap; /* its identities have room for `most` pages */
    struct rng rng;
    uint64_t refused;
};

static size_t most = 4096;
static uint64_t rounds;

static void verify(const struct shuffler *shuffler, size_t page, const char *before)
{
    char after[64];
    snprintf(after, sizeof after, "mremap from %p to %p", (const void *)before, (const void *)shuffler->heap.at);
    heap_verify_page(&shuffler->heap, page, after);
}

static void move_once(struct shuffler *shuffler)
{
    struct heap *heap = &shuffler->heap;
    size_t npages = most / 2 + rng_below(&shuffler->rng, most / 2);
    char *before = heap->at, *place = mmap(NULL, npages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                                           -1, 0);
    if (place == MAP_FAILED)
        fail_errno("mmap of a reservation");
    char *at = mremap(before, heap->npages * PAGE, npages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, place);
    if (at == MAP_FAILED) {
        /* A neighbour's mapping has merged with this one or this one is in parts: nothing has changed. */
        if (errno != EFAULT)
            fail_errno("mremap");
        shuffler->refused++;
        return;
    }
    heap->at = at;
    for (size_t page = npages; page < heap->npages; page++)
        heap->identity[page] = (struct identity){0};
    heap->npages = npages;
    for (int i = 0; i < 4; i++)
        verify(shuffler, rng_below(&shuffler->rng, npages), before);
    heap_renew_page(heap, rng_below(&shuffler->rng, npages));
}

static void *work(void *argument)
{
    struct shuffler *shuffler = argument;
    for (uint64_t i = 0; i < rounds; i++)
        move_once(shuffler);
    return NULL;
}

int main(int argc, char **argv)
{
    static const struct option known[] = {
        {"threads", 1, NULL, 't'}, {"pages", 1, NULL, 'p'}, {"seed", 1, NULL, 's'}, {0}};
    uint64_t nthreads = 2, seed = 1;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 't': nthreads = parse_number("--threads", optarg); break;
        case 'p': most = parse_number("--pages", optarg); break;
        case 's': seed = parse_number("--seed", optarg); break;
        default: return 2;
        }
    }
    if (nthreads == 0 || nthreads > MAX_THREADS || most < 16)
        fail("--threads must be between 1 and %d and --pages at least 16", MAX_THREADS);
    struct shuffler *shufflers = shared_alloc(nthreads * sizeof *shufflers);
    for (uint64_t i = 0; i < nthreads; i++) {
        heap_init(&shufflers[i].heap, most * PAGE, seed + i, false);
        shufflers[i].rng.state = mix64(seed + i);
    }
    reply("\"ready\":true,\"pid\":%d", (int)getpid());
    struct command command;
    while (read_command(&command) && strcmp(command.name, "quit") != 0) {
        uint64_t refused = 0;
        if (strcmp(command.name, "go") == 0) {
            rounds = command.argument[0];
            for (uint64_t i = 0; i < nthreads; i++)
                if (pthread_create(&shufflers[i].thread, NULL, work, &shufflers[i]) != 0)
                    fail("FAILED pthread_create");
            for (uint64_t i = 0; i < nthreads; i++) {
                pthread_join(shufflers[i].thread, NULL);
                refused += shufflers[i].refused;
            }
            reply("\"rounds\":%lu,\"refused\":%lu", rounds, refused);
        } else if (strcmp(command.name, "sum") == 0) {
            for (uint64_t i = 0; i < nthreads; i++)
                heap_sum(&shufflers[i].heap);
            reply("\"threads\":%lu", nthreads);
        } else {
            reply_error("unknown command");
        }
    }
    reply("\"quit\":true");
    return 0;
}
