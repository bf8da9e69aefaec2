/* A heap that stands still, with content as compressible as that of real programs, and a command loop on stdin and
 * stdout. Each command verifies what it touches; a wrong byte is one line on stderr and exit status 1. Each reply is
 * one JSON line, {"ok":true,...} or {"ok":false,"error":"..."}.
 *
 *   hold [--mib 256] [--seed 1] [--thp]       madvise(MADV_HUGEPAGE) with --thp
 *
 *   sum             verifies every page; "sum" is a checksum of all bytes in hex
 *   touch N SEED    reads N random pages; "p50_ns", "p99_ns", "max_ns" of the first access, "wall_ns" of all
 *   write N SEED    gives N random pages new content
 *   poke N SEED     changes one word in each of N random pages; the page's other bytes must be right before and after
 *   discard N SEED  MADV_DONTNEED of N random pages, which must read as zeros then
 *   drop FIRST N    MADV_DONTNEED of N pages in one call, which are not looked at
 *   kernel N SEED   N rounds of write(2), read(2), pwrite(2), pread(2), sendmsg(2), recvmsg(2) from and to heap pages
 *   fork N SEED     a child verifies all pages, writes N and verifies again; answers when it has ended
 *   threads N       starts N more threads, asleep in nanosleep or a futex; "interrupted" counts returns before time
 *   rss, thp        VmRSS and AnonHugePages in bytes
 *   where           address and size of the heap
 *   split N         makes mappings of N pages each of the heap, by a flag that every second one has
 *   pin FIRST N     makes N pages a fixed buffer of an io_uring: pinned until the program ends
 *   hide            takes its memory out of its user's reach, as programs with secrets do (PR_SET_DUMPABLE)
 *   quit            as does the end of input */
#include "content.h"
#include "ring.h"
#include <fcntl.h>
#include <getopt.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#define KERNEL_PAGES 8 /* a pipe takes 16 pieces, and a span that is not page-aligned in it may need one more */

static struct heap heap;
static atomic_ulong interrupted;
static unsigned sleepers;
static struct ring ring;
static int pipe_fd[2], socket_fd[2], file_fd;

static size_t random_page(struct rng *rng)
{
    return rng_below(rng, heap.npages);
}

static int compare_ns(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

static void do_touch(uint64_t count, uint64_t seed)
{
    if (count == 0) {
        reply_error("touch wants a number of pages");
        return;
    }
    struct rng rng = {mix64(seed)};
    uint64_t *took_ns = shared_alloc(count * sizeof *took_ns), begin_ns = now_ns(), checking_ns = 0;
    for (uint64_t i = 0; i < count; i++) {
        size_t page = random_page(&rng);
        uint64_t start_ns = now_ns();
        (void)*(volatile uint64_t *)(heap.at + page * PAGE + (rng_next(&rng) & 511) * 8);
        uint64_t end_ns = now_ns();
        took_ns[i] = end_ns - start_ns;
        heap_verify_page(&heap, page, "touch");
        checking_ns += now_ns() - end_ns;
    }
    uint64_t wall_ns = now_ns() - begin_ns - checking_ns;
    qsort(took_ns, count, sizeof *took_ns, compare_ns);
    reply("\"pages\":%lu,\"p50_ns\":%lu,\"p99_ns\":%lu,\"max_ns\":%lu,\"wall_ns\":%lu", count, took_ns[count / 2],
          took_ns[count * 99 / 100], took_ns[count - 1], wall_ns);
    munmap(took_ns, count * sizeof *took_ns);
}

static void write_pages(uint64_t count, uint64_t seed)
{
    struct rng rng = {mix64(seed)};
    for (uint64_t i = 0; i < count; i++)
        heap_renew_page(&heap, random_page(&rng));
}

static void do_poke(uint64_t count, uint64_t seed)
{
    struct rng rng = {mix64(seed)};
    for (uint64_t i = 0; i < count; i++) {
        size_t page = random_page(&rng);
        volatile uint64_t *word = (volatile uint64_t *)(heap.at + page * PAGE) + rng_below(&rng, PAGE_WORDS);
        uint64_t old = *word;
        *word = ~old;
        if (*word != ~old)
            fail("MISMATCH after poke address %p: expected %016lx found %016lx", (const void *)(uintptr_t)word, ~old,
                 *word);
        *word = old;
        heap_verify_page(&heap, page, "poke");
    }
}

static void do_discard(uint64_t count, uint64_t seed)
{
    struct rng rng = {mix64(seed)};
    for (uint64_t i = 0; i < count; i++) {
        size_t page = random_page(&rng);
        if (madvise(heap.at + page * PAGE, PAGE, MADV_DONTNEED) == -1)
            fail_errno("MADV_DONTNEED");
        heap.identity[page] = (struct identity){0};
        heap_verify_page(&heap, page, "discard");
    }
}

static void do_drop(uint64_t first, uint64_t count)
{
    if (count == 0 || first + count > heap.npages) {
        reply_error("there are no such pages");
        return;
    }
    if (madvise(heap.at + first * PAGE, count * PAGE, MADV_DONTNEED) == -1)
        fail_errno("MADV_DONTNEED");
    memset(&heap.identity[first], 0, count * sizeof heap.identity[0]);
    reply("\"pages\":%lu", count);
}

static void expect_bytes(ssize_t got, size_t wanted, const char *call)
{
    if (got != (ssize_t)wanted)
        fail("FAILED %s gave %zd of %zu: %s", call, got, wanted, got < 0 ? strerror(errno) : "short");
}

/* Page spans for one transfer: from and to never overlap. */
static size_t pick_spans(struct rng *rng, size_t *ret_from, size_t *ret_to)
{
    size_t npages = 1 + rng_below(rng, KERNEL_PAGES);
    do {
        *ret_from = rng_below(rng, heap.npages - npages + 1);
        *ret_to = rng_below(rng, heap.npages - npages + 1);
    } while (*ret_from < *ret_to + npages && *ret_to < *ret_from + npages);
    return npages;
}

static void copied(size_t from, size_t to, size_t npages, const char *after)
{
    for (size_t i = 0; i < npages; i++) {
        heap.identity[to + i] = heap.identity[from + i];
        heap_verify_page(&heap, from + i, after);
        heap_verify_page(&heap, to + i, after);
    }
}

/* No page is touched from user mode before its transfer: the kernel is the one that meets it missing. */
static void do_kernel(uint64_t rounds, uint64_t seed)
{
    struct rng rng = {mix64(seed)};
    for (uint64_t i = 0; i < rounds; i++) {
        size_t from, to, npages = pick_spans(&rng, &from, &to), length = npages * PAGE;
        expect_bytes(write(pipe_fd[1], heap.at + from * PAGE, length), length, "write(pipe)");
        expect_bytes(read(pipe_fd[0], heap.at + to * PAGE, length), length, "read(pipe)");
        copied(from, to, npages, "write and read of a pipe");

        npages = pick_spans(&rng, &from, &to), length = npages * PAGE;
        expect_bytes(pwrite(file_fd, heap.at + from * PAGE, length, 0), length, "pwrite(file)");
        expect_bytes(pread(file_fd, heap.at + to * PAGE, length, 0), length, "pread(file)");
        copied(from, to, npages, "pwrite and pread of a file");

        npages = pick_spans(&rng, &from, &to), length = npages * PAGE;
        size_t cut = rng_below(&rng, length + 1);
        struct iovec out[2] = {{heap.at + from * PAGE, cut}, {heap.at + from * PAGE + cut, length - cut}};
        struct iovec in[2] = {{heap.at + to * PAGE, length - cut}, {heap.at + to * PAGE + length - cut, cut}};
        struct msghdr send = {.msg_iov = out, .msg_iovlen = 2}, receive = {.msg_iov = in, .msg_iovlen = 2};
        expect_bytes(sendmsg(socket_fd[1], &send, 0), length, "sendmsg");
        expect_bytes(recvmsg(socket_fd[0], &receive, MSG_WAITALL), length, "recvmsg");
        copied(from, to, npages, "sendmsg and recvmsg");
    }
}

static void do_fork(uint64_t count, uint64_t seed)
{
    pid_t pid = fork();
    if (pid == -1)
        fail_errno("fork");
    if (pid == 0) {
        /* The identities are shared with the parent: the child writes what it then compares by itself. */
        struct rng rng = {mix64(seed)};
        heap_sum(&heap);
        for (uint64_t i = 0; i < count; i++) {
            size_t page = random_page(&rng);
            struct identity mine = {.index = (uint32_t)page, .generation = UINT32_MAX};
            fill_page(heap.at + page * PAGE, heap.seed, mine);
            expect_page(&heap, heap.at + page * PAGE, mine, "writing in a child");
        }
        _exit(0);
    }
    int status;
    while (waitpid(pid, &status, 0) == -1)
        if (errno != EINTR)
            fail_errno("waitpid");
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
        fail("FAILED the child ended with wait status %#x", (unsigned)status);
    heap_sum(&heap);
    reply("\"child\":%d", (int)pid);
}

static void *sleep_for_ever(void *argument)
{
    static atomic_uint never;
    bool use_futex = argument != NULL;
    for (;;) {
        struct timespec hour = {.tv_sec = 3600};
        long result = use_futex ? syscall(SYS_futex, &never, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0)
                                : nanosleep(&hour, NULL);
        if (use_futex || result == -1)
            atomic_fetch_add(&interrupted, 1);
    }
    return NULL;
}

static void do_threads(uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, sleep_for_ever, sleepers % 2 ? &heap : NULL) != 0)
            fail("FAILED pthread_create");
        sleepers++;
    }
    reply("\"threads\":%u,\"interrupted\":%lu", sleepers, atomic_load(&interrupted));
}

static void do_split(uint64_t npages)
{
    for (uint64_t at = 0; npages && at + npages <= heap.npages; at += 2 * npages)
        if (madvise(heap.at + at * PAGE, npages * PAGE, MADV_DONTDUMP) == -1)
            fail_errno("MADV_DONTDUMP");
    reply("\"pages\":%lu", npages);
}

static void do_pin(uint64_t first, uint64_t count)
{
    if (count == 0 || first + count > heap.npages) {
        reply_error("there are no such pages");
        return;
    }
    if (!ring_init(&ring, 1)) {
        reply("\"skipped\":\"no io_uring: %s\"", strerror(errno));
        return;
    }
    ring_register_buffer(&ring, heap.at + first * PAGE, count * PAGE);
    reply("\"pages\":%lu", count);
}

static void reply_kib_field(const char *path, const char *field, const char *key)
{
    char line[256];
    unsigned long kib = 0;
    FILE *file = fopen(path, "re");
    if (!file)
        fail_errno(path);
    while (fgets(line, sizeof line, file))
        if (strncmp(line, field, strlen(field)) == 0)
            kib = strtoul(line + strlen(field), NULL, 10);
    fclose(file);
    reply("\"%s\":%lu", key, kib * 1024);
}

static void run_command(const struct command *command)
{
    const char *name = command->name;
    uint64_t count = command->argument[0], seed = command->argument[1];
    if (strcmp(name, "sum") == 0) {
        reply("\"sum\":\"%016lx\"", heap_sum(&heap));
    } else if (strcmp(name, "touch") == 0) {
        do_touch(count, seed);
    } else if (strcmp(name, "write") == 0) {
        write_pages(count, seed);
        reply("\"pages\":%lu", count);
    } else if (strcmp(name, "poke") == 0) {
        do_poke(count, seed);
        reply("\"pages\":%lu", count);
    } else if (strcmp(name, "discard") == 0) {
        do_discard(count, seed);
        reply("\"pages\":%lu", count);
    } else if (strcmp(name, "drop") == 0) {
        do_drop(count, seed);
    } else if (strcmp(name, "kernel") == 0) {
        do_kernel(count, seed);
        reply("\"rounds\":%lu", count);
    } else if (strcmp(name, "fork") == 0) {
        do_fork(count, seed);
    } else if (strcmp(name, "threads") == 0) {
        do_threads(count);
    } else if (strcmp(name, "rss") == 0) {
        reply_kib_field("/proc/self/status", "VmRSS:", "rss_bytes");
    } else if (strcmp(name, "thp") == 0) {
        reply_kib_field("/proc/self/smaps_rollup", "AnonHugePages:", "anon_huge_bytes");
    } else if (strcmp(name, "hide") == 0) {
        if (prctl(PR_SET_DUMPABLE, 0))
            fail_errno("PR_SET_DUMPABLE");
        reply("\"hidden\":true");
    } else if (strcmp(name, "where") == 0) {
        reply("\"address\":%lu,\"bytes\":%lu", (unsigned long)heap.at, heap.npages * PAGE);
    } else if (strcmp(name, "split") == 0) {
        do_split(count);
    } else if (strcmp(name, "pin") == 0) {
        do_pin(count, seed);
    } else {
        reply_error("unknown command");
    }
}

int main(int argc, char **argv)
{
    static const struct option known[] = {{"mib", 1, NULL, 'm'}, {"seed", 1, NULL, 's'}, {"thp", 0, NULL, 't'}, {0}};
    size_t mib = 256;
    uint64_t seed = 1;
    bool huge = false;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 'm': mib = parse_number("--mib", optarg); break;
        case 's': seed = parse_number("--seed", optarg); break;
        case 't': huge = true; break;
        default: return 2;
        }
    }
    if (mib == 0)
        fail("--mib must be positive");
    file_fd = memfd_create("hold", MFD_CLOEXEC);
    if (file_fd == -1 || pipe2(pipe_fd, O_CLOEXEC) == -1 ||
        socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, socket_fd) == -1)
        fail_errno("making a pipe, a socket pair and a file");
    heap_init(&heap, mib * MIB, seed, huge);
    reply("\"ready\":true,\"pid\":%d", (int)getpid());
    struct command command;
    while (read_command(&command)) {
        if (strcmp(command.name, "quit") == 0) {
            reply("\"quit\":true");
            break;
        }
        run_command(&command);
    }
    return 0;
}
