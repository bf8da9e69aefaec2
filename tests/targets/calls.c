/* Threads that sit in blocking calls, one call each, and a driver that ends them at known times: whatever returns that
 * would not return natively is counted, EINTR apart and by call. Beside them signals with sequence numbers, which must
 * arrive once and in order, children with odd exit statuses, and a verified heap that is worth dumping.
 *
 *   calls [--seconds 10] [--mib 32] [--only NAME,...] [--tolerance-ms 500] [--list]
 *
 * One JSON line at the end: "calls" by name with "n", "eintr", "wrong" and "max_late_us"; "signals"; "eintr" is the
 * sum. Exit status 1 where anything but an EINTR was wrong, with "first" saying what; SIGTERM and SIGINT end it early.
 * The call "vfork" runs only when it is asked for by --only: while it sleeps no debugger can stop its thread. */
#include "content.h"
#include "events.h"
#include <getopt.h>
#include <sched.h>
#include <sys/resource.h>

#define SIGNALS 8
#define SIGNALS_IN_FLIGHT 256
#define HANG_NS (20 * NS_PER_S)

static struct call calls[] = {
    {.name = "nanosleep", .setup = setup_nothing, .wait = wait_nanosleep},
    {.name = "clock_nanosleep", .setup = setup_nothing, .wait = wait_clock_nanosleep},
    {.name = "clock_nanosleep_until", .setup = setup_nothing, .wait = wait_clock_nanosleep_until},
    {.name = "poll_timeout", .setup = setup_pipe, .wait = wait_poll_timeout},
    {.name = "poll", .setup = setup_pipe, .wait = wait_poll, .fire = fire_pipe},
    {.name = "select_timeout", .setup = setup_pipe, .wait = wait_select_timeout},
    {.name = "select", .setup = setup_pipe, .wait = wait_select, .fire = fire_pipe},
    {.name = "epoll_wait_timeout", .setup = setup_epoll, .wait = wait_epoll_timeout},
    {.name = "epoll_wait", .setup = setup_epoll, .wait = wait_epoll, .fire = fire_pipe},
    {.name = "futex_timeout", .setup = setup_nothing, .wait = wait_futex_timeout},
    {.name = "futex", .setup = setup_nothing, .wait = wait_futex, .fire = fire_futex},
    {.name = "futex_bounded", .setup = setup_nothing, .wait = wait_futex_bounded, .fire = fire_futex},
    {.name = "read", .setup = setup_pipe, .wait = wait_read, .fire = fire_pipe},
    {.name = "accept", .setup = setup_accept, .wait = wait_accept, .fire = fire_accept},
    {.name = "recv", .setup = setup_socketpair, .wait = wait_recv, .fire = fire_pipe},
    {.name = "recv_rcvtimeo", .setup = setup_socketpair_with_timeout, .wait = wait_recv, .fire = fire_pipe},
    {.name = "sigtimedwait", .setup = setup_nothing, .wait = wait_sigtimedwait},
    {.name = "sigwaitinfo", .setup = setup_nothing, .wait = wait_sigwaitinfo, .fire = fire_sigwaitinfo},
    {.name = "semop", .setup = setup_sem, .wait = wait_semop, .fire = fire_semop},
    {.name = "semtimedop", .setup = setup_sem, .wait = wait_semtimedop},
    {.name = "msgrcv", .setup = setup_msg, .wait = wait_msgrcv, .fire = fire_msgrcv},
    {.name = "waitpid", .setup = setup_pipe, .wait = wait_waitpid, .fire = fire_pipe},
    {.name = "pause", .setup = setup_pause, .wait = wait_pause, .fire = fire_pause, .repeat = true},
    {.name = "sigsuspend", .setup = setup_sigsuspend, .wait = wait_sigsuspend, .fire = fire_sigsuspend},
    {.name = "vfork", .setup = setup_nothing, .wait = wait_vfork, .on_demand = true},
};

static uint64_t tolerance_ns = 500 * NS_PER_MS;
static struct heap heap;
static atomic_bool stop, ended;
static atomic_flag first_taken = ATOMIC_FLAG_INIT;
static char first[200];
static atomic_ulong errors;

static atomic_ulong signals_sent, signals_received, signals_wrong;
static uint64_t signal_last[SIGNALS];

__attribute__((format(printf, 1, 2))) static void wrong(const char *format, ...)
{
    atomic_fetch_add(&errors, 1);
    if (atomic_flag_test_and_set(&first_taken))
        return;
    va_list args;
    va_start(args, format);
    vsnprintf(first, sizeof first, format, args);
    va_end(args);
}

static void late_by(struct call *call, uint64_t late_ns)
{
    if (late_ns / 1000 > atomic_load(&call->max_late_us))
        atomic_store(&call->max_late_us, late_ns / 1000);
    if (late_ns > tolerance_ns) {
        atomic_fetch_add(&call->wrong, 1);
        wrong("%s returned %lu us late", call->name, late_ns / 1000);
    }
}

static void judge_timed(struct call *call, uint64_t took_ns)
{
    /* poll and epoll_wait round up to a millisecond or a tick, never down. */
    if (took_ns < call->duration_ns) {
        atomic_fetch_add(&call->wrong, 1);
        wrong("%s returned %lu us early", call->name, (call->duration_ns - took_ns) / 1000);
    } else {
        late_by(call, took_ns - call->duration_ns);
    }
}

static void judge_event(struct call *call)
{
    uint64_t number = atomic_load(&call->seen) + 1;
    if (call->got != number || atomic_load(&call->fired) < number) {
        atomic_fetch_add(&call->wrong, 1);
        wrong("%s returned event %lu instead of %lu", call->name, call->got, number);
    } else if (!call->repeat) {
        late_by(call, now_ns() - atomic_load(&call->fired_ns));
    }
    atomic_store(&call->seen, number);
}

static void *run_call(void *argument)
{
    struct call *call = argument;
    struct rng rng = {mix64((uint64_t)(call - calls))};
    while (!atomic_load(&ended)) {
        call->duration_ns = (5 + rng_below(&rng, 45)) * NS_PER_MS;
        uint64_t start_ns = now_ns();
        enum outcome outcome = call->wait(call);
        uint64_t took_ns = now_ns() - start_ns;
        if (outcome == INTERRUPTED) {
            atomic_fetch_add(&call->interrupted, 1);
            continue;
        }
        if (outcome == WRONG) {
            atomic_fetch_add(&call->wrong, 1);
            wrong("%s returned %d, errno %d", call->name, call->last_result, call->last_errno);
            continue;
        }
        if (call->fire)
            judge_event(call);
        else
            judge_timed(call, took_ns);
        atomic_fetch_add(&call->n, 1);
    }
    return NULL;
}

static bool pending(const struct call *call)
{
    return atomic_load(&call->fired) != atomic_load(&call->seen);
}

/* One event at a time for each call, so that nothing ever waits in a queue and the delay is the call's own. */
static void drive(struct call *call)
{
    uint64_t now = now_ns();
    if (pending(call)) {
        if (now - atomic_load(&call->fired_ns) > HANG_NS)
            fail("FAILED %s did not return within %llu s of its event", call->name, HANG_NS / NS_PER_S);
        if (call->repeat)
            call->fire(call, atomic_load(&call->fired));
        return;
    }
    if (atomic_load(&stop))
        return;
    uint64_t number = atomic_load(&call->fired) + 1;
    atomic_store(&call->fired_ns, now);
    atomic_store(&call->fired, number);
    call->fire(call, number);
}

static void on_numbered_signal(int signal, siginfo_t *info, void *context)
{
    (void)context;
    unsigned which = (unsigned)(signal - SIGRTMIN);
    uint64_t number = (uint64_t)info->si_value.sival_ptr;
    int saved = errno;
    if (number != signal_last[which] + 1 || info->si_code != SI_QUEUE || info->si_pid != getpid()) {
        atomic_fetch_add(&signals_wrong, 1);
        wrong("signal SIGRTMIN+%u number %lu after %lu", which, number, signal_last[which]);
    }
    signal_last[which] = number;
    atomic_fetch_add(&signals_received, 1);
    errno = saved;
}

/* The only thread that takes these signals; they meet it computing as well as asleep. */
static void *receive_signals(void *argument)
{
    sigset_t set;
    sigemptyset(&set);
    for (unsigned i = 0; i < SIGNALS; i++)
        sigaddset(&set, SIGRTMIN + (int)i);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    struct rng rng = {7};
    while (!atomic_load(&ended)) {
        heap_verify_page(&heap, rng_below(&rng, heap.npages), "signals");
        struct timespec ms = {.tv_nsec = NS_PER_MS};
        nanosleep(&ms, NULL);
    }
    return argument;
}

static void *send_signals(void *argument)
{
    uint64_t number[SIGNALS] = {0};
    struct rng rng = {8};
    while (!atomic_load(&stop)) {
        for (uint64_t i = rng_below(&rng, 24); i-- > 0;) {
            unsigned which = (unsigned)rng_below(&rng, SIGNALS);
            if (atomic_load(&signals_sent) - atomic_load(&signals_received) > SIGNALS_IN_FLIGHT)
                break;
            union sigval value = {.sival_ptr = (void *)(number[which] + 1)};
            if (sigqueue(getpid(), SIGRTMIN + (int)which, value) == -1) {
                if (errno != EAGAIN)
                    fail_errno("sigqueue");
                break;
            }
            number[which]++;
            atomic_fetch_add(&signals_sent, 1);
        }
        sleep_ns(rng_below(&rng, 2 * NS_PER_MS));
    }
    return argument;
}

static void start_thread(pthread_t *ret, void *(*run)(void *), void *argument)
{
    if (pthread_create(ret, NULL, run, argument) != 0)
        fail("FAILED pthread_create");
}

static bool chosen(const struct call *call, const char *only)
{
    if (!only)
        return !call->on_demand;
    size_t length = strlen(call->name);
    for (const char *at = only; (at = strstr(at, call->name)); at += length)
        if ((at == only || at[-1] == ',') && (at[length] == '\0' || at[length] == ','))
            return true;
    return false;
}

static void start_calls(const char *only)
{
    char *pages = heap_alloc(COUNT_OF(calls) * sizeof(union scratch));
    for (size_t i = 0; i < COUNT_OF(calls); i++) {
        struct call *call = &calls[i];
        if (!chosen(call, only))
            continue;
        call->at = (union scratch *)(pages + i * sizeof(union scratch));
        call->setup(call);
        start_thread(&call->thread, run_call, call);
    }
}

/* Who waits for what is removed here returns at once: the figures must have been taken before. */
static void remove_queues(void)
{
    for (size_t i = 0; i < COUNT_OF(calls); i++) {
        if (calls[i].at && calls[i].setup == setup_sem)
            semctl(calls[i].id, 0, IPC_RMID);
        if (calls[i].at && calls[i].setup == setup_msg)
            msgctl(calls[i].id, IPC_RMID, NULL);
    }
}

static bool all_arrived(void)
{
    for (size_t i = 0; i < COUNT_OF(calls); i++)
        if (calls[i].at && pending(&calls[i]))
            return false;
    return atomic_load(&signals_sent) == atomic_load(&signals_received);
}

static void run(const sigset_t *end_signals, uint64_t deadline_ns)
{
    struct rng rng = {9};
    uint64_t give_up_ns = 0;
    while (!atomic_load(&stop) || !all_arrived()) {
        for (size_t i = 0; i < COUNT_OF(calls); i++)
            if (calls[i].at && calls[i].fire && (atomic_load(&stop) || rng_below(&rng, 2)))
                drive(&calls[i]);
        heap_verify_page(&heap, rng_below(&rng, heap.npages), "waiting");
        struct timespec tick = timespec_of(NS_PER_MS + rng_below(&rng, 8 * NS_PER_MS));
        bool asked = sigtimedwait(end_signals, NULL, &tick) > 0;
        if (!atomic_load(&stop) && (asked || now_ns() >= deadline_ns)) {
            atomic_store(&stop, true);
            give_up_ns = now_ns() + HANG_NS;
        }
        if (give_up_ns && now_ns() > give_up_ns)
            fail("FAILED %lu signals were sent and %lu arrived", atomic_load(&signals_sent),
                 atomic_load(&signals_received));
    }
    atomic_store(&ended, true);
}

static void print_result(double seconds)
{
    uint64_t interrupted = 0;
    const char *separator = "";
    printf("{\"target\":\"calls\",\"calls\":{");
    for (size_t i = 0; i < COUNT_OF(calls); i++) {
        struct call *call = &calls[i];
        if (!call->at)
            continue;
        interrupted += atomic_load(&call->interrupted);
        printf("%s\"%s\":{\"n\":%lu,\"eintr\":%lu,\"wrong\":%lu,\"max_late_us\":%lu}", separator, call->name,
               atomic_load(&call->n), atomic_load(&call->interrupted), atomic_load(&call->wrong),
               atomic_load(&call->max_late_us));
        separator = ",";
    }
    printf("},\"signals\":{\"sent\":%lu,\"received\":%lu,\"wrong\":%lu},\"eintr\":%lu,\"errors\":%lu,"
           "\"first\":\"%s\",\"seconds\":%.3f}\n",
           atomic_load(&signals_sent), atomic_load(&signals_received), atomic_load(&signals_wrong), interrupted,
           atomic_load(&errors), first, seconds);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    static const struct option known[] = {{"seconds", 1, NULL, 's'}, {"mib", 1, NULL, 'm'},  {"only", 1, NULL, 'o'},
                                          {"list", 0, NULL, 'l'},    {"tolerance-ms", 1, NULL, 't'}, {0}};
    uint64_t seconds = 10, mib = 32;
    const char *only = NULL;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 's': seconds = parse_number("--seconds", optarg); break;
        case 'm': mib = parse_number("--mib", optarg); break;
        case 'o': only = optarg; break;
        case 't': tolerance_ns = parse_number("--tolerance-ms", optarg) * NS_PER_MS; break;
        case 'l':
            for (size_t i = 0; i < COUNT_OF(calls); i++)
                puts(calls[i].name);
            return 0;
        default: return 2;
        }
    }
    if (mib == 0)
        fail("--mib must be positive");

    /* Where it is allowed, queues and semaphores then vanish with the process, however it ends. */
    (void)unshare(CLONE_NEWIPC);
    heap_init(&heap, mib * MIB, 1, false);
    for (int i = 0; i < SIGNALS; i++) {
        struct sigaction action = {.sa_sigaction = on_numbered_signal, .sa_flags = SA_SIGINFO};
        sigaction(SIGRTMIN + i, &action, NULL);
    }
    /* Every thread blocks every signal but the one it is there for: so no EINTR has a native cause. */
    sigset_t all, end_signals = block_end_signals();
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    start_calls(only);
    pthread_t sender, receiver;
    start_thread(&receiver, receive_signals, NULL);
    start_thread(&sender, send_signals, NULL);
    reply("\"ready\":true,\"pid\":%d", (int)getpid());

    uint64_t start_ns = now_ns();
    run(&end_signals, start_ns + seconds * NS_PER_S);
    heap_sum(&heap);
    print_result((double)(now_ns() - start_ns) / 1e9);
    int status = atomic_load(&errors) ? 1 : 0;
    remove_queues();
    _exit(status);
}
