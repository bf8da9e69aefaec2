/* A blocking call of calls.c, and those that end by their own time-out. A wait says whether the call returned as it
 * does natively; it knows nothing of threads, rates and figures. */
#ifndef TARGETS_WAITS_H
#define TARGETS_WAITS_H

#include "common.h"
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>

enum outcome { RIGHT, INTERRUPTED, WRONG };

/* A page of private memory for each call: what the kernel reads and writes for it may be away when the call returns. */
union scratch {
    uint64_t value;
    struct timespec times[2];
    struct pollfd poll;
    struct {
        fd_set set;
        struct timeval timeout;
    } select;
    struct epoll_event events[4];
    siginfo_t info;
    struct sembuf sem;
    struct {
        long type;
        uint64_t value;
    } message;
    int status;
    char page[4096];
};

struct call {
    const char *name;
    void (*setup)(struct call *call);
    enum outcome (*wait)(struct call *call);
    void (*fire)(struct call *call, uint64_t number); /* NULL: ends by its own time-out, after duration_ns */
    bool repeat;    /* an event may come before the wait and be lost: fire until it was seen */
    bool on_demand; /* only when asked for by name */

    union scratch *at;
    pthread_t thread;
    uint64_t duration_ns;
    int fd[2], id;
    pid_t child;
    atomic_uint word;
    atomic_ulong handled, handler_runs; /* by a signal handler: number of the newest event */
    uint64_t got;         /* number that the event carried, where it carries one */

    atomic_ulong fired, seen, fired_ns;
    atomic_ulong n, interrupted, wrong, max_late_us;
    int last_result, last_errno;
};

static inline enum outcome judge(struct call *call, long result, bool right)
{
    call->last_result = (int)result;
    call->last_errno = result == -1 ? errno : 0;
    if (right)
        return RIGHT;
    return result == -1 && call->last_errno == EINTR ? INTERRUPTED : WRONG;
}

static inline struct timespec timespec_of(uint64_t ns)
{
    return (struct timespec){.tv_sec = (time_t)(ns / NS_PER_S), .tv_nsec = (long)(ns % NS_PER_S)};
}

static inline void setup_pipe(struct call *call)
{
    if (pipe(call->fd) == -1)
        fail_errno("pipe");
}

static inline enum outcome wait_nanosleep(struct call *call)
{
    call->at->times[0] = timespec_of(call->duration_ns);
    int result = nanosleep(&call->at->times[0], &call->at->times[1]);
    return judge(call, result, result == 0);
}

static inline enum outcome wait_clock_nanosleep(struct call *call)
{
    call->at->times[0] = timespec_of(call->duration_ns);
    errno = clock_nanosleep(CLOCK_MONOTONIC, 0, &call->at->times[0], &call->at->times[1]);
    return judge(call, errno ? -1 : 0, errno == 0);
}

static inline enum outcome wait_clock_nanosleep_until(struct call *call)
{
    call->at->times[0] = timespec_of(now_ns() + call->duration_ns);
    errno = clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &call->at->times[0], NULL);
    return judge(call, errno ? -1 : 0, errno == 0);
}

static inline enum outcome wait_poll_timeout(struct call *call)
{
    call->at->poll = (struct pollfd){.fd = call->fd[0], .events = POLLIN};
    int result = poll(&call->at->poll, 1, (int)(call->duration_ns / NS_PER_MS));
    return judge(call, result, result == 0);
}

static inline enum outcome wait_select_timeout(struct call *call)
{
    FD_ZERO(&call->at->select.set);
    FD_SET(call->fd[0], &call->at->select.set);
    call->at->select.timeout.tv_sec = 0;
    call->at->select.timeout.tv_usec = (suseconds_t)(call->duration_ns / 1000);
    int result = select(call->fd[0] + 1, &call->at->select.set, NULL, NULL, &call->at->select.timeout);
    return judge(call, result, result == 0);
}

static inline void setup_epoll(struct call *call)
{
    setup_pipe(call);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 0xe9011};
    call->id = epoll_create1(0);
    if (call->id == -1 || epoll_ctl(call->id, EPOLL_CTL_ADD, call->fd[0], &event) == -1)
        fail_errno("epoll");
}

static inline enum outcome wait_epoll_timeout(struct call *call)
{
    int result = epoll_wait(call->id, call->at->events, 4, (int)(call->duration_ns / NS_PER_MS));
    return judge(call, result, result == 0);
}

static inline long futex(atomic_uint *word, int operation, unsigned value, const struct timespec *timeout)
{
    return syscall(SYS_futex, word, operation, value, timeout, NULL, 0);
}

static inline enum outcome wait_futex_timeout(struct call *call)
{
    call->at->times[0] = timespec_of(call->duration_ns);
    long result = futex(&call->word, FUTEX_WAIT_PRIVATE, 0, &call->at->times[0]);
    return judge(call, result, result == -1 && errno == ETIMEDOUT);
}

static inline void only_signal(sigset_t *ret, int signal)
{
    sigemptyset(ret);
    sigaddset(ret, signal);
}

static inline enum outcome wait_sigtimedwait(struct call *call)
{
    sigset_t set;
    only_signal(&set, SIGRTMIN + 11);
    struct timespec timeout = timespec_of(call->duration_ns);
    int result = sigtimedwait(&set, &call->at->info, &timeout);
    return judge(call, result, result == -1 && errno == EAGAIN);
}

static inline void setup_sem(struct call *call)
{
    call->id = semget(IPC_PRIVATE, 1, 0600);
    if (call->id == -1)
        fail_errno("semget");
}

static inline enum outcome wait_semtimedop(struct call *call)
{
    struct timespec timeout = timespec_of(call->duration_ns);
    call->at->sem = (struct sembuf){.sem_op = -1};
    int result = semtimedop(call->id, &call->at->sem, 1, &timeout);
    return judge(call, result, result == -1 && errno == EAGAIN);
}

/* Until the child has ended, its parent sleeps where only a fatal signal reaches it. */
static inline enum outcome wait_vfork(struct call *call)
{
    call->at->times[0] = timespec_of(call->duration_ns);
    pid_t pid = vfork();
    if (pid == 0) {
        nanosleep(&call->at->times[0], NULL);
        _exit(7);
    }
    pid_t reaped = pid == -1 ? -1 : waitpid(pid, &call->at->status, 0);
    return judge(call, reaped, reaped == pid && pid > 0 && call->at->status == 7 << 8);
}

static inline void setup_nothing(struct call *call)
{
    (void)call;
}

#endif
