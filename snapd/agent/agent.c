/* The agent: two threads inside the target that make the userfaultfd and execute moves.
 *
 * Freestanding: raw system calls, no libc, no allocation, no TLS. It knows no policy; every command comes from the
 * daemon. One thread connects and never makes a call that raises a userfaultfd event, so that it can reconnect while
 * the other, the mover, sleeps in mremap or munmap until a new daemon reads the event.
 */
#include "agent.h"
#include "arch.h"

#include <linux/capability.h>
#include <linux/close_range.h>
#include <linux/errno.h>
#include <linux/fcntl.h>
#include <linux/futex.h>
#include <linux/mman.h>
#include <linux/poll.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/socket.h>
#include <linux/time_types.h>
#include <linux/uio.h>
#include <linux/un.h>

#define SOCK_SEQPACKET 5
#define SOCK_CLOEXEC 02000000
#define SOL_SOCKET 1
#define SO_PEERCRED 17
#define SCM_RIGHTS 1
#define MSG_NOSIGNAL 0x4000
#define MSG_CMSG_CLOEXEC 0x40000000
#define AF_UNIX 1
#define SHUT_RDWR 2
#define POLLRDHUP 0x2000
#define NFDS 3
#define QUICK_MS 1000 /* after the end of a connection */
#define QUICK_PAUSE_MS 25
#define SLOW_PAUSE_MS 1000
#define HOLDER_PAUSE_MS 200 /* somebody may be waiting for memory */
#define TELL_MS 5000

struct user_msghdr {
	void *name;
	int namelen;
	struct iovec *iov;
	unsigned long iovlen;
	void *control;
	unsigned long controllen;
	unsigned int flags;
};
struct rights {
	unsigned long len;
	int level, type;
	int fds[NFDS + 1];
};
#define RIGHTS_BYTES(n) (16 + 4 * (unsigned long)(n))

/* gcc may call these even in freestanding code. */
__attribute__((visibility("hidden"))) void *memset(void *to, int value, unsigned long n);
__attribute__((visibility("hidden"))) void *memcpy(void *to, const void *from, unsigned long n);

void *memset(void *to, int value, unsigned long n)
{
	volatile char *p = to;

	while (n--)
		*p++ = (char)value;
	return to;
}

void *memcpy(void *to, const void *from, unsigned long n)
{
	volatile char *p = to;
	const char *q = from;

	while (n--)
		*p++ = *q++;
	return to;
}

static long futex_wait(unsigned int *word, unsigned int value)
{
	return raw4(__NR_futex, word, FUTEX_WAIT_PRIVATE, value, 0);
}

static void futex_wake(unsigned int *word)
{
	raw3(__NR_futex, word, FUTEX_WAKE_PRIVATE, 0x7fffffff);
}

int agent_connect(const char *path)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	unsigned long n = 0;
	long ret;
	int sock = (int)raw3(__NR_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	if (sock < 0)
		return sock;
	while (path[n] && n < sizeof(addr.sun_path) - 1) {
		addr.sun_path[n] = path[n];
		n++;
	}
	ret = raw3(__NR_connect, sock, &addr, sizeof(addr));
	if (ret < 0) {
		raw1(__NR_close, sock);
		return (int)ret;
	}
	return sock;
}

int agent_send(int sock, struct snapd_wire *message, const int *fds, int nfds)
{
	struct rights rights = {.len = RIGHTS_BYTES(nfds), .level = SOL_SOCKET, .type = SCM_RIGHTS};
	struct iovec iov = {.iov_base = message, .iov_len = sizeof(*message)};
	struct user_msghdr header = {.iov = &iov, .iovlen = 1};
	long n;

	for (int i = 0; i < nfds; i++)
		rights.fds[i] = fds[i];
	if (nfds) {
		header.control = &rights;
		header.controllen = RIGHTS_BYTES(nfds);
	}
	message->magic = SNAPD_WIRE_MAGIC;
	message->version = SNAPD_WIRE_VERSION;
	do {
		n = raw3(__NR_sendmsg, sock, &header, MSG_NOSIGNAL);
	} while (n == -EINTR);
	return n == sizeof(*message) ? 0 : n < 0 ? (int)n : -EPIPE;
}

int agent_receive(int sock, struct snapd_wire *message, int fds[NFDS])
{
	struct rights rights = {0};
	struct iovec iov = {.iov_base = message, .iov_len = sizeof(*message)};
	struct user_msghdr header = {
		.iov = &iov, .iovlen = 1, .control = &rights, .controllen = RIGHTS_BYTES(NFDS)};
	long n;

	for (int i = 0; i < NFDS; i++)
		fds[i] = -1;
	do {
		n = raw3(__NR_recvmsg, sock, &header, MSG_CMSG_CLOEXEC);
	} while (n == -EINTR);
	if (n >= 0 && header.controllen >= RIGHTS_BYTES(1) && rights.level == SOL_SOCKET && rights.type == SCM_RIGHTS)
		for (unsigned long i = 0; i < NFDS && rights.len >= RIGHTS_BYTES(i + 1); i++)
			fds[i] = rights.fds[i];
	if (n <= 0)
		return n < 0 ? (int)n : -EPIPE;
	if (n != sizeof(*message) || message->magic != SNAPD_WIRE_MAGIC || message->version != SNAPD_WIRE_VERSION)
		return -EPROTO;
	return 0;
}

static void close_fd(int *fd)
{
	if (*fd >= 0)
		raw1(__NR_close, *fd);
	*fd = -1;
}

static long make_userfaultfd(struct agent *agent, int device)
{
	long uffd = raw3(__NR_ioctl, device, SNAPD_USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);

	if (uffd < 0)
		return uffd;
	close_fd(&agent->uffd);
	agent->uffd = (int)uffd;
	return 0;
}

/* The target stands while this moves its memory, as long as the daemon lives. An mremap sleeps until its event is read:
 * if by a successor, then this connection has ended, and the rest must not be moved while the program runs. */
static int hung_up(int sock)
{
	struct __kernel_timespec none = {0, 0};
	struct pollfd wait = {.fd = sock, .events = POLLRDHUP};

	return raw5(__NR_ppoll, &wait, 1, &none, 0, 8) > 0 && wait.revents & (POLLRDHUP | POLLHUP | POLLERR);
}

/* The ranges must belong to the daemon's piece: nothing else runs in the target while this moves them. */
static long move_aside(struct snapd_wire *m, int sock)
{
	for (unsigned int i = 0; i + 1 < m->nruns && i + 1 < SNAPD_WIRE_RUNS; i += 2) {
		const struct snapd_run *from = &m->runs[i];
		struct snapd_run *to = &m->runs[i + 1];
		long at;

		if (hung_up(sock)) {
			*to = (struct snapd_run){0, EPIPE};
			continue;
		}
		at = raw5(__NR_mremap, from->start, from->length, from->length,
			       SNAPD_MREMAP_MAYMOVE | SNAPD_MREMAP_DONTUNMAP, to->start);

		if (at < 0 && at > -4096) {
			*to = (struct snapd_run){0, (__u64)-at};
			continue;
		}
		*to = (struct snapd_run){(__u64)at, 0};
		raw3(__NR_madvise, at, from->length, SNAPD_MADV_DONTFORK);
	}
	return 0;
}

static long stage(const struct snapd_wire *m, __u64 *ret)
{
	long at = raw6(__NR_mmap, (long)m->dest, (long)m->length, PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at < 0 && at > -4096)
		return at;
	*ret = (unsigned long)at;
	return raw3(__NR_madvise, at, m->length, SNAPD_MADV_DONTFORK);
}

static long move_back(const struct snapd_wire *m)
{
	long ret = raw3(__NR_madvise, m->addr, m->length, SNAPD_MADV_DOFORK);

	if (ret < 0)
		return ret;
	ret = raw5(__NR_mremap, m->addr, m->length, m->length, SNAPD_MREMAP_MAYMOVE | SNAPD_MREMAP_FIXED, m->dest);
	return ret < 0 && ret > -4096 ? ret : 0;
}

static long advise(struct snapd_wire *m)
{
	long first = 0;

	for (unsigned int i = 0; i < m->nruns && i < SNAPD_WIRE_RUNS; i++) {
		long ret = raw3(__NR_madvise, m->runs[i].start, m->runs[i].length, m->value);

		if (ret < 0 && !first)
			first = ret;
	}
	return first;
}

static void pause_us(unsigned long us)
{
	struct __kernel_timespec time = {.tv_sec = (long)us / 1000000, .tv_nsec = (long)us % 1000000 * 1000};

	raw2(__NR_nanosleep, &time, 0);
}

static unsigned long now_ms(void)
{
	struct __kernel_timespec time = {0};

	raw2(__NR_clock_gettime, 1 /* CLOCK_MONOTONIC */, &time);
	return (unsigned long)time.tv_sec * 1000 + (unsigned long)time.tv_nsec / 1000000;
}

static long unmap(const struct snapd_wire *m)
{
	long first = 0;

	for (unsigned int i = 0; i < m->nruns && i < SNAPD_WIRE_RUNS; i++) {
		long ret = raw2(__NR_munmap, m->runs[i].start, m->runs[i].length);

		if (ret < 0 && !first)
			first = ret;
	}
	return first;
}

/* Guards go in by one call for all runs: a touch meanwhile waits in the daemon and is woken after it. */
static long install_guards(struct snapd_wire *m)
{
	for (unsigned int i = 0; i < m->nruns && i < SNAPD_WIRE_RUNS; i++) {
		long ret = raw3(__NR_madvise, m->runs[i].start, m->runs[i].length, SNAPD_MADV_GUARD_INSTALL);

		if (ret < 0)
			return ret;
	}
	return 0;
}

/* UFFDIO_MOVE one page or more; returns bytes done or a negative errno. */
static long uffd_move(int uffd, __u64 to, __u64 from, __u64 length)
{
	struct snapd_uffd_move move = {
		.dst = to, .src = from, .len = length, .mode = SNAPD_UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES};
	long ret = raw3(__NR_ioctl, uffd, SNAPD_UFFDIO_MOVE, &move);

	if (ret == 0)
		return (long)length;
	if (move.move > 0)
		return (long)move.move;
	return move.move < 0 ? (long)move.move : ret;
}

/* Moves runs from asides to the staging. EBUSY is a pin, or a page shared with a fork, alive or
 * dead: a write fault in the aside makes it ours alone, so EBUSY a second time is a pin. Such pages stay where they
 * are and come back as runs of the reply; when they do not fit, dest and value say how far the pass came. */
static long pin_pass(struct agent *agent, struct snapd_wire *m)
{
	struct snapd_run pinned[SNAPD_WIRE_RUNS];
	unsigned int npinned = 0;
	long ret = 0;

	for (unsigned int i = 0; i + 1 < m->nruns && i + 1 < SNAPD_WIRE_RUNS; i += 2) {
		__u64 start = m->runs[i].start, at = start, end = at + m->runs[i].length;
		int tried = 0;

		m->dest = i / 2;

		while (at < end) {
			long done = uffd_move(agent->uffd, m->runs[i + 1].start + (at - start), at, end - at);

			if (done > 0) {
				at += (unsigned long)done;
				tried = 0;
				continue;
			}
			if (done == -EAGAIN)
				continue;
			if (done == -EBUSY && !tried) {
				tried = 1;
				if (raw3(__NR_madvise, at, SNAPD_PAGE, SNAPD_MADV_POPULATE_WRITE) == 0)
					continue;
			}
			/* EEXIST and ENOENT: whatever it is, the page is not in the staging. */
			if (done == -EBUSY || done == -EEXIST || done == -ENOENT) {
				if (npinned && pinned[npinned - 1].start + pinned[npinned - 1].length == at) {
					pinned[npinned - 1].length += SNAPD_PAGE;
				} else if (npinned < SNAPD_WIRE_RUNS) {
					pinned[npinned++] = (struct snapd_run){at, SNAPD_PAGE};
				} else {
					m->value = at;
					m->flags = SNAPD_REPLY_MORE;
					goto out;
				}
			} else {
				m->value = at; /* from here on nothing was moved */
				ret = done;
				goto out;
			}
			at += SNAPD_PAGE;
			tried = 0;
		}
	}
out:
	for (unsigned int i = 0; i < npinned; i++)
		m->runs[i] = pinned[i];
	m->nruns = npinned;
	return ret;
}

/* The mover may run at real-time priority: spinning it would keep the holder from the CPU. */
static void kept_lock(struct agent *agent)
{
	while (__atomic_exchange_n(&agent->kept_lock, 1, __ATOMIC_ACQUIRE))
		futex_wait(&agent->kept_lock, 1);
}

static void kept_unlock(struct agent *agent)
{
	__atomic_store_n(&agent->kept_lock, 0, __ATOMIC_RELEASE);
	futex_wake(&agent->kept_lock);
}

/* What finds no room goes: then the daemon and its keeper are the only ones that have it. */
static void keep(struct agent *agent, unsigned long number, int fds[NFDS])
{
	kept_lock(agent);
	for (int i = 0; i < AGENT_KEPT && number && fds[0] >= 0 && fds[1] >= 0; i++)
		if (!agent->kept[i].number && !agent->kept[i].offered) {
			agent->kept[i].number = number;
			agent->kept[i].uffd = fds[0];
			agent->kept[i].page_map = fds[1];
			fds[0] = fds[1] = -1;
		}
	kept_unlock(agent);
}

static void close_kept(struct agent *agent, int i)
{
	close_fd(&agent->kept[i].uffd);
	close_fd(&agent->kept[i].page_map);
}

/* number: of one child, or 0 for all. What is just being offered is closed by who offers it. */
static void let(struct agent *agent, unsigned long number)
{
	kept_lock(agent);
	for (int i = 0; i < AGENT_KEPT; i++)
		if (agent->kept[i].number && (!number || agent->kept[i].number == number)) {
			agent->kept[i].number = 0;
			if (!agent->kept[i].offered)
				close_kept(agent, i);
		}
	kept_unlock(agent);
}

static void let_go(struct agent *agent)
{
	let(agent, 0);
	close_fd(&agent->uffd);
	close_fd(&agent->store);
	close_fd(&agent->page_map);
	agent->fork_wait = 0;
	__atomic_store_n(&agent->leaving, 1, __ATOMIC_SEQ_CST);
	futex_wake(&agent->leaving);
}

/* A session begins with its store: the mover sets that and then looks at closing, and here it is the other way round,
 * so at least one of the two sees the other. */
int agent_end(struct agent *agent)
{
	__atomic_store_n(&agent->closing, 1, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&agent->store, __ATOMIC_SEQ_CST) >= 0) {
		__atomic_store_n(&agent->closing, 0, __ATOMIC_SEQ_CST);
		return -EBUSY;
	}
	__atomic_store_n(&agent->leaving, 1, __ATOMIC_SEQ_CST);
	__atomic_add_fetch(&agent->sock_generation, 1, __ATOMIC_SEQ_CST);
	futex_wake(&agent->sock_generation);
	return 0;
}

static long hold(struct agent *agent, int fds[NFDS])
{
	close_fd(&agent->store);
	close_fd(&agent->page_map);
	if (fds[0] < 0) /* nothing is out, and no daemon will read: a fork would wait for ever */
		close_fd(&agent->uffd);
	__atomic_store_n(&agent->store, fds[0], __ATOMIC_SEQ_CST);
	if (fds[0] >= 0 && __atomic_load_n(&agent->closing, __ATOMIC_SEQ_CST)) {
		close_fd(&agent->store);
		close_fd(&agent->uffd);
		fds[0] = -1;
		return -ECANCELED;
	}
	agent->page_map = fds[1];
	if (fds[2] >= 0) { /* a forked child: its userfaultfd came to the daemon by the fork's event */
		close_fd(&agent->uffd);
		agent->uffd = fds[2];
	}
	fds[0] = fds[1] = fds[2] = -1;
	return 0;
}

/* Executes one command in place; the message becomes its reply. */
static void execute(struct agent *agent, struct snapd_wire *m, int fds[NFDS], int sock)
{
	long ret = 0;

	m->flags = 0;
	switch (m->kind) {
	case SNAPD_MAKE:
		/* With a store in hand pages may be out: closing their userfaultfd would make them zeros. */
		ret = agent->store >= 0 ? -EBUSY : fds[0] < 0 ? -EBADF : make_userfaultfd(agent, fds[0]);
		break;
	case SNAPD_HOLD:
		ret = hold(agent, fds);
		break;
	case SNAPD_STAGE:
		ret = stage(m, &m->value);
		break;
	case SNAPD_MOVE:
		ret = move_aside(m, sock);
		break;
	case SNAPD_GUARD:
		ret = install_guards(m);
		break;
	case SNAPD_PIN:
		ret = pin_pass(agent, m);
		break;
	case SNAPD_BACK:
		ret = move_back(m);
		break;
	case SNAPD_UNMAP:
		ret = unmap(m);
		break;
	case SNAPD_ADVISE:
		ret = advise(m);
		break;
	case SNAPD_PING:
		m->value = (__u64)(long)agent->last_status;
		break;
	case SNAPD_FLAGS:
		__atomic_store_n(&agent->fork_wait, m->value & SNAPD_FLAG_FORK_WAIT, __ATOMIC_SEQ_CST);
		break;
	case SNAPD_LEAVE:
		break;
	default:
		ret = -ENOSYS;
	}
	for (int i = 0; i < NFDS; i++)
		close_fd(&fds[i]);
	m->status = (__s32)ret;
	agent->last_status = (int)ret;
}

/* Waits for a connection newer than the one that was seen; the connecting thread publishes it. */
static int next_connection(struct agent *agent, unsigned int *seen)
{
	while (__atomic_load_n(&agent->sock_generation, __ATOMIC_SEQ_CST) == *seen)
		futex_wait(&agent->sock_generation, *seen);
	*seen = __atomic_load_n(&agent->sock_generation, __ATOMIC_SEQ_CST);
	__atomic_store_n(&agent->sock_taken, *seen, __ATOMIC_SEQ_CST);
	return agent->sock;
}

static void name_thread(const char *name)
{
	raw5(__NR_prctl, PR_SET_NAME, name, 0, 0, 0);
}

/* A thread made by raw clone keeps its capabilities when libc's setuid() drops those of all others. */
static void drop_capabilities(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[2] = {{0}};

	raw2(__NR_capset, &header, data);
}

static void mover_main(void *arg)
{
	struct agent *agent = arg;
	unsigned int seen = 0;
	int sock = -1, fds[NFDS];
	struct snapd_wire message;

	name_thread("snapd-mover");
	drop_capabilities();
	for (;;) {
		if (sock < 0)
			sock = next_connection(agent, &seen);
		if (__atomic_load_n(&agent->leaving, __ATOMIC_SEQ_CST))
			raw1(__NR_exit, 0);
		if (agent_receive(sock, &message, fds) < 0) {
			for (int i = 0; i < NFDS; i++)
				close_fd(&fds[i]);
			raw2(__NR_shutdown, sock, SHUT_RDWR); /* the other thread's poll still refers to it */
			close_fd(&sock);
			continue;
		}
		if (message.kind == SNAPD_KEEP || message.kind == SNAPD_LET) { /* in no turn with commands: no reply */
			if (message.kind == SNAPD_KEEP)
				keep(agent, message.value, fds);
			else if (message.value)
				let(agent, message.value);
			for (int i = 0; i < NFDS; i++)
				close_fd(&fds[i]);
			continue;
		}
		__atomic_store_n(&agent->busy, 1, __ATOMIC_SEQ_CST);
		execute(agent, &message, fds, sock);
		__atomic_store_n(&agent->busy, 0, __ATOMIC_SEQ_CST);
		if (message.kind == SNAPD_MAKE && message.status == 0)
			agent_send(sock, &message, &agent->uffd, 1);
		else
			agent_send(sock, &message, fds, 0);
		if (message.kind == SNAPD_LEAVE) {
			let_go(agent);
			raw2(__NR_shutdown, sock, SHUT_RDWR);
			raw1(__NR_close, sock);
			raw1(__NR_exit, 0);
		}
	}
}

static int say_hello(struct agent *agent, int sock)
{
	struct snapd_wire hello = {.kind = SNAPD_HELLO, .addr = agent->sentinel};
	int fds[NFDS] = {agent->uffd, agent->store, agent->page_map}, nfds = 0;

	hello.length = (__u64)agent->comm_tid;
	hello.dest = (__u64)agent->mover_tid;
	hello.value = (__u64)raw0(__NR_getpid);
	hello.runs[0] = (struct snapd_run){agent->region, agent->region_bytes};
	hello.runs[1] = (struct snapd_run){agent->sentinel - SNAPD_PAGE, 3 * SNAPD_PAGE};
	hello.runs[2] = agent->bss;
	hello.nruns = 3;
	if (__atomic_load_n(&agent->busy, __ATOMIC_SEQ_CST))
		hello.flags |= SNAPD_HELLO_BUSY;
	if (agent->delay_ms)
		hello.flags |= SNAPD_HELLO_FORKED;
	if (agent->uffd >= 0 && agent->store >= 0 && agent->page_map >= 0) {
		hello.flags |= SNAPD_HELLO_SESSION;
		nfds = NFDS;
	}
	return agent_send(sock, &hello, fds, nfds);
}

/* Children that were kept come by connections of their own; a daemon that has them already drops them. */
static void offer_kept(struct agent *agent)
{
	for (int i = 0; i < AGENT_KEPT; i++) {
		struct snapd_wire hello = {.kind = SNAPD_HELLO, .addr = agent->sentinel,
					   .flags = SNAPD_HELLO_SESSION | SNAPD_HELLO_KEPT};
		int sock = -1, fds[NFDS];

		kept_lock(agent);
		agent->kept[i].offered = agent->kept[i].number != 0;
		kept_unlock(agent);
		if (!agent->kept[i].offered)
			continue;
		fds[0] = agent->kept[i].uffd;
		fds[1] = agent->store;
		fds[2] = agent->kept[i].page_map;
		hello.value = (__u64)raw0(__NR_getpid);
		if (fds[1] >= 0)
			sock = agent_connect(agent->path);
		if (sock >= 0)
			agent_send(sock, &hello, fds, NFDS);
		close_fd(&sock);
		kept_lock(agent);
		agent->kept[i].offered = 0;
		if (!agent->kept[i].number)
			close_kept(agent, i);
		kept_unlock(agent);
	}
}

/* Yama lets only a declared tracer read and stop a process of the same user. */
static void allow_tracer(int sock)
{
	struct {
		int pid, uid, gid;
	} peer = {0};
	int length = sizeof(peer);

	if (raw5(__NR_getsockopt, sock, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0 && peer.pid > 0)
		raw5(__NR_prctl, PR_SET_PTRACER, peer.pid, 0, 0, 0);
}

static void wait_hangup(int sock)
{
	struct pollfd wait = {.fd = sock, .events = POLLRDHUP};
	long n;

	do {
		n = raw5(__NR_ppoll, &wait, 1, 0, 0, 8);
	} while (n == -EINTR);
}

static char *add_text(char *at, const char *text, unsigned long bytes)
{
	while (bytes-- && *text)
		*at++ = *text++;
	return at;
}

/* One line on the program's own stderr, which these threads do not share. */
static void tell(const struct agent *agent)
{
	char line[256 + AGENT_PATH_BYTES], *at = line;
	long self = raw2(__NR_pidfd_open, raw0(__NR_getpid), 0), out;
	unsigned long directory = 0;

	for (unsigned long i = 0; agent->path[i]; i++)
		if (agent->path[i] == '/')
			directory = i;
	at = add_text(at, "snapd: the daemon is gone, and has memory of this program: what the program touches of it "
			  "waits. To get it back: snapd daemon --runtime-dir ", ~0UL);
	at = add_text(at, agent->path, directory);
	*at++ = '\n';
	out = raw3(__NR_pidfd_getfd, self, 2, 0);
	if (out >= 0) {
		raw3(__NR_write, out, line, at - line);
		raw1(__NR_close, out);
	}
	raw1(__NR_close, self);
}

void agent_main(void *arg)
{
	struct agent *agent = arg;
	unsigned int lost_ms = 0, waited_ms = 0;
	char *mover_stack = (char *)agent->region + SNAPD_PAGE + 2 * AGENT_STACK_BYTES;

	raw3(__NR_close_range, 0, ~0U, CLOSE_RANGE_UNSHARE);
	raw1(__NR_chdir, "/");
	name_thread("snapd-comm");
	drop_capabilities();
	agent->comm_tid = (int)raw0(__NR_gettid);
	agent->mover_tid = (int)raw_thread(CLONE_VM | CLONE_FILES | CLONE_FS | CLONE_SIGHAND | CLONE_THREAD |
						   CLONE_SYSVSEM,
					   mover_stack, 0, mover_main, agent);
	if (agent->delay_ms)
		pause_us(agent->delay_ms * 1000UL);
	while (agent->mover_tid > 0 && !__atomic_load_n(&agent->leaving, __ATOMIC_SEQ_CST)) {
		int sock = agent_connect(agent->path);
		unsigned int pause_ms;

		if (sock >= 0 && say_hello(agent, sock) < 0)
			close_fd(&sock);
		if (sock >= 0) {
			unsigned long since_ms = now_ms();
			unsigned int generation;

			allow_tracer(sock);
			agent->sock = sock;
			generation = __atomic_add_fetch(&agent->sock_generation, 1, __ATOMIC_SEQ_CST);
			futex_wake(&agent->sock_generation);
			offer_kept(agent);
			wait_hangup(sock);
			/* A mover that is still inside a command has not taken it: then it is ours to close. */
			if (__atomic_load_n(&agent->sock_taken, __ATOMIC_SEQ_CST) != generation)
				close_fd(&sock);
			if (now_ms() - since_ms >= QUICK_MS) /* one that refuses us is not asked all the time */
				lost_ms = 0;
			waited_ms = 0;
		}
		if (__atomic_load_n(&agent->leaving, __ATOMIC_SEQ_CST))
			break;
		/* A successor is found at once, and none at all costs next to nothing. */
		pause_ms = lost_ms < QUICK_MS ? QUICK_PAUSE_MS : agent->store >= 0 ? HOLDER_PAUSE_MS : SLOW_PAUSE_MS;
		pause_us(pause_ms * 1000UL);
		if (lost_ms < QUICK_MS)
			lost_ms += pause_ms;
		if (agent->store >= 0 && waited_ms < TELL_MS) {
			waited_ms += pause_ms;
			if (agent->tells && waited_ms >= TELL_MS)
				tell(agent);
		}
	}
	raw1(__NR_exit, 0);
}
