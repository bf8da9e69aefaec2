/* A program with an agent of its own, in one thread, that carries out what the daemon says until a chosen command, and
 * then says nothing more. Commands on stdin: "sum" verifies every page of the heap, "quit" ends it.
 *
 *   sullen SOCKET [--mib 16] --at KIND --when before|half|after --how sleep|spin|stop|late
 *
 * KIND is the number of a command; half is for those with several runs. What the last word says it does then; late is
 * asleep for 13 seconds, once, and then as if nothing had been. */
#include "content.h"
#include <fcntl.h>
#include <getopt.h>
#include <pthread.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>

#include "../../snapd/agent/uapi.h"
#include "../../snapd/agent/wire.h"

#define STACK ((size_t)256 * 1024)

static struct heap heap;
static char stack[STACK] __attribute__((aligned(4096)));
static struct snapd_wire message; /* in a small mapping: it stays */
static int at_kind, uffd = -1, store = -1, page_map = -1;
static const char *when = "before", *how = "sleep";

static void be_sullen(void)
{
    if (strcmp(how, "late") == 0) {
        sleep_ns(13 * NS_PER_S);
        at_kind = 0;
        return;
    }
    if (strcmp(how, "stop") == 0)
        kill(getpid(), SIGSTOP);
    for (volatile uint64_t i = 0;; i++)
        if (strcmp(how, "spin") != 0)
            sleep_ns(NS_PER_S);
}

static int receive(int sock, int fds[3])
{
    union {
        char bytes[CMSG_SPACE(3 * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec iov = {&message, sizeof message};
    struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control};
    header.msg_controllen = sizeof control;
    fds[0] = fds[1] = fds[2] = -1;
    if (recvmsg(sock, &header, MSG_CMSG_CLOEXEC) != sizeof message)
        return -1;
    struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
    if (rights)
        memcpy(fds, CMSG_DATA(rights), rights->cmsg_len - CMSG_LEN(0));
    return 0;
}

static void answer(int sock, int fd)
{
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } control = {.align = {.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS}};
    struct iovec iov = {&message, sizeof message};
    struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fd >= 0) {
        memcpy(CMSG_DATA(&control.align), &fd, sizeof fd);
        header.msg_control = &control;
        header.msg_controllen = sizeof control.bytes;
    }
    sendmsg(sock, &header, MSG_NOSIGNAL);
}

static void move_runs(bool pin, unsigned first, unsigned end)
{
    for (unsigned i = first; i + 1 < end; i += 2) {
        struct snapd_run *from = &message.runs[i], *to = &message.runs[i + 1];
        if (pin) {
            struct snapd_uffd_move move = {.dst = to->start, .src = from->start, .len = from->length,
                                           .mode = SNAPD_UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES};
            while (ioctl(uffd, SNAPD_UFFDIO_MOVE, &move) == -1 && errno == EAGAIN)
                ;
            continue;
        }
        long at = syscall(SYS_mremap, from->start, from->length, from->length,
                          SNAPD_MREMAP_MAYMOVE | SNAPD_MREMAP_DONTUNMAP, to->start);
        *to = at == -1 ? (struct snapd_run){0, (uint64_t)errno} : (struct snapd_run){(uint64_t)at, 0};
        if (at != -1)
            madvise((void *)at, from->length, MADV_DONTFORK);
    }
}

static void halve(void)
{
    for (unsigned i = 0; i + 1 < message.nruns; i += 2)
        message.runs[i].length = (message.runs[i].length / 2 + PAGE - 1) / PAGE * PAGE;
}

static int carry_out(int fds[3])
{
    long result = 0;
    switch (message.kind) {
    case SNAPD_MAKE: result = uffd = ioctl(fds[0], SNAPD_USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK); break;
    case SNAPD_HOLD: store = fds[0], page_map = fds[1]; break;
    case SNAPD_STAGE:
        result = syscall(SYS_mmap, message.dest, message.length, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        message.value = (uint64_t)result;
        if (result != -1)
            madvise((void *)result, message.length, MADV_DONTFORK);
        break;
    case SNAPD_MOVE: move_runs(false, 0, message.nruns); break;
    case SNAPD_PIN: move_runs(true, 0, message.nruns), message.nruns = 0; break;
    case SNAPD_UNMAP:
        for (unsigned i = 0; i < message.nruns; i++)
            munmap((void *)message.runs[i].start, message.runs[i].length);
        break;
    default: break;
    }
    message.status = result == -1 ? -errno : 0;
    message.flags = 0;
    return message.kind == SNAPD_MAKE ? uffd : -1;
}

static void *obey(void *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fds[3], sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    snprintf(address.sun_path, sizeof address.sun_path, "%s", (const char *)path);
    char *sentinel = mmap(NULL, 3 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(sentinel + PAGE, PAGE, PROT_READ | PROT_WRITE);
    if (connect(sock, (struct sockaddr *)&address, sizeof address) == -1)
        fail_errno("connect");
    uint64_t tid = (uint64_t)syscall(SYS_gettid);
    message = (struct snapd_wire){
        .magic = SNAPD_WIRE_MAGIC, .version = SNAPD_WIRE_VERSION, .kind = SNAPD_HELLO,
        .addr = (uintptr_t)sentinel + PAGE, .length = tid, .dest = tid, .value = (uint64_t)getpid(), .nruns = 2,
        .runs = {{(uintptr_t)stack, STACK}, {(uintptr_t)sentinel, 3 * PAGE}}};
    answer(sock, -1);
    while (receive(sock, fds) == 0) {
        bool now = message.kind == at_kind;
        if (now && strcmp(when, "before") == 0)
            be_sullen();
        if (now && strcmp(when, "half") == 0)
            halve();
        int fd = carry_out(fds);
        if (now && strcmp(when, "before") != 0)
            be_sullen();
        answer(sock, fd);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    static const struct option known[] = {
        {"mib", 1, NULL, 'm'}, {"at", 1, NULL, 'a'}, {"when", 1, NULL, 'w'}, {"how", 1, NULL, 'h'}, {0}};
    uint64_t mib = 16;
    for (int option; (option = getopt_long(argc, argv, "", known, NULL)) != -1;) {
        switch (option) {
        case 'm': mib = parse_number("--mib", optarg); break;
        case 'a': at_kind = (int)parse_number("--at", optarg); break;
        case 'w': when = optarg; break;
        case 'h': how = optarg; break;
        default: return 2;
        }
    }
    if (optind + 1 != argc || mib == 0)
        fail("usage: sullen SOCKET [--mib N] --at KIND --when WHEN --how HOW");
    heap_init(&heap, mib * MIB, 1, false);
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    pthread_attr_setstack(&attributes, stack, STACK);
    if (pthread_create(&thread, &attributes, obey, argv[optind]) != 0)
        fail("pthread_create failed");
    reply("\"ready\":true");
    struct command command;
    while (read_command(&command)) {
        if (strcmp(command.name, "sum") == 0)
            reply("\"sum\":\"%016lx\"", heap_sum(&heap));
        else if (strcmp(command.name, "quit") == 0)
            break;
        else
            reply_error("unknown command");
    }
    reply("\"quit\":true");
    return 0;
}
