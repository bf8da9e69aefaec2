/* A process with a heap that does what signals tell it, as do its children and theirs: each lives on by itself,
 * verifies its own heap and answers with a JSON line on the output that they share.
 *
 *   family [--mib 16] [--seed 1]
 *
 *   SIGUSR1 verifies every page, gives every eighth one new content and says its pid; SIGUSR2 forks: the child says its
 *   pid and its parent's, and waits for signals of its own; SIGTERM ends it with status 0. Not part of any of it is
 *   stdin: who has ended is known by wait(2) alone, which every parent leaves to the kernel. */
#include "content.h"
#include <getopt.h>

static struct heap heap;

/* The heap's expectations are shared memory: each process must have its own. */
static void keep_own_expectations(void)
{
    struct identity *own = shared_alloc(heap.npages * sizeof *own);
    memcpy(own, heap.identity, heap.npages * sizeof *own);
    heap.identity = own;
}

static void look_and_write(struct rng *rng)
{
    for (size_t page = 0; page < heap.npages; page++)
        heap_verify_page(&heap, page, "a signal");
    for (size_t n = heap.npages / 8; n; n--)
        heap_renew_page(&heap, rng_below(rng, heap.npages));
    reply("\"pid\":%d,\"pages\":%zu", (int)getpid(), heap.npages);
}

static void have_child(struct rng *rng)
{
    pid_t parent = getpid();
    pid_t child = fork();
    if (child == -1)
        fail_errno("fork");
    if (child)
        return;
    keep_own_expectations();
    rng->state ^= (uint64_t)getpid();
    /* Else two generations would hold equal pages, and one in the place of the other would go unseen. */
    heap.serial += 1u << 20;
    reply("\"pid\":%d,\"parent\":%d", (int)getpid(), (int)parent);
}

int main(int argc, char **argv)
{
    static const struct option known[] = {{"mib", 1, NULL, 'm'}, {"seed", 1, NULL, 's'}, {0}};
    uint64_t mib = 16, seed = 1;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 'm': mib = parse_number("--mib", optarg); break;
        case 's': seed = parse_number("--seed", optarg); break;
        default: return 2;
        }
    }
    if (mib == 0)
        fail("--mib must be positive");
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    sigaddset(&set, SIGUSR2);
    sigaddset(&set, SIGTERM);
    sigprocmask(SIG_BLOCK, &set, NULL);
    signal(SIGCHLD, SIG_IGN);
    heap_init(&heap, mib * MIB, seed, false);
    struct rng rng = {mix64(seed)};
    reply("\"ready\":true,\"pid\":%d", (int)getpid());
    for (;;) {
        int number = sigwaitinfo(&set, NULL);
        if (number == SIGUSR1)
            look_and_write(&rng);
        else if (number == SIGUSR2)
            have_child(&rng);
        else if (number == SIGTERM)
            return 0;
        else if (errno != EINTR)
            fail_errno("sigwaitinfo");
    }
}
