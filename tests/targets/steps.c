/* A heap to which one thing at a time is done, on command: discards, moves, guards, forks, exec. Each step verifies
 * every byte it concerns; a wrong one is one line on stderr and exit status 1. Replies are JSON lines as those of hold.
 *
 *   steps [--mib 64] [--seed 1]
 *
 *   look             verifies every page and counts them: "right", "guards" (which must raise SIGSEGV), "lost" (SIGBUS)
 *   where            address and size of the heap, and "generation", which an exec counts up
 *   write N SEED     gives N random pages new content by stores; readin N SEED by read(2); vmwrite N SEED by
 *                    process_vm_writev on itself
 *   discard N SEED   MADV_DONTNEED of N random pages; lazy N SEED: MADV_FREE; both verify at once
 *   move             mremap of the whole heap to another place; keep: the same with MREMAP_DONTUNMAP, and the old place
 *                    must be zeros; grow MIB, shrink MIB: mremap in place where that is possible
 *   hole FIRST N     munmap of pages, then a fresh mapping in the hole; over FIRST N: MAP_FIXED over them
 *   file FIRST N     MAP_FIXED over N pages: a private mapping of a file without holes, and each page is written to
 *   guard N SEED     discards N random pages and installs guards there; unguard removes all, fresh pages come back;
 *                    fence N SEED: guards straight over N random pages, of which nothing is heard
 *   lose ADDRESS N   takes N pages away wherever they are, of which nothing is heard
 *   sweep FIRST N EVERY   discards pages, puts guards on each EVERYth of them (none for 0), of which nothing is heard,
 *                    and writes the others in order, as a program that allocates: each was zero
 *   protect ON       makes the lower half PROT_READ, and verifies that a write there raises SIGSEGV; or undoes it
 *   brk MIB          verified memory at the program break; rebrk gives it back and takes it again, as zeros
 *   grandchild       verifies in a child and in its child; rawfork: in a child made without libc's fork handlers,
 *                    which may end by SIGSEGV but see nothing wrong; orphan: leaves a child behind that verifies when
 *                    its parent has gone, and says so
 *   kinds            maps areas of 1 MiB that a pager of private memory must leave alone; "kinds" is how many
 *   share ON         starts a process in the same address space, or ends it
 *   closefds         closes all but the standard descriptors; setuid UID; exec; quit as does the end of input */
#include "content.h"
#include <fcntl.h>
#include <getopt.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <setjmp.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>

#define GUARD_INSTALL 102 /* MADV_GUARD_INSTALL, newer than many headers */
#define GUARD_REMOVE 103
#define CAPACITY 2 /* the heap may grow to so many times its first size */

static struct heap heap;
static size_t capacity;
static bool *guarded; /* in shared memory */
static char *at_break;
static size_t break_bytes;
static pid_t sharer;
static char *const *arguments;

static sigjmp_buf fault_return;
static volatile sig_atomic_t fault_expected;

static void on_fault(int signal)
{
    if (!fault_expected) {
        static const char text[] = "FAILED a fault that was not expected\n";
        ssize_t written = write(STDERR_FILENO, text, sizeof text - 1);
        (void)written;
        _exit(1);
    }
    siglongjmp(fault_return, signal);
}

/* 0, or the signal that touching the address raises. */
static int touch(volatile char *at, bool write)
{
    int signal = sigsetjmp(fault_return, 1);
    if (signal == 0) {
        fault_expected = true;
        char byte = *at;
        if (write)
            *at = byte;
    }
    fault_expected = false;
    return signal;
}

static char *page_at(size_t page)
{
    return heap.at + page * PAGE;
}

static void fresh(size_t page, size_t npages)
{
    memset(&heap.identity[page], 0, npages * sizeof heap.identity[0]);
    memset(&guarded[page], 0, npages * sizeof guarded[0]);
}

static size_t random_page(struct rng *rng)
{
    size_t page = rng_below(rng, heap.npages);
    while (guarded[page])
        page = (page + 1) % heap.npages;
    return page;
}

struct seen {
    size_t right, guards, lost;
};

static struct seen look(const char *after)
{
    struct seen seen = {0};
    for (size_t page = 0; page < heap.npages; page++) {
        int signal = touch(page_at(page), false);
        if ((signal == SIGSEGV) != guarded[page])
            fail("FAILED after %s: page %zu raised signal %d", after, page, signal);
        if (signal == SIGSEGV) {
            seen.guards++;
        } else if (signal == SIGBUS) {
            seen.lost++;
        } else {
            heap_verify_page(&heap, page, after);
            seen.right++;
        }
    }
    return seen;
}

/* For children: nobody reads their counts. */
static void look_for_all(const char *after)
{
    struct seen seen = look(after);
    if (seen.lost)
        fail("FAILED after %s: %zu pages raise SIGBUS", after, seen.lost);
}

static void reply_look(const char *after)
{
    struct seen seen = look(after);
    reply("\"right\":%zu,\"guards\":%zu,\"lost\":%zu", seen.right, seen.guards, seen.lost);
}

static void expect_zeros(const char *at, size_t bytes, const char *after)
{
    for (size_t i = 0; i < bytes; i += sizeof(uint64_t))
        if (*(const uint64_t *)(at + i))
            fail("MISMATCH after %s address %p: expected zeros found %016lx", after, (const void *)(at + i),
                 *(const uint64_t *)(at + i));
}

static void do_write(const char *name, uint64_t count, struct rng *rng)
{
    static char page[PAGE];
    int fd[2];
    if (pipe(fd) == -1)
        fail_errno("pipe");
    for (uint64_t i = 0; i < count; i++) {
        size_t which = random_page(rng);
        struct iovec local = {page, PAGE}, remote = {page_at(which), PAGE};
        if (strcmp(name, "write") == 0) {
            heap_renew_page(&heap, which);
            continue;
        }
        heap.identity[which] = (struct identity){.index = (uint32_t)which, .generation = ++heap.serial};
        fill_page(page, heap.seed, heap.identity[which]);
        if (strcmp(name, "vmwrite") == 0) {
            if (process_vm_writev(getpid(), &local, 1, &remote, 1, 0) != (ssize_t)PAGE)
                fail_errno("process_vm_writev");
        } else if (write(fd[1], page, PAGE) != (ssize_t)PAGE || read(fd[0], page_at(which), PAGE) != (ssize_t)PAGE) {
            fail_errno("read into the heap");
        }
    }
    close(fd[0]);
    close(fd[1]);
    reply("\"pages\":%lu", count);
}

static void do_discard(int advice, uint64_t count, struct rng *rng)
{
    size_t zeros = 0;
    for (uint64_t i = 0; i < count; i++) {
        size_t page = random_page(rng);
        if (madvise(page_at(page), PAGE, advice) == -1)
            fail_errno("madvise");
        /* After MADV_FREE the old bytes may stay until the kernel needs the memory, but never half of them. */
        bool zero = advice == MADV_DONTNEED || *(volatile uint64_t *)page_at(page) == 0;
        if (zero)
            fresh(page, 1);
        zeros += zero;
        heap_verify_page(&heap, page, "a discard");
    }
    reply("\"zeros\":%zu", zeros);
}

static void do_move(bool keep)
{
    size_t bytes = heap.npages * PAGE;
    char *old = heap.at;
    if (keep) {
        heap.at = mremap(old, bytes, bytes, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL);
    } else {
        char *place = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (place == MAP_FAILED)
            fail_errno("mmap of a reservation");
        heap.at = mremap(old, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, place);
    }
    if (heap.at == MAP_FAILED)
        fail_errno("mremap");
    if (keep) {
        expect_zeros(old, bytes, "mremap with MREMAP_DONTUNMAP");
        if (munmap(old, bytes) == -1)
            fail_errno("munmap");
    }
    reply_look("mremap");
}

static void do_resize(size_t npages)
{
    size_t old = heap.npages;
    if (npages == 0 || npages > capacity)
        fail("the heap can have 1 to %zu pages, not %zu", capacity, npages);
    char *at = mremap(heap.at, old * PAGE, npages * PAGE, MREMAP_MAYMOVE);
    if (at == MAP_FAILED)
        fail_errno("mremap to another size");
    bool moved = at != heap.at;
    heap.at = at;
    heap.npages = npages;
    if (npages > old)
        fresh(old, npages - old);
    struct seen seen = look("mremap to another size");
    reply("\"right\":%zu,\"moved\":%s", seen.right, moved ? "true" : "false");
}

static void do_replace(bool unmap, size_t first, size_t npages)
{
    if (first + npages > heap.npages)
        fail("pages %zu to %zu are not in the heap", first, first + npages);
    if (unmap && munmap(page_at(first), npages * PAGE) == -1)
        fail_errno("munmap");
    if (mmap(page_at(first), npages * PAGE, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | (unmap ? MAP_FIXED_NOREPLACE : MAP_FIXED), -1, 0) != page_at(first))
        fail_errno("mmap over the heap");
    fresh(first, npages);
    reply_look("mmap over a part");
}

static void do_file(size_t first, size_t npages)
{
    if (first + npages > heap.npages)
        fail("pages %zu to %zu are not in the heap", first, first + npages);
    int fd = memfd_create("steps", MFD_CLOEXEC);
    for (size_t page = 0; page < npages; page++)
        if (write(fd, arguments[0], 1) != 1 || lseek(fd, (off_t)((page + 1) * PAGE), SEEK_SET) == -1)
            fail_errno("writing a file");
    if (ftruncate(fd, (off_t)(npages * PAGE)) == -1)
        fail_errno("ftruncate");
    if (mmap(page_at(first), npages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, fd, 0) != page_at(first))
        fail_errno("mmap over the heap");
    close(fd);
    for (size_t page = first; page < first + npages; page++)
        heap_renew_page(&heap, page);
    reply("\"pages\":%zu", npages);
}

static void do_guard(uint64_t count, struct rng *rng, bool discard)
{
    for (uint64_t i = 0; i < count; i++) {
        size_t page = random_page(rng);
        if ((discard && madvise(page_at(page), PAGE, MADV_DONTNEED) == -1) ||
            madvise(page_at(page), PAGE, GUARD_INSTALL) == -1) {
            reply("\"unsupported\":true");
            return;
        }
        fresh(page, 1);
        guarded[page] = true;
    }
    reply_look("guards");
}

static void do_sweep(size_t first, size_t npages, size_t every)
{
    if (first + npages > heap.npages)
        fail("pages %zu to %zu are not in the heap", first, first + npages);
    if (madvise(page_at(first), npages * PAGE, MADV_DONTNEED) == -1)
        fail_errno("madvise");
    fresh(first, npages);
    for (size_t page = first + every - 1; every && page < first + npages; page += every) {
        if (madvise(page_at(page), PAGE, GUARD_INSTALL) == -1) {
            reply("\"unsupported\":true");
            return;
        }
        guarded[page] = true;
    }
    for (size_t page = first; page < first + npages; page++) {
        if (guarded[page])
            continue;
        uint64_t old = __atomic_fetch_add((uint64_t *)page_at(page), 1, __ATOMIC_RELAXED);
        if (old)
            fail("MISMATCH in a sweep, page %zu: expected zeros found %016lx", page, old);
        heap_renew_page(&heap, page);
    }
    reply_look("a sweep");
}

static void do_lose(uint64_t address, size_t npages)
{
    void *at = (void *)(uintptr_t)address;
    if (madvise(at, npages * PAGE, GUARD_INSTALL) == -1 || madvise(at, npages * PAGE, GUARD_REMOVE) == -1)
        reply("\"unsupported\":true");
    else
        reply("\"pages\":%zu", npages);
}

static void do_unguard(void)
{
    for (size_t page = 0; page < heap.npages; page++)
        if (guarded[page]) {
            if (madvise(page_at(page), PAGE, GUARD_REMOVE) == -1)
                fail_errno("MADV_GUARD_REMOVE");
            fresh(page, 1);
        }
    reply_look("the removal of guards");
}

static void do_protect(bool on)
{
    size_t half = heap.npages / 2;
    if (mprotect(heap.at, half * PAGE, on ? PROT_READ : PROT_READ | PROT_WRITE) == -1)
        fail_errno("mprotect");
    for (size_t page = 0; on && page < half; page += 1 + half / 16)
        if (touch(page_at(page), true) != SIGSEGV)
            fail("FAILED page %zu is read-only and was written", page);
    reply_look("mprotect");
}

static void verify_break(void)
{
    for (size_t i = 0; i < break_bytes / PAGE; i++)
        expect_page(&heap, at_break + i * PAGE, (struct identity){.index = (uint32_t)i, .generation = 1}, "brk");
}

static void do_brk(size_t bytes)
{
    uintptr_t top = (uintptr_t)sbrk(0);
    if (sbrk((intptr_t)(-top % PAGE)) == (void *)-1 || (at_break = sbrk((intptr_t)bytes)) == (void *)-1)
        fail_errno("sbrk");
    break_bytes = bytes;
    for (size_t i = 0; i < bytes / PAGE; i++)
        fill_page(at_break + i * PAGE, heap.seed, (struct identity){.index = (uint32_t)i, .generation = 1});
    reply("\"bytes\":%zu", bytes);
}

static void do_rebrk(void)
{
    verify_break();
    if ((char *)sbrk(0) != at_break + break_bytes)
        fail("FAILED somebody else moved the program break");
    if (sbrk(-(intptr_t)break_bytes) == (void *)-1 || sbrk((intptr_t)break_bytes) != at_break)
        fail_errno("sbrk");
    expect_zeros(at_break, break_bytes, "a regrown program break");
    reply("\"bytes\":%zu", break_bytes);
}

static int status_of(pid_t pid)
{
    int status;
    while (waitpid(pid, &status, 0) == -1)
        if (errno != EINTR)
            fail_errno("waitpid");
    return status;
}

static void do_grandchild(void)
{
    pid_t child = fork();
    if (child == 0) {
        pid_t grandchild = fork();
        look_for_all(grandchild == 0 ? "fork of a fork" : "fork");
        if (grandchild == 0)
            _exit(0);
        _exit(grandchild < 0 || status_of(grandchild) ? 2 : 0);
    }
    int status = child == -1 ? -1 : status_of(child);
    if (status)
        fail("FAILED a child ended with wait status %#x", (unsigned)status);
    reply_look("fork");
}

static void do_rawfork(void)
{
    long child = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (child == -1)
        fail_errno("clone");
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL);
        for (size_t page = 0; page < heap.npages; page++)
            heap_verify_page(&heap, page, "a raw fork");
        _exit(0);
    }
    int status = status_of((pid_t)child);
    bool segv = WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV;
    if (status && !segv)
        fail("FAILED a child ended with wait status %#x", (unsigned)status);
    reply("\"segv\":%s", segv ? "true" : "false");
}

static void do_orphan(void)
{
    pid_t parent = getpid(), child = fork();
    if (child == -1)
        fail_errno("fork");
    if (child == 0) {
        while (getppid() == parent)
            sleep_ns(NS_PER_MS);
        reply_look("the end of a parent");
        _exit(0);
    }
    reply("\"child\":%d", (int)child);
}

/* Each area is filled; what becomes of it is another program's business. */
static char *fill_area(char *at)
{
    if (at == MAP_FAILED)
        fail_errno("mmap of an area");
    memset(at, 0x5a, MIB);
    return at;
}

static bool watch_area(char *at)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {.range = {(uintptr_t)at, MIB}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    return fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0 && ioctl(fd, UFFDIO_REGISTER, &range) == 0;
}

static void do_kinds(void)
{
    char *at[6];
    for (size_t i = 0; i < COUNT_OF(at); i++) {
        int fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
        if (i == 3)
            flags = MAP_SHARED | MAP_ANONYMOUS;
        if (i == 4) {
            fd = memfd_create("steps", MFD_CLOEXEC);
            flags = MAP_PRIVATE;
            if (fd == -1 || ftruncate(fd, MIB) == -1)
                fail_errno("memfd_create");
        }
        /* A reservation around each keeps neighbours from merging. */
        char *room = mmap(NULL, 3 * MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        at[i] = fill_area(mmap(room + MIB, MIB, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0));
    }
    if (mlock(at[0], MIB) == -1 || madvise(at[1], MIB, MADV_DONTFORK) == -1 ||
        madvise(at[2], MIB, MADV_WIPEONFORK) == -1 || !watch_area(at[5]))
        fail_errno("making areas of all kinds");
    reply("\"locked\":%lu,\"not_forked\":%lu,\"wiped_on_fork\":%lu,\"shared\":%lu,\"file\":%lu,\"watched\":%lu",
          (uintptr_t)at[0], (uintptr_t)at[1], (uintptr_t)at[2], (uintptr_t)at[3], (uintptr_t)at[4], (uintptr_t)at[5]);
}

__attribute__((noreturn)) static int live_beside(void *unused)
{
    (void)unused;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    for (;;)
        pause();
}

static void do_share(bool on)
{
    static char stack[64 * 1024] __attribute__((aligned(16)));
    if (on) {
        sharer = clone(live_beside, stack + sizeof stack, CLONE_VM | SIGCHLD, NULL);
        if (sharer == -1)
            fail_errno("clone with CLONE_VM");
    } else {
        kill(sharer, SIGKILL);
        status_of(sharer);
    }
    reply("\"pid\":%d", (int)sharer);
}

static uint64_t generation(void)
{
    const char *text = getenv("STEPS_GENERATION");
    return text ? strtoull(text, NULL, 10) : 0;
}

static void do_exec(void)
{
    char text[32];
    snprintf(text, sizeof text, "%lu", generation() + 1);
    setenv("STEPS_GENERATION", text, 1);
    execv("/proc/self/exe", arguments);
    fail_errno("execv");
}

static void run_command(const struct command *command)
{
    const char *name = command->name;
    uint64_t first = command->argument[0], second = command->argument[1];
    struct rng rng = {mix64(second)};
    if (strcmp(name, "look") == 0)
        reply_look("looking");
    else if (strcmp(name, "where") == 0)
        reply("\"address\":%lu,\"bytes\":%zu,\"generation\":%lu", (uintptr_t)heap.at, heap.npages * PAGE, generation());
    else if (strcmp(name, "write") == 0 || strcmp(name, "readin") == 0 || strcmp(name, "vmwrite") == 0)
        do_write(name, first, &rng);
    else if (strcmp(name, "discard") == 0 || strcmp(name, "lazy") == 0)
        do_discard(*name == 'd' ? MADV_DONTNEED : MADV_FREE, first, &rng);
    else if (strcmp(name, "move") == 0 || strcmp(name, "keep") == 0)
        do_move(*name == 'k');
    else if (strcmp(name, "grow") == 0)
        do_resize(heap.npages + first * MIB / PAGE);
    else if (strcmp(name, "shrink") == 0)
        do_resize(heap.npages - first * MIB / PAGE);
    else if (strcmp(name, "hole") == 0 || strcmp(name, "over") == 0)
        do_replace(*name == 'h', first, second);
    else if (strcmp(name, "file") == 0)
        do_file(first, second);
    else if (strcmp(name, "guard") == 0 || strcmp(name, "fence") == 0)
        do_guard(first, &rng, strcmp(name, "guard") == 0);
    else if (strcmp(name, "sweep") == 0)
        do_sweep(first, second, command->argument[2]);
    else if (strcmp(name, "lose") == 0)
        do_lose(first, second);
    else if (strcmp(name, "unguard") == 0)
        do_unguard();
    else if (strcmp(name, "protect") == 0)
        do_protect(first);
    else if (strcmp(name, "brk") == 0)
        do_brk(first * MIB);
    else if (strcmp(name, "rebrk") == 0)
        do_rebrk();
    else if (strcmp(name, "grandchild") == 0)
        do_grandchild();
    else if (strcmp(name, "rawfork") == 0)
        do_rawfork();
    else if (strcmp(name, "orphan") == 0)
        do_orphan();
    else if (strcmp(name, "kinds") == 0)
        do_kinds();
    else if (strcmp(name, "share") == 0)
        do_share(first);
    else if (strcmp(name, "closefds") == 0)
        reply("\"status\":%ld", syscall(SYS_close_range, 3, ~0U, 0));
    else if (strcmp(name, "setuid") == 0)
        reply("\"status\":%d", setresuid((uid_t)first, (uid_t)first, (uid_t)first));
    else if (strcmp(name, "exec") == 0)
        do_exec();
    else
        reply_error("unknown command");
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
    /* The handler runs on a stack of its own, in static memory: the faults are about the heap. */
    static char stack[64 * 1024];
    sigaltstack(&(stack_t){.ss_sp = stack, .ss_size = sizeof stack}, NULL);
    struct sigaction action = {.sa_handler = on_fault, .sa_flags = SA_ONSTACK};
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    heap_init(&heap, mib * MIB, seed, false);
    capacity = CAPACITY * heap.npages;
    struct identity *wider = shared_alloc(capacity * sizeof *wider);
    memcpy(wider, heap.identity, heap.npages * sizeof *wider);
    heap.identity = wider;
    guarded = shared_alloc(capacity * sizeof *guarded);
    reply("\"ready\":true,\"pid\":%d,\"generation\":%lu", (int)getpid(), generation());
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
