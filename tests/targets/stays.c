/* Memory that no pager of private memory may take away, one area for each reason, and a userfaultfd of our own
 * with a thread that serves it. On command everything is verified; what is wrong is one line on stderr, exit status 1.
 *
 *   stays
 *
 *   areas           where each area of 1 MiB is, by its kind; 0 for a kind that the kernel has not got
 *   look            verifies all areas, and the thread that began on a stack of its own
 *   own N           touches N pages more that the program's own userfaultfd has to bring, and verifies them
 *   threads N       starts and joins N threads whose stacks and TLS blocks lie in the middle of a heap
 *   quit            as does the end of input */
#include "content.h"
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>

#define AREA_BYTES MIB
#define OWN_PAGES 4096
#define STACK_BYTES (256 * 1024)
#ifndef MLOCK_ONFAULT
#define MLOCK_ONFAULT 1
#endif
#define SYS_MSEAL 462 /* newer than many headers */

enum kind { PLAIN, LOCKED, ON_FAULT, SEALED, NO_ACCESS, GROWS_DOWN, READ_ONLY, KINDS };
static const char *const names[KINDS] = {
    "plain", "locked", "on_fault", "sealed", "no_access", "grows_down", "read_only"};
static char *areas[KINDS];

static char *own; /* watched by ourselves */
static size_t own_pages;
static int own_fd;
static __thread uint64_t in_tls = 0x715;

static char *make_area(enum kind kind)
{
    /* A reservation around each keeps neighbours from merging. */
    char *room = mmap(NULL, 3 * AREA_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | (kind == GROWS_DOWN ? MAP_GROWSDOWN : 0);
    if (room == MAP_FAILED)
        fail_errno("mmap of a reservation");
    char *at = mmap(room + AREA_BYTES, AREA_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (at == MAP_FAILED)
        fail_errno("mmap of an area");
    int failed = 0;
    if (kind == ON_FAULT) /* before anything is there */
        failed = mlock2(at, AREA_BYTES, MLOCK_ONFAULT);
    for (size_t page = 0; page < AREA_BYTES / PAGE; page++)
        fill_page(at + page * PAGE, kind, (struct identity){.index = (uint32_t)page, .generation = 1});
    if (kind == LOCKED)
        failed = mlock(at, AREA_BYTES);
    else if (kind == NO_ACCESS)
        failed = mprotect(at, AREA_BYTES, PROT_NONE);
    else if (kind == READ_ONLY)
        failed = mprotect(at, AREA_BYTES, PROT_READ);
    else if (kind == SEALED && syscall(SYS_MSEAL, at, AREA_BYTES, 0) == -1)
        return NULL;
    if (failed)
        fail_errno(names[kind]);
    return at;
}

static void look(void)
{
    const struct heap heap = {0};
    for (enum kind kind = 0; kind < KINDS; kind++) {
        if (kind == NO_ACCESS && mprotect(areas[kind], AREA_BYTES, PROT_READ) == -1)
            fail_errno("mprotect");
        struct heap expected = heap;
        expected.seed = kind;
        for (size_t page = 0; areas[kind] && page < AREA_BYTES / PAGE; page++)
            expect_page(&expected, areas[kind] + page * PAGE,
                        (struct identity){.index = (uint32_t)page, .generation = 1}, names[kind]);
        if (kind == NO_ACCESS && mprotect(areas[kind], AREA_BYTES, PROT_NONE) == -1)
            fail_errno("mprotect");
    }
    if (in_tls != 0x715)
        fail("MISMATCH in a thread-local variable: %lx", in_tls);
}

static void *serve_own(void *unused)
{
    static uint64_t page[PAGE_WORDS] __attribute__((aligned(4096)));
    (void)unused;
    for (;;) {
        struct uffd_msg message;
        if (read(own_fd, &message, sizeof message) != sizeof message)
            fail_errno("read of the program's own userfaultfd");
        uint64_t at = message.arg.pagefault.address & -PAGE;
        fill_page(page, 77, (struct identity){.index = (uint32_t)((at - (uintptr_t)own) / PAGE), .generation = 1});
        struct uffdio_copy copy = {.dst = at, .src = (uintptr_t)page, .len = PAGE};
        if (ioctl(own_fd, UFFDIO_COPY, &copy) == -1 && errno != EEXIST)
            fail_errno("UFFDIO_COPY of the program's own");
    }
}

static void watch_own(void)
{
    own_fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    struct uffdio_api api = {.api = UFFD_API};
    own = heap_alloc(OWN_PAGES * PAGE);
    struct uffdio_register range = {.range = {(uintptr_t)own, OWN_PAGES * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    pthread_t thread;
    if (own_fd == -1 || ioctl(own_fd, UFFDIO_API, &api) == -1 || ioctl(own_fd, UFFDIO_REGISTER, &range) == -1)
        fail_errno("userfaultfd of the program's own");
    if (pthread_create(&thread, NULL, serve_own, NULL) != 0)
        fail("FAILED pthread_create");
}

static void look_at_own(uint64_t more)
{
    struct heap expected = {.seed = 77};
    own_pages += more;
    if (own_pages > OWN_PAGES)
        fail("own has %d pages", OWN_PAGES);
    for (size_t page = 0; page < own_pages; page++)
        expect_page(&expected, own + page * PAGE, (struct identity){.index = (uint32_t)page, .generation = 1}, "own");
    reply("\"pages\":%zu", own_pages);
}

static void *use_tls(void *argument)
{
    in_tls += (uintptr_t)argument;
    sleep_ns(NS_PER_MS);
    return (void *)(uintptr_t)in_tls;
}

/* Their stacks are parts of one large mapping, so that stack and TLS have a heap as neighbours. */
static void run_threads(uint64_t count)
{
    static char *room;
    if (!room)
        room = heap_alloc(64 * STACK_BYTES);
    memset(room, 0x3c, 64 * STACK_BYTES);
    for (uint64_t done = 0; done < count;) {
        pthread_t thread[16];
        size_t n = 0;
        for (; n < COUNT_OF(thread) && done < count; n++, done++) {
            pthread_attr_t attributes;
            pthread_attr_init(&attributes);
            pthread_attr_setstack(&attributes, room + 4 * n * STACK_BYTES, STACK_BYTES);
            if (pthread_create(&thread[n], &attributes, use_tls, (void *)(uintptr_t)n) != 0)
                fail("FAILED pthread_create");
            pthread_attr_destroy(&attributes);
        }
        for (size_t i = 0; i < n; i++) {
            void *result;
            if (pthread_join(thread[i], &result) != 0 || (uintptr_t)result != 0x715 + i)
                fail("MISMATCH in the TLS of thread %zu", i);
        }
    }
    reply("\"threads\":%lu", count);
}

int main(void)
{
    struct rlimit limit = {RLIM_INFINITY, RLIM_INFINITY};
    setrlimit(RLIMIT_MEMLOCK, &limit);
    for (enum kind kind = 0; kind < KINDS; kind++)
        areas[kind] = make_area(kind);
    watch_own();
    reply("\"ready\":true,\"pid\":%d", (int)getpid());
    struct command command;
    while (read_command(&command) && strcmp(command.name, "quit") != 0) {
        if (strcmp(command.name, "areas") == 0) {
            printf("{\"ok\":true");
            for (enum kind kind = 0; kind < KINDS; kind++)
                printf(",\"%s\":%lu", names[kind], (uintptr_t)areas[kind]);
            printf(",\"own\":%lu}\n", (uintptr_t)own);
            fflush(stdout);
        } else if (strcmp(command.name, "look") == 0) {
            look();
            reply("\"looked\":true");
        } else if (strcmp(command.name, "own") == 0) {
            look_at_own(command.argument[0]);
        } else if (strcmp(command.name, "threads") == 0) {
            run_threads(command.argument[0]);
        } else {
            reply_error("unknown command");
        }
    }
    reply("\"quit\":true");
    return 0;
}
