/* A heap whose owner goes, or gives it away, when told: the leader's thread ends, the program exits behind a fork or
 * becomes another one, all pages are freed lazily. Replies are JSON lines as those of hold; a wrong byte is one line on
 * stderr and exit status 1.
 *
 *   leaves [--mib 64] [--seed 1]
 *
 *   look     verifies every page; "right" have their content, "zeros" none any more, as a lazily freed one may
 *   free     MADV_FREE of the whole heap
 *   leader   the thread that main() began in ends; another one answers, now and from then on
 *   orphan   forks and exits at once; the child verifies every page and answers
 *   fork     forks: the child waits for its end; "child" is its pid
 *   exec     becomes the same program anew, which says "ready" again
 *   where    address and size of the heap
 *   quit     as does the end of input */
#include "content.h"
#include <getopt.h>
#include <pthread.h>
#include <sys/prctl.h>

static struct heap heap;
static bool freed;
static char *const *arguments;

static void reply_look(void)
{
    static const struct identity nothing;
    size_t right = 0, zeros = 0;
    for (size_t page = 0; page < heap.npages; page++) {
        bool zero = freed && *(volatile uint64_t *)(heap.at + page * PAGE) == 0;
        expect_page(&heap, heap.at + page * PAGE, zero ? nothing : heap.identity[page], "looking");
        zeros += zero;
        right += !zero;
    }
    reply("\"right\":%zu,\"zeros\":%zu,\"pid\":%d", right, zeros, (int)getpid());
}

static void do_free(void)
{
    if (madvise(heap.at, heap.npages * PAGE, MADV_FREE) == -1)
        fail_errno("MADV_FREE");
    freed = true;
    reply("\"pages\":%zu", heap.npages);
}

static void do_orphan(void)
{
    pid_t child = fork();
    if (child == -1)
        fail_errno("fork");
    if (child)
        _exit(0);
    reply_look();
}

static void do_fork(void)
{
    pid_t child = fork();
    if (child == -1)
        fail_errno("fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
    reply("\"child\":%d", (int)child);
}

static void *run(void *unused);

static void do_leader(void)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, run, &heap) != 0)
        fail("FAILED pthread_create");
    pthread_exit(NULL);
}

static void wait_for_the_leader(void)
{
    char state = 0;
    while (state != 'Z') {
        FILE *file = fopen("/proc/self/stat", "re");
        if (!file || fscanf(file, "%*d (%*[^)]) %c", &state) != 1)
            fail_errno("/proc/self/stat");
        fclose(file);
    }
    reply("\"state\":\"%c\"", state);
}

static void run_command(const struct command *command)
{
    const char *name = command->name;
    if (strcmp(name, "look") == 0)
        reply_look();
    else if (strcmp(name, "free") == 0)
        do_free();
    else if (strcmp(name, "leader") == 0)
        do_leader();
    else if (strcmp(name, "orphan") == 0)
        do_orphan();
    else if (strcmp(name, "fork") == 0)
        do_fork();
    else if (strcmp(name, "where") == 0)
        reply("\"address\":%lu,\"bytes\":%lu", (unsigned long)heap.at, heap.npages * PAGE);
    else if (strcmp(name, "exec") == 0)
        execv("/proc/self/exe", arguments);
    else
        reply_error("unknown command");
}

static void *run(void *without_leader)
{
    struct command command;
    if (without_leader)
        wait_for_the_leader();
    while (read_command(&command)) {
        if (strcmp(command.name, "quit") == 0) {
            reply("\"quit\":true");
            break;
        }
        run_command(&command);
    }
    exit(0);
}

int main(int argc, char **argv)
{
    static const struct option known[] = {{"mib", 1, NULL, 'm'}, {"seed", 1, NULL, 's'}, {0}};
    uint64_t mib = 64, seed = 1;
    arguments = argv;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 'm': mib = parse_number("--mib", optarg); break;
        case 's': seed = parse_number("--seed", optarg); break;
        default: return 2;
        }
    }
    if (mib == 0)
        fail("--mib must be positive");
    heap_init(&heap, mib * MIB, seed, false);
    reply("\"ready\":true,\"pid\":%d", (int)getpid());
    run(NULL);
}
