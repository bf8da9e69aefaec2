/* Threads that end while they hold robust futexes in the middle of a large verified heap. A thread that ends can no
 * longer fault: what the kernel reads and marks then must be in memory. Replies are JSON lines as those of hold.
 *
 *   robust [--mib 32] [--seed 1]
 *
 *   lock N           a thread takes N robust mutexes, each on a page of its own, every second with priority inheritance
 *   die              that thread ends; "owner_dead" counts the mutexes that the next owner gets with EOWNERDEAD
 *   raw LATE         a thread without libc has a list of its own: its head, an entry, the entry's futex, and the futex
 *                    of an entry that is just being taken are on four pages. With LATE it tells the kernel only when
 *                    told to by tell, and touches nothing of it then
 *   tell             see there
 *   pages            "addresses" of these
 *   end              that thread ends; "marked" counts the futexes (of two) that the kernel has marked
 *   rseq             a thread without libc has the kernel note its CPU on a page of the heap, again and again
 *   unrseq           that thread ends; "cpu_id" is what was noted, "rounds" how often it looked
 *   sum              verifies every page of the heap
 *   quit             as does the end of input */
#include "content.h"
#include <getopt.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <sys/syscall.h>

#define MAX_MUTEXES 64
#define STRIDE 4 /* pages from one to the next */
#define ROOM_PAGES ((MAX_MUTEXES + 8) * STRIDE)
#define STACK_BYTES (64 * 1024)
#define RSEQ_SIGNATURE 0x53053053

struct rseq_area { /* the kernel's struct rseq of 32 bytes */
    uint32_t cpu_id_start, cpu_id;
    uint64_t critical_section;
    uint32_t flags, node_id, mm_cid, padding;
} __attribute__((aligned(32)));

/* In shared memory, which nobody moves. */
struct raw {
    atomic_uint tell, told, end;
    unsigned tid; /* the kernel clears it at the thread's end */
    atomic_ulong rounds;
    uint32_t cpu_id;
};

static struct heap heap;
static size_t own_pages;
static char *room;
static struct owner {
    pthread_t thread;
    sem_t locked, go;
    size_t count;
} *owner;
static struct raw *raw, *rseq;

static char *room_page(size_t number)
{
    return room + number * STRIDE * PAGE;
}

static pthread_mutex_t *mutex(size_t number)
{
    return (pthread_mutex_t *)(room_page(number) + 512);
}

static struct robust_list_head *head(void)
{
    return (struct robust_list_head *)room_page(MAX_MUTEXES);
}

static struct robust_list *entry(bool pending)
{
    return (struct robust_list *)room_page(MAX_MUTEXES + (pending ? 2 : 1));
}

#define FUTEX_OFFSET (2 * STRIDE * (long)PAGE)
static atomic_uint *word(bool pending)
{
    return (atomic_uint *)((char *)entry(pending) + FUTEX_OFFSET);
}

static struct rseq_area *area(void)
{
    return (struct rseq_area *)room_page(MAX_MUTEXES + 6);
}

static void *hold_and_die(void *argument)
{
    for (size_t i = 0; i < owner->count; i++)
        if (pthread_mutex_lock(mutex(i)) != 0)
            fail("FAILED pthread_mutex_lock");
    sem_post(&owner->locked);
    while (sem_wait(&owner->go) == -1) {
    }
    return argument;
}

static void do_lock(size_t count)
{
    if (count == 0 || count > MAX_MUTEXES)
        fail("lock wants 1 to %d mutexes", MAX_MUTEXES);
    for (size_t i = 0; i < count; i++) {
        pthread_mutexattr_t attributes;
        pthread_mutexattr_init(&attributes);
        pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
        pthread_mutexattr_setprotocol(&attributes, i % 2 ? PTHREAD_PRIO_INHERIT : PTHREAD_PRIO_NONE);
        memset(mutex(i), 0, sizeof(pthread_mutex_t));
        if (pthread_mutex_init(mutex(i), &attributes) != 0)
            fail("FAILED pthread_mutex_init");
    }
    owner->count = count;
    sem_init(&owner->locked, 0, 0);
    sem_init(&owner->go, 0, 0);
    if (pthread_create(&owner->thread, NULL, hold_and_die, NULL) != 0)
        fail("FAILED pthread_create");
    while (sem_wait(&owner->locked) == -1) {
    }
    reply("\"locked\":%zu", count);
}

static void do_die(void)
{
    size_t owner_dead = 0;
    sem_post(&owner->go);
    if (pthread_join(owner->thread, NULL) != 0)
        fail("FAILED pthread_join");
    for (size_t i = 0; i < owner->count; i++) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_nsec += 100 * NS_PER_MS;
        if (until.tv_nsec >= (long)NS_PER_S) {
            until.tv_nsec -= NS_PER_S;
            until.tv_sec++;
        }
        if (pthread_mutex_timedlock(mutex(i), &until) == EOWNERDEAD) {
            owner_dead++;
            pthread_mutex_consistent(mutex(i));
            pthread_mutex_unlock(mutex(i));
        }
    }
    reply("\"owner_dead\":%zu", owner_dead);
}

static void wait_for_word(atomic_uint *at)
{
    while (!atomic_load(at))
        syscall(SYS_futex, at, FUTEX_WAIT, 0, NULL, NULL, 0);
}

static void set_word(atomic_uint *at)
{
    atomic_store(at, 1);
    syscall(SYS_futex, at, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static int run_raw(void *argument)
{
    bool late = argument != NULL;
    if (late)
        wait_for_word(&raw->tell);
    syscall(SYS_set_robust_list, head(), sizeof *head());
    set_word(&raw->told);
    wait_for_word(&raw->end);
    syscall(SYS_exit, 0);
    return 0;
}

static int run_rseq(void *argument)
{
    const volatile struct rseq_area *noted = area();
    if (syscall(SYS_rseq, area(), sizeof *area(), 0, RSEQ_SIGNATURE) == -1)
        fail_errno("rseq");
    set_word(&rseq->told);
    while (!atomic_load(&rseq->end)) {
        struct timespec ms = {.tv_nsec = NS_PER_MS};
        syscall(SYS_nanosleep, &ms, NULL);
        if (atomic_fetch_add(&rseq->rounds, 1) % 100 == 99)
            rseq->cpu_id = noted->cpu_id;
    }
    rseq->cpu_id = noted->cpu_id;
    syscall(SYS_rseq, area(), sizeof *area(), 1, RSEQ_SIGNATURE);
    syscall(SYS_exit, 0);
    return (int)(uintptr_t)argument;
}

/* A thread that libc does not know: it has no TLS of its own, and must not use any. */
static void start_raw(struct raw *ret, int (*run)(void *), void *argument)
{
    static char stacks[2][STACK_BYTES] __attribute__((aligned(16))); /* far from the heap */
    char *stack = stacks[ret == rseq];
    memset(ret, 0, sizeof *ret);
    int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM |
                CLONE_PARENT_SETTID | CLONE_CHILD_CLEARTID;
    if (clone(run, stack + STACK_BYTES, flags, argument, &ret->tid, NULL, &ret->tid) == -1)
        fail_errno("clone");
}

static void end_raw(struct raw *thread)
{
    unsigned tid = thread->tid;
    set_word(&thread->end);
    while (tid && *(volatile unsigned *)&thread->tid == tid)
        syscall(SYS_futex, &thread->tid, FUTEX_WAIT, tid, NULL, NULL, 0);
}

static void do_raw(bool late)
{
    *head() = (struct robust_list_head){.list.next = entry(false), .futex_offset = FUTEX_OFFSET,
                                        .list_op_pending = entry(true)};
    entry(false)->next = &head()->list;
    entry(true)->next = NULL;
    start_raw(raw, run_raw, late ? raw : NULL);
    atomic_store(word(false), raw->tid);
    atomic_store(word(true), raw->tid);
    if (!late)
        wait_for_word(&raw->told);
    reply("\"tid\":%u", raw->tid);
}

static void do_end(void)
{
    end_raw(raw);
    bool marked[2] = {atomic_load(word(false)) & FUTEX_OWNER_DIED, atomic_load(word(true)) & FUTEX_OWNER_DIED};
    reply("\"marked\":%d", marked[0] + marked[1]);
}

static void do_sum(void)
{
    for (size_t page = 0; page < heap.npages; page++)
        if (page < own_pages / 2 || page >= own_pages / 2 + ROOM_PAGES)
            heap_verify_page(&heap, page, "sum");
    reply("\"pages\":%zu", own_pages);
}

static void run_command(const struct command *command)
{
    const char *name = command->name;
    if (strcmp(name, "lock") == 0) {
        do_lock(command->argument[0]);
    } else if (strcmp(name, "die") == 0) {
        do_die();
    } else if (strcmp(name, "raw") == 0) {
        do_raw(command->argument[0]);
    } else if (strcmp(name, "tell") == 0) {
        set_word(&raw->tell);
        wait_for_word(&raw->told);
        reply("\"told\":true");
    } else if (strcmp(name, "pages") == 0) {
        reply("\"addresses\":[%lu,%lu,%lu,%lu]", (uintptr_t)head(), (uintptr_t)entry(false), (uintptr_t)word(false),
              (uintptr_t)word(true));
    } else if (strcmp(name, "end") == 0) {
        do_end();
    } else if (strcmp(name, "rseq") == 0) {
        start_raw(rseq, run_rseq, NULL);
        wait_for_word(&rseq->told);
        reply("\"tid\":%u", rseq->tid);
    } else if (strcmp(name, "unrseq") == 0) {
        end_raw(rseq);
        reply("\"cpu_id\":%d,\"rounds\":%lu", (int)rseq->cpu_id, atomic_load(&rseq->rounds));
    } else if (strcmp(name, "sum") == 0) {
        do_sum();
    } else {
        reply_error("unknown command");
    }
}

int main(int argc, char **argv)
{
    static const struct option known[] = {{"mib", 1, NULL, 'm'}, {"seed", 1, NULL, 's'}, {0}};
    uint64_t mib = 32, seed = 1;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 'm': mib = parse_number("--mib", optarg); break;
        case 's': seed = parse_number("--seed", optarg); break;
        default: return 2;
        }
    }
    if (mib == 0)
        fail("--mib must be positive");
    own_pages = mib * MIB / PAGE;
    heap_init(&heap, (own_pages + ROOM_PAGES) * PAGE, seed, false);
    room = heap.at + own_pages / 2 * PAGE;
    memset(room, 0xff, ROOM_PAGES * PAGE);
    owner = shared_alloc(sizeof *owner);
    raw = shared_alloc(sizeof *raw);
    rseq = shared_alloc(sizeof *rseq);
    reply("\"ready\":true,\"pid\":%d", (int)getpid());
    struct command command;
    while (read_command(&command) && strcmp(command.name, "quit") != 0)
        run_command(&command);
    reply("\"quit\":true");
    return 0;
}
