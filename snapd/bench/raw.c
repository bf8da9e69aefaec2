/* What userfaultfd itself costs on this machine, without snapd: UFFDIO_COPY into warm memory by 2 MiB and by 4 KiB a
 * call, and the round trip of a fault whose handler does nothing but COPY one page that is at hand: on the faulting
 * thread's CPU, asleep on another CPU, and spinning there. One JSON line on stdout; times are nanoseconds.
 *
 *   raw [--mib 512] [--faults 2000] */
#include "content.h"

#include "uapi.h"

#include <fcntl.h>
#include <getopt.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

#define USER_MODE_ONLY 1 /* the faults here are user mode's, and so no privilege is needed */
#define BULK_BYTES (2 * MIB)

struct watched {
    int uffd;
    char *at;
    size_t bytes;
    char *source; /* BULK_BYTES, in the CPU's cache: what a decoder has just written would be */
};

struct handler {
    struct watched *watched;
    pthread_t thread;
    int cpu;
    bool spins;
    atomic_bool stopping;
};

struct trip {
    uint64_t p50_ns, p99_ns;
};

static void watched_init(struct watched *watched, size_t bytes)
{
    struct snapd_uffd_api api = {.api = SNAPD_UFFD_API};
    watched->bytes = bytes;
    watched->at = heap_alloc(bytes);
    watched->source = heap_alloc(BULK_BYTES);
    for (size_t i = 0; i < BULK_BYTES / PAGE; i++)
        fill_page(watched->source + i * PAGE, 1, (struct identity){(uint32_t)i, 1});
    watched->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | USER_MODE_ONLY);
    if (watched->uffd == -1)
        fail_errno("userfaultfd");
    struct snapd_uffd_register watch = {.range = {(uint64_t)watched->at, bytes},
                                        .mode = SNAPD_UFFDIO_REGISTER_MODE_MISSING};
    if (ioctl(watched->uffd, SNAPD_UFFDIO_API, &api) == -1)
        fail_errno("UFFDIO_API");
    if (ioctl(watched->uffd, SNAPD_UFFDIO_REGISTER, &watch) == -1)
        fail_errno("UFFDIO_REGISTER");
}

static void empty(const struct watched *watched)
{
    if (madvise(watched->at, watched->bytes, MADV_DONTNEED) == -1)
        fail_errno("MADV_DONTNEED");
}

static void copy(const struct watched *watched, char *to, size_t bytes)
{
    struct snapd_uffd_copy copy = {.dst = (uint64_t)to, .src = (uint64_t)watched->source, .len = bytes};
    if (ioctl(watched->uffd, SNAPD_UFFDIO_COPY, &copy) == -1)
        fail_errno("UFFDIO_COPY");
}

/* Nanoseconds to fill all, which must be empty, `step` bytes a call; leaves it empty. */
static uint64_t time_copies(const struct watched *watched, size_t step)
{
    uint64_t begin_ns = now_ns();
    for (size_t done = 0; done < watched->bytes; done += step)
        copy(watched, watched->at + done, step < watched->bytes - done ? step : watched->bytes - done);
    uint64_t took_ns = now_ns() - begin_ns;
    empty(watched);
    return took_ns;
}

static void run_on(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set) == -1)
        fail_errno("sched_setaffinity");
}

static void *handle(void *argument)
{
    struct handler *handler = argument;
    struct pollfd pollfd = {.fd = handler->watched->uffd, .events = POLLIN};
    run_on(handler->cpu);
    while (!atomic_load(&handler->stopping)) {
        struct snapd_uffd_msg message;
        if (!handler->spins && poll(&pollfd, 1, 10) != 1)
            continue;
        if (read(handler->watched->uffd, &message, sizeof message) != sizeof message)
            continue;
        copy(handler->watched, (char *)(message.arg.fault.address & ~(PAGE - 1)), PAGE);
    }
    return NULL;
}

static int compare_ns(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

static struct trip time_trips(struct watched *watched, size_t faults, int cpu, int handler_cpu, bool spins)
{
    struct handler handler = {.watched = watched, .cpu = handler_cpu, .spins = spins};
    uint64_t *ns = shared_alloc(faults * sizeof *ns);
    run_on(cpu);
    if (pthread_create(&handler.thread, NULL, handle, &handler) != 0)
        fail("FAILED pthread_create");
    for (size_t i = 0; i < faults; i++) {
        uint64_t start_ns = now_ns();
        (void)*(volatile char *)(watched->at + i * PAGE);
        ns[i] = now_ns() - start_ns;
    }
    atomic_store(&handler.stopping, true);
    pthread_join(handler.thread, NULL);
    empty(watched);
    qsort(ns, faults, sizeof *ns, compare_ns);
    struct trip trip = {.p50_ns = ns[faults / 2], .p99_ns = ns[faults * 99 / 100]};
    munmap(ns, faults * sizeof *ns);
    return trip;
}

/* The n-th CPU that this process may use, or -1. */
static int nth_cpu(int n)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == -1)
        fail_errno("sched_getaffinity");
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
        if (CPU_ISSET(cpu, &set) && n-- == 0)
            return cpu;
    return -1;
}

static void print_trip(const char *key, struct trip trip)
{
    printf(",\"%s\":{\"p50_ns\":%lu,\"p99_ns\":%lu}", key, trip.p50_ns, trip.p99_ns);
}

int main(int argc, char **argv)
{
    static const struct option known[] = {{"mib", 1, NULL, 'm'}, {"faults", 1, NULL, 'f'}, {0}};
    size_t mib = 512, faults = 2000;
    struct watched watched;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 'm': mib = parse_number("--mib", optarg); break;
        case 'f': faults = parse_number("--faults", optarg); break;
        default: return 2;
        }
    }
    if (mib == 0 || faults == 0 || faults > mib * MIB / PAGE)
        fail("--mib and --faults must be positive, and no more faults than pages");
    watched_init(&watched, mib * MIB);
    /* The first pass warms the memory: a virtual machine's host hands it out slowly. */
    time_copies(&watched, BULK_BYTES);
    printf("{\"ok\":true,\"bytes\":%zu,\"copy_bulk_ns\":%lu", watched.bytes, time_copies(&watched, BULK_BYTES));
    printf(",\"copy_page_ns\":%lu", time_copies(&watched, PAGE));
    int cpu = nth_cpu(0), other = nth_cpu(1);
    print_trip("same_cpu", time_trips(&watched, faults, cpu, cpu, false));
    if (other != -1) {
        print_trip("other_cpu", time_trips(&watched, faults, cpu, other, false));
        print_trip("other_cpu_spinning", time_trips(&watched, faults, cpu, other, true));
    }
    puts("}");
    return 0;
}
