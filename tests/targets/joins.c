/* Threads whose stacks and TLS stand in the middle of a large verified heap, as those of programs that bring their own
 * stacks do, and that come and go on command. A thread that ends can no longer fault: the kernel clears its tid word
 * and walks its robust list as it finds them, and pthread_join waits for that. Replies are JSON lines as those of hold.
 *
 *   joins [--mib 64] [--threads 16] [--seed 1]
 *
 *   start            starts the threads; each writes its TLS and a deep part of its stack and then sleeps
 *   signal           each thread verifies both in a handler that runs on a signal stack in the heap, and sleeps on
 *   join             ends the threads and joins them; each verifies its TLS and stack once more
 *   dead             a thread takes a robust mutex in the heap and ends without giving it back, when told to by:
 *   bury             joins that thread; the mutex must be had with EOWNERDEAD; "owner_dead" says so
 *   leave            starts a thread that waits and then ends without a touch of its own memory, when told to by:
 *   left             tells it, and joins it within 10 s; "joined" says so
 *   bare             the same with a thread that libc does not know: it has no robust list, its TLS is in the heap, and
 *                    its tid word in that; "tid" says which it is
 *   bared            tells it, and waits for its end; "cleared" says whether the kernel has cleared its tid word
 *   cycle N          N times: a thread is started, which verifies that its TLS is as new, and joined
 *   sum              verifies every page of the heap
 *   quit             as does the end of input */
#include "content.h"
#include <getopt.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <sys/syscall.h>

#define STACK_BYTES (512 * 1024)
#define DEEP_WORDS (256 * 1024 / sizeof(uint64_t))
#define TLS_WORDS (48 * 1024 / sizeof(uint64_t))
#define SIGNAL_STACK_BYTES (64 * 1024)
#define MAX_THREADS 64
#define FIRST_TLS_WORD 0x715715715ull

static __thread uint64_t tls[TLS_WORDS] = {FIRST_TLS_WORD};

struct worker {
    pthread_t thread;
    uint64_t number; /* never used twice */
    unsigned slot;   /* of the stacks */
    sem_t slept, go;
    bool end;
};

static struct heap heap;
static char *room; /* stacks of threads and of signals, in one mapping with the heap: between its two halves */
static unsigned nthreads = 16;
static struct worker *workers; /* in the heap's mapping as well */
static struct worker *dead_owner;
static pthread_mutex_t *robust;
static __thread volatile uint64_t *deep_words;
static __thread uint64_t own_number;
static atomic_ulong handled;

static uint64_t word_of(uint64_t number, size_t i)
{
    return mix64(number << 32 ^ i);
}

static void verify_own(const char *after)
{
    for (size_t i = 0; i < TLS_WORDS; i++)
        if (tls[i] != word_of(own_number, i))
            fail("MISMATCH after %s: TLS of thread %lu, word %zu is %016lx", after, own_number, i, tls[i]);
    for (size_t i = 0; i < DEEP_WORDS; i++)
        if (deep_words[i] != word_of(~own_number, i))
            fail("MISMATCH after %s: stack of thread %lu, word %zu is %016lx", after, own_number, i, deep_words[i]);
}

static void on_signal(int signal)
{
    (void)signal;
    verify_own("a signal");
    atomic_fetch_add(&handled, 1);
}

static void wait_for(sem_t *semaphore)
{
    while (sem_wait(semaphore) == -1)
        if (errno != EINTR)
            fail_errno("sem_wait");
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    volatile uint64_t deep[DEEP_WORDS];
    own_number = worker->number;
    deep_words = deep;
    if (tls[0] != FIRST_TLS_WORD || tls[1] || tls[TLS_WORDS - 1])
        fail("MISMATCH TLS of thread %lu is not as new", worker->number);
    for (size_t i = 0; i < TLS_WORDS; i++)
        tls[i] = word_of(own_number, i);
    for (size_t i = 0; i < DEEP_WORDS; i++)
        deep[i] = word_of(~own_number, i);
    stack_t stack = {.ss_sp = room + MAX_THREADS * STACK_BYTES + worker->slot * SIGNAL_STACK_BYTES,
                     .ss_size = SIGNAL_STACK_BYTES};
    if (sigaltstack(&stack, NULL) == -1)
        fail_errno("sigaltstack");
    sem_post(&worker->slept);
    wait_for(&worker->go);
    verify_own("sleep");
    stack.ss_flags = SS_DISABLE;
    sigaltstack(&stack, NULL);
    return (void *)(uintptr_t)word_of(own_number, 7);
}

static void start_worker(struct worker *worker)
{
    static uint64_t newest;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    *worker = (struct worker){.number = ++newest, .slot = (unsigned)(worker - workers)};
    sem_init(&worker->slept, 0, 0);
    sem_init(&worker->go, 0, 0);
    if (pthread_attr_setstack(&attributes, room + worker->slot * STACK_BYTES, STACK_BYTES) != 0 ||
        pthread_create(&worker->thread, &attributes, work, worker) != 0)
        fail("FAILED to start a thread on a stack in the heap");
    pthread_attr_destroy(&attributes);
    wait_for(&worker->slept);
}

static void join_worker(struct worker *worker)
{
    void *result;
    sem_post(&worker->go);
    if (pthread_join(worker->thread, &result) != 0)
        fail("FAILED pthread_join");
    if ((uintptr_t)result != word_of(worker->number, 7))
        fail("MISMATCH thread %lu returned %p", worker->number, result);
}

static void do_signal(void)
{
    unsigned long before = atomic_load(&handled);
    for (unsigned i = 0; i < nthreads; i++)
        if (pthread_kill(workers[i].thread, SIGUSR1) != 0)
            fail("FAILED pthread_kill");
    while (atomic_load(&handled) < before + nthreads)
        sleep_ns(NS_PER_MS);
    reply("\"handled\":%lu", atomic_load(&handled) - before);
}

static void *die_with_mutex(void *argument)
{
    struct worker *worker = argument;
    if (pthread_mutex_lock(robust) != 0)
        fail("FAILED pthread_mutex_lock");
    sem_post(&worker->slept);
    wait_for(&worker->go);
    return NULL;
}

static void do_dead(void)
{
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    pthread_mutex_init(robust, &attributes);
    sem_init(&dead_owner->slept, 0, 0);
    sem_init(&dead_owner->go, 0, 0);
    if (pthread_create(&dead_owner->thread, NULL, die_with_mutex, dead_owner) != 0)
        fail("FAILED pthread_create");
    wait_for(&dead_owner->slept);
    reply("\"locked\":true");
}

static void do_bury(void)
{
    sem_post(&dead_owner->go);
    if (pthread_join(dead_owner->thread, NULL) != 0)
        fail("FAILED pthread_join");
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 3;
    int error = pthread_mutex_timedlock(robust, &until);
    reply("\"owner_dead\":%s,\"error\":%d", error == EOWNERDEAD ? "true" : "false", error);
}

static int *leave_pipe; /* and, behind it, where the thread reads to: shared memory, which nobody takes away */

/* The C library's own way out touches the thread's memory, which brings it back in time. Here the kernel is the first
 * to want it, when it clears the tid word: at a time when it cannot fault. */
static void *leave_at_once(void *argument)
{
    struct worker *worker = argument;
    long number = SYS_read, fd = leave_pipe[0], to = (long)(leave_pipe + 2), size = 1;
    sem_post(&worker->slept);
    __asm__ volatile("syscall\n\tmov %[end], %%eax\n\txor %%edi, %%edi\n\tsyscall"
                     : "+a"(number)
                     : "D"(fd), "S"(to), "d"(size), [end] "i"(SYS_exit)
                     : "rcx", "r11", "memory");
    return NULL;
}

static void open_leave_pipe(void)
{
    if (!leave_pipe)
        leave_pipe = shared_alloc(PAGE);
    if (pipe(leave_pipe) == -1)
        fail_errno("pipe");
}

static void do_leave(void)
{
    open_leave_pipe();
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    struct worker *worker = dead_owner;
    sem_init(&worker->slept, 0, 0);
    if (pthread_attr_setstack(&attributes, room + (MAX_THREADS - 1) * STACK_BYTES, STACK_BYTES) != 0 ||
        pthread_create(&worker->thread, &attributes, leave_at_once, worker) != 0)
        fail("FAILED to start a thread on a stack in the heap");
    pthread_attr_destroy(&attributes);
    wait_for(&worker->slept);
    reply("\"waits\":true");
}

static void do_left(void)
{
    struct timespec until;
    if (write(leave_pipe[1], "x", 1) != 1)
        fail_errno("write");
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 10;
    int error = pthread_timedjoin_np(dead_owner->thread, NULL, &until);
    reply("\"joined\":%s", error == 0 ? "true" : "false");
}

/* Not in the heap: what the kernel wants of this thread there is its tid word alone. */
static char bare_stack[64 * 1024] __attribute__((aligned(16)));
static pid_t bare_tid;

static atomic_int *tid_word(void)
{
    return (atomic_int *)(room + (MAX_THREADS - 1) * STACK_BYTES);
}

static int leave_bare(void *argument)
{
    leave_at_once(argument);
    return 0;
}

static void do_bare(void)
{
    int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_SETTLS |
                CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID;
    open_leave_pipe();
    sem_init(&dead_owner->slept, 0, 0);
    bare_tid = clone(leave_bare, bare_stack + sizeof bare_stack, flags, dead_owner, NULL, tid_word(), tid_word());
    if (bare_tid == -1)
        fail_errno("clone");
    wait_for(&dead_owner->slept);
    reply("\"tid\":%d", (int)bare_tid);
}

static void do_bared(void)
{
    if (write(leave_pipe[1], "x", 1) != 1)
        fail_errno("write");
    while (syscall(SYS_tgkill, getpid(), bare_tid, 0) == 0)
        sleep_ns(NS_PER_MS);
    reply("\"cleared\":%s", atomic_load(tid_word()) == 0 ? "true" : "false");
}

static void do_cycle(uint64_t count)
{
    struct worker *worker = &workers[nthreads];
    for (uint64_t i = 0; i < count; i++) {
        start_worker(worker);
        join_worker(worker);
    }
    reply("\"cycles\":%lu", count);
}

static void init(size_t bytes, uint64_t seed)
{
    size_t room_bytes = MAX_THREADS * (STACK_BYTES + SIGNAL_STACK_BYTES) + MIB;
    heap_init(&heap, bytes + room_bytes, seed, false);
    room = heap.at + bytes / 2;
    workers = (struct worker *)(room + MAX_THREADS * (STACK_BYTES + SIGNAL_STACK_BYTES));
    dead_owner = &workers[MAX_THREADS + 1];
    robust = (pthread_mutex_t *)(room + room_bytes - PAGE);
    memset(room, 0, room_bytes);
}

/* The heap without the room in its middle. */
static void do_sum(size_t bytes)
{
    size_t room_pages = heap.npages - bytes / PAGE;
    for (size_t page = 0; page < heap.npages; page++)
        if (page < bytes / PAGE / 2 || page >= bytes / PAGE / 2 + room_pages)
            heap_verify_page(&heap, page, "sum");
    reply("\"pages\":%zu", bytes / PAGE);
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
    if (mib < 2 || nthreads == 0 || nthreads >= MAX_THREADS)
        fail("--mib must be at least 2 and --threads between 1 and %d", MAX_THREADS - 1);
    init(mib * MIB, seed);
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK | SA_RESTART};
    sigaction(SIGUSR1, &action, NULL);
    reply("\"ready\":true,\"pid\":%d", (int)getpid());
    struct command command;
    while (read_command(&command) && strcmp(command.name, "quit") != 0) {
        const char *name = command.name;
        if (strcmp(name, "start") == 0) {
            for (unsigned i = 0; i < nthreads; i++)
                start_worker(&workers[i]);
            reply("\"threads\":%u", nthreads);
        } else if (strcmp(name, "join") == 0) {
            for (unsigned i = 0; i < nthreads; i++)
                join_worker(&workers[i]);
            reply("\"threads\":%u", nthreads);
        } else if (strcmp(name, "signal") == 0) {
            do_signal();
        } else if (strcmp(name, "dead") == 0) {
            do_dead();
        } else if (strcmp(name, "bury") == 0) {
            do_bury();
        } else if (strcmp(name, "leave") == 0) {
            do_leave();
        } else if (strcmp(name, "left") == 0) {
            do_left();
        } else if (strcmp(name, "bare") == 0) {
            do_bare();
        } else if (strcmp(name, "bared") == 0) {
            do_bared();
        } else if (strcmp(name, "cycle") == 0) {
            do_cycle(command.argument[0]);
        } else if (strcmp(name, "sum") == 0) {
            do_sum(mib * MIB);
        } else {
            reply_error("unknown command");
        }
    }
    reply("\"quit\":true");
    return 0;
}
