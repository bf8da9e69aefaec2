/* The blocking calls of calls.c that end by an event: for each its set-up, one wait, and the event. The driver fires
 * them; they know nothing of threads, rates and figures. */
#ifndef TARGETS_EVENTS_H
#define TARGETS_EVENTS_H

#include "waits.h"

static inline void fire_pipe(struct call *call, uint64_t number)
{
    if (write(call->fd[1], &number, sizeof number) != sizeof number)
        fail_errno("write of an event");
}

static inline enum outcome take_number(struct call *call, int fd)
{
    ssize_t got = read(fd, call->at, sizeof call->at->value);
    call->got = call->at->value;
    return judge(call, got, got == sizeof call->at->value);
}

static inline enum outcome wait_poll(struct call *call)
{
    call->at->poll = (struct pollfd){.fd = call->fd[0], .events = POLLIN};
    int result = poll(&call->at->poll, 1, -1);
    if (result != 1 || call->at->poll.revents != POLLIN)
        return judge(call, result, false);
    return take_number(call, call->fd[0]);
}

static inline enum outcome wait_select(struct call *call)
{
    FD_ZERO(&call->at->select.set);
    FD_SET(call->fd[0], &call->at->select.set);
    int result = select(call->fd[0] + 1, &call->at->select.set, NULL, NULL, NULL);
    if (result != 1 || !FD_ISSET(call->fd[0], &call->at->select.set))
        return judge(call, result, false);
    return take_number(call, call->fd[0]);
}

static inline enum outcome wait_epoll(struct call *call)
{
    int result = epoll_wait(call->id, call->at->events, 4, -1);
    if (result != 1 || call->at->events[0].events != EPOLLIN || call->at->events[0].data.u64 != 0xe9011)
        return judge(call, result, false);
    return take_number(call, call->fd[0]);
}

static inline enum outcome wait_futex_for(struct call *call, const struct timespec *timeout)
{
    unsigned seen = (unsigned)atomic_load(&call->seen);
    long result = futex(&call->word, FUTEX_WAIT_PRIVATE, seen, timeout);
    int error = errno;
    call->got = atomic_load(&call->word);
    bool changed = call->got != seen;
    errno = error;
    return judge(call, result, changed && (result == 0 || error == EAGAIN));
}

static inline enum outcome wait_futex(struct call *call)
{
    return wait_futex_for(call, NULL);
}

static inline enum outcome wait_futex_bounded(struct call *call)
{
    call->at->times[0] = timespec_of(100 * NS_PER_S);
    return wait_futex_for(call, &call->at->times[0]);
}

static inline void fire_futex(struct call *call, uint64_t number)
{
    atomic_store(&call->word, (unsigned)number);
    futex(&call->word, FUTEX_WAKE_PRIVATE, 1, NULL);
}

static inline enum outcome wait_read(struct call *call)
{
    return take_number(call, call->fd[0]);
}

/* An empty name asks the kernel for an unused abstract one. */
static inline void setup_accept(struct call *call)
{
    struct sockaddr_un name = {.sun_family = AF_UNIX};
    call->fd[0] = socket(AF_UNIX, SOCK_STREAM, 0);
    if (call->fd[0] == -1 || bind(call->fd[0], (struct sockaddr *)&name, sizeof name.sun_family) == -1 ||
        listen(call->fd[0], 8) == -1)
        fail_errno("making a listening socket");
}

static inline enum outcome wait_accept(struct call *call)
{
    int fd = accept(call->fd[0], NULL, NULL);
    if (fd == -1)
        return judge(call, fd, false);
    enum outcome outcome;
    do
        outcome = take_number(call, fd);
    while (outcome == INTERRUPTED);
    close(fd);
    return outcome;
}

static inline void fire_accept(struct call *call, uint64_t number)
{
    struct sockaddr_un name;
    socklen_t length = sizeof name;
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd == -1 || getsockname(call->fd[0], (struct sockaddr *)&name, &length) == -1 ||
        connect(fd, (struct sockaddr *)&name, length) == -1 || write(fd, &number, sizeof number) != sizeof number)
        fail_errno("connecting");
    close(fd);
}

static inline void setup_socketpair(struct call *call)
{
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, call->fd) == -1)
        fail_errno("socketpair");
}

/* A socket with a time-out is one of those that the kernel does not restart after a stop. */
static inline void setup_socketpair_with_timeout(struct call *call)
{
    struct timeval timeout = {.tv_sec = 100};
    setup_socketpair(call);
    if (setsockopt(call->fd[0], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout) == -1)
        fail_errno("SO_RCVTIMEO");
}

static inline enum outcome wait_recv(struct call *call)
{
    ssize_t got = recv(call->fd[0], call->at, sizeof call->at->value, 0);
    call->got = call->at->value;
    return judge(call, got, got == sizeof call->at->value);
}

static inline enum outcome wait_sigwaitinfo(struct call *call)
{
    sigset_t set;
    only_signal(&set, SIGRTMIN + 10);
    int result = sigwaitinfo(&set, &call->at->info);
    call->got = (uint64_t)call->at->info.si_value.sival_ptr;
    return judge(call, result, result == SIGRTMIN + 10 && call->at->info.si_code == SI_QUEUE);
}

static inline void fire_sigwaitinfo(struct call *call, uint64_t number)
{
    if (pthread_sigqueue(call->thread, SIGRTMIN + 10, (union sigval){.sival_ptr = (void *)number}) != 0)
        fail("FAILED pthread_sigqueue");
}

static inline enum outcome wait_semop(struct call *call)
{
    call->at->sem = (struct sembuf){.sem_op = -1};
    int result = semop(call->id, &call->at->sem, 1);
    call->got = atomic_load(&call->seen) + 1;
    return judge(call, result, result == 0);
}

static inline void fire_semop(struct call *call, uint64_t number)
{
    (void)number;
    struct sembuf up = {.sem_op = 1};
    if (semop(call->id, &up, 1) == -1)
        fail_errno("semop");
}

static inline void setup_msg(struct call *call)
{
    call->id = msgget(IPC_PRIVATE, 0600);
    if (call->id == -1)
        fail_errno("msgget");
}

static inline enum outcome wait_msgrcv(struct call *call)
{
    ssize_t got = msgrcv(call->id, &call->at->message, sizeof(uint64_t), 0, 0);
    call->got = call->at->message.value;
    return judge(call, got, got == sizeof(uint64_t));
}

static inline void fire_msgrcv(struct call *call, uint64_t number)
{
    struct {
        long type;
        uint64_t value;
    } message = {1, number};
    if (msgsnd(call->id, &message, sizeof number, 0) == -1)
        fail_errno("msgsnd");
}

/* Every fourth child is killed, the others end with an odd status of their own. */
static inline bool child_status_right(uint64_t number, int status)
{
    if (number % 4 == 0)
        return WIFSIGNALED(status) && WTERMSIG(status) == (number % 8 ? SIGKILL : SIGTERM);
    return WIFEXITED(status) && WEXITSTATUS(status) == (int)((number * 2 + 1) & 0xff);
}

__attribute__((noreturn)) static inline void child_of_waitpid(const struct call *call, pid_t parent)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(0);
    uint64_t number;
    if (read(call->fd[0], &number, sizeof number) != sizeof number)
        fail_errno("read in a child");
    if (number % 4 == 0) {
        int signal = number % 8 ? SIGKILL : SIGTERM;
        sigset_t set;
        only_signal(&set, signal);
        sigprocmask(SIG_UNBLOCK, &set, NULL);
        kill(getpid(), signal);
    }
    _exit((int)((number * 2 + 1) & 0xff));
}

static inline enum outcome wait_waitpid(struct call *call)
{
    pid_t self = getpid();
    if (!call->child) {
        call->child = fork();
        if (call->child == -1)
            fail_errno("fork");
        if (call->child == 0)
            child_of_waitpid(call, self);
    }
    pid_t pid = waitpid(call->child, &call->at->status, 0);
    if (pid != call->child)
        return judge(call, pid, false);
    call->child = 0;
    call->got = atomic_load(&call->seen) + 1;
    return judge(call, call->at->status, child_status_right(call->got, call->at->status));
}

static struct call *paused, *suspended;

static inline void on_pause_signal(int signal)
{
    struct call *call = signal == SIGUSR1 ? paused : suspended;
    atomic_store(&call->handled, atomic_load(&call->fired));
    atomic_fetch_add(&call->handler_runs, 1);
}

static inline void handle(int signal, void (*handler)(int))
{
    struct sigaction action = {.sa_handler = handler};
    sigaction(signal, &action, NULL);
}

static inline enum outcome handler_ran(struct call *call, int result)
{
    call->got = atomic_load(&call->handled);
    return judge(call, result, result == -1 && errno == EINTR && call->got > atomic_load(&call->seen));
}

static inline void setup_pause(struct call *call)
{
    paused = call;
    handle(SIGUSR1, on_pause_signal);
}

/* The signal may come before pause() is called: then only a later one ends it, which is why it is sent repeatedly; and
 * so the next pause() may be ended by one that is left over. */
static inline enum outcome wait_pause(struct call *call)
{
    unsigned long runs;
    int result;
    sigset_t set;
    only_signal(&set, SIGUSR1);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    do {
        runs = atomic_load(&call->handler_runs);
        result = pause();
    } while (result == -1 && errno == EINTR && atomic_load(&call->handler_runs) > runs &&
             atomic_load(&call->handled) <= atomic_load(&call->seen));
    return handler_ran(call, result);
}

static inline void fire_pause(struct call *call, uint64_t number)
{
    (void)number;
    pthread_kill(call->thread, SIGUSR1);
}

static inline void setup_sigsuspend(struct call *call)
{
    suspended = call;
    handle(SIGUSR2, on_pause_signal);
}

static inline enum outcome wait_sigsuspend(struct call *call)
{
    sigset_t set;
    sigfillset(&set);
    sigdelset(&set, SIGUSR2);
    int result = sigsuspend(&set);
    return handler_ran(call, result);
}

static inline void fire_sigsuspend(struct call *call, uint64_t number)
{
    (void)number;
    pthread_kill(call->thread, SIGUSR2);
}

#endif
