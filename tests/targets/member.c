/* A heap in a program that changes what it is: it joins and leaves a daemon by itself, changes its user, and forbids
 * itself system calls. Replies are JSON lines as those of hold.
 *
 *   member [--mib 16]
 *
 *   sum         verifies every page
 *   leave       calls snapd_leave(); join: snapd_cooperate() with the socket of SNAPD_AGENT_SOCKET; "result" of both
 *   setuid UID  becomes that user for good, as far as the C library knows its threads
 *   filter ON   a seccomp filter that kills for what an agent calls and this program does not: on all threads when ON
 *               is 1, on the calling thread when it is 0
 *   fork        a child verifies every page; answers when it has ended; forkjoin: the child calls snapd_cooperate()
 *   beside ON   a child that does nothing lives on until it is told to end, by ON 0
 *   write N SEED gives N random pages new content
 *   quit        as does the end of input */
#include "content.h"
#include <getopt.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static struct heap heap;

/* Those of libsnapd-agent.so, where it is loaded. */
extern int snapd_cooperate(const char *) __attribute__((weak));
extern int snapd_leave(void) __attribute__((weak));

static void do_filter(bool all)
{
    static const unsigned killed[] = {
        SYS_mremap, SYS_munmap,  SYS_madvise, SYS_mmap,        SYS_ioctl, SYS_socket,    SYS_connect, SYS_close,
        SYS_sendmsg, SYS_recvmsg, SYS_shutdown, SYS_close_range, SYS_exit,  SYS_nanosleep, SYS_ppoll};
    struct sock_filter code[2 * COUNT_OF(killed) + 2];
    size_t n = 0;
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (size_t i = 0; i < COUNT_OF(killed); i++) {
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, killed[i], 0, 1);
        code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    }
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {.len = (unsigned short)n, .filter = code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == -1)
        fail_errno("PR_SET_NO_NEW_PRIVS");
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, all ? SECCOMP_FILTER_FLAG_TSYNC : 0, &program) != 0)
        fail_errno("seccomp");
    reply("\"done\":true");
}

static int join(void)
{
    return snapd_cooperate ? snapd_cooperate(getenv("SNAPD_AGENT_SOCKET")) : -ENOSYS;
}

static void do_fork(bool joins)
{
    int status;
    pid_t pid = fork();
    if (pid == -1)
        fail_errno("fork");
    if (pid == 0) {
        if (joins && join() != 0)
            _exit(1);
        sleep_ns(200 * NS_PER_MS); /* an agent of its own, if it gets one, has begun by now */
        heap_sum(&heap);
        _exit(0);
    }
    if (waitpid(pid, &status, 0) != pid || status != 0)
        fail("the child ended with status %#x", status);
    reply("\"done\":true");
}

static void do_beside(bool on)
{
    static pid_t child;
    if (on) {
        child = fork();
        if (child == -1)
            fail_errno("fork");
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            for (;;)
                pause();
        }
    } else {
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
    }
    reply("\"pid\":%d", (int)child);
}

static void do_write(uint64_t count, uint64_t seed)
{
    struct rng rng = {mix64(seed)};
    for (uint64_t i = 0; i < count; i++)
        heap_renew_page(&heap, rng_below(&rng, heap.npages));
    reply("\"done\":true");
}

static void run_command(const struct command *command)
{
    const char *name = command->name;
    if (strcmp(name, "sum") == 0)
        reply("\"sum\":\"%016lx\"", heap_sum(&heap));
    else if (strcmp(name, "leave") == 0)
        reply("\"result\":%d", snapd_leave ? snapd_leave() : -ENOSYS);
    else if (strcmp(name, "join") == 0)
        reply("\"result\":%d", join());
    else if (strcmp(name, "setuid") == 0)
        reply("\"result\":%d", setuid((uid_t)command->argument[0]));
    else if (strcmp(name, "filter") == 0)
        do_filter(command->argument[0]);
    else if (strcmp(name, "fork") == 0)
        do_fork(false);
    else if (strcmp(name, "forkjoin") == 0)
        do_fork(true);
    else if (strcmp(name, "beside") == 0)
        do_beside(command->argument[0]);
    else if (strcmp(name, "write") == 0)
        do_write(command->argument[0], command->argument[1]);
    else
        reply_error("unknown command");
}

int main(int argc, char **argv)
{
    static const struct option known[] = {{"mib", 1, NULL, 'm'}, {0}};
    uint64_t mib = 16;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        if (option != 'm')
            return 2;
        mib = parse_number("--mib", optarg);
    }
    if (mib == 0)
        fail("--mib must be positive");
    heap_init(&heap, mib * MIB, 1, false);
    reply("\"ready\":true");
    struct command command;
    while (read_command(&command)) {
        if (strcmp(command.name, "quit") == 0)
            break;
        run_command(&command);
    }
    reply("\"quit\":true");
    return 0;
}
