/* A program that executes itself again and again, in the middle of threads that run and sleep: by turns from its leader
 * and from its youngest thread. The latter does it in the very moment in which it sees that somebody has begun to trace
 * the others. Each life has a heap of its own, which it verifies.
 *
 *   execs [--count 200] [--mib 4] [--threads 32] [--life-ms 60]
 *
 * One JSON line at the end: "execs" says how often, "traced" how many of these in such a moment. */
#include "content.h"
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <sys/epoll.h>

#define PATIENCE_NS (500 * NS_PER_MS)

static struct heap heap;
static char **arguments;
static uint64_t number, traced, end_ns;
static int status_fd; /* of the leader: a tracer that takes one thread after the other begins with it */

static void *run_on(void *argument)
{
    struct rng rng = {mix64((uint64_t)(uintptr_t)argument)};
    for (;;) {
        heap_verify_page(&heap, rng_below(&rng, heap.npages), "running");
        sleep_ns(NS_PER_MS / 10);
    }
    return NULL;
}

static void *sleep_on(void *argument)
{
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event;
    if (epoll == -1)
        fail_errno("epoll_create1");
    int got = epoll_wait(epoll, &event, 1, -1);
    fail("FAILED epoll_wait returned %d, errno %d", got, errno);
    return argument;
}

static void set_number(const char *name, uint64_t value)
{
    char text[32];
    snprintf(text, sizeof text, "%lu", value);
    setenv(name, text, 1);
}

static uint64_t get_number(const char *name)
{
    const char *text = getenv(name);
    return text ? parse_number(name, text) : 0;
}

static bool leader_is_traced(void)
{
    char text[2048];
    ssize_t n = pread(status_fd, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = '\0';
    const char *field = strstr(text, "TracerPid:\t");
    return field && strncmp(field, "TracerPid:\t0", 12) != 0;
}

__attribute__((noreturn)) static void execute(void)
{
    execv("/proc/self/exe", arguments);
    fail_errno("execv");
}

static void *execute_when_traced(void *argument)
{
    (void)argument;
    set_number("EXECS_TRACED", traced + 1);
    while (now_ns() < end_ns + PATIENCE_NS)
        if (leader_is_traced())
            execute();
    set_number("EXECS_TRACED", traced);
    execute();
}

static void start_thread(pthread_t *ret, void *(*run)(void *), void *argument)
{
    if (pthread_create(ret, NULL, run, argument) != 0)
        fail("FAILED pthread_create");
}

int main(int argc, char **argv)
{
    static const struct option known[] = {
        {"count", 1, NULL, 'c'}, {"mib", 1, NULL, 'm'}, {"threads", 1, NULL, 't'}, {"life-ms", 1, NULL, 'l'}, {0}};
    uint64_t count = 200, mib = 4, nthreads = 32, life_ms = 60;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 'c': count = parse_number("--count", optarg); break;
        case 'm': mib = parse_number("--mib", optarg); break;
        case 't': nthreads = parse_number("--threads", optarg); break;
        case 'l': life_ms = parse_number("--life-ms", optarg); break;
        default: return 2;
        }
    }
    if (mib == 0 || life_ms == 0)
        fail("--mib and --life-ms must be positive");
    number = get_number("EXECS_NUMBER");
    traced = get_number("EXECS_TRACED");
    if (number == 0)
        reply("\"ready\":true,\"pid\":%d", (int)getpid());
    arguments = argv;
    heap_init(&heap, mib * MIB, number, false);
    if (number < count) {
        struct rng rng = {mix64(number)};
        bool from_leader = number % 2;
        set_number("EXECS_NUMBER", number + 1);
        end_ns = now_ns() + (life_ms + rng_below(&rng, life_ms)) * NS_PER_MS;
        status_fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
        if (status_fd == -1)
            fail_errno("opening /proc/self/status");
        pthread_t thread;
        for (uint64_t i = 0; i < nthreads; i++)
            start_thread(&thread, i == 0 ? run_on : sleep_on, (void *)(uintptr_t)i);
        if (from_leader) {
            while (now_ns() < end_ns)
                sleep_ns(NS_PER_MS / 10);
            execute();
        }
        start_thread(&thread, execute_when_traced, NULL);
        sleep_on(NULL);
    }
    heap_sum(&heap);
    reply("\"execs\":%lu,\"traced\":%lu", number, traced);
    return 0;
}
