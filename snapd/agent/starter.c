/* Starts the agent in this process: by LD_PRELOAD (the constructor), or by snapd_cooperate().
 *
 * May run program code's thread context, so it keeps to raw system calls too: the library then works under any libc.
 * Owns the agent's region and the fork handlers; knows nothing of commands.
 */
#include "snapd.h"

#include "agent.h"
#include "arch.h"

#include <linux/errno.h>
#include <linux/futex.h>
#include <linux/mman.h>
#include <linux/sched.h>
#include <linux/time_types.h>

#define EXPORT __attribute__((visibility("default")))
#define ENV_SOCKET "SNAPD_AGENT_SOCKET="
#define REGION_BYTES (SNAPD_PAGE + 2 * AGENT_STACK_BYTES)

extern int __register_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void), void *dso)
	__attribute__((weak));
extern char __bss_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));

#define ENV_NO_FOLLOW "SNAPD_NO_FOLLOW_FORKS="
#define CHILD_DELAY_MS 30

static struct agent *running;
static unsigned long sentinel_page;
static char daemon_path[AGENT_PATH_BYTES];
static int follow_forks = 1;
static int handlers_registered;

/* Asks the daemon for kind and waits for its answer; while no daemon answers, waits for one. Returns the connection, or
 * -1 when the agent has left meanwhile. */
static int ask_daemon(struct agent *agent, int kind)
{
	struct __kernel_timespec pause = {.tv_nsec = 20000000};
	struct snapd_wire message;
	int fds[3];

	while (!__atomic_load_n(&agent->leaving, __ATOMIC_SEQ_CST)) {
		int sock = agent_connect(agent->path);

		message = (struct snapd_wire){.kind = (__u16)kind};
		if (sock >= 0 && agent_send(sock, &message, fds, 0) == 0 && agent_receive(sock, &message, fds) == 0)
			return sock;
		if (sock >= 0)
			raw1(__NR_close, sock);
		raw2(__NR_nanosleep, &pause, 0);
	}
	return -1;
}

/* Without fork events: everything is in before the fork, and the open connection keeps the daemon from dumping until it
 * is done. One fork at a time. */
static struct {
	unsigned int lock; /* futex */
	int owner, sock;
} forking;

static void before_fork(void)
{
	struct agent *agent = running;

	if (!agent || !__atomic_load_n(&agent->fork_wait, __ATOMIC_SEQ_CST))
		return;
	while (__atomic_exchange_n(&forking.lock, 1, __ATOMIC_SEQ_CST))
		raw4(__NR_futex, &forking.lock, FUTEX_WAIT_PRIVATE, 1, 0);
	forking.owner = (int)raw0(__NR_gettid);
	forking.sock = ask_daemon(agent, SNAPD_FORK_WAIT);
}

static void end_fork(void)
{
	if (forking.sock >= 0)
		raw1(__NR_close, forking.sock);
	forking.owner = 0;
	__atomic_store_n(&forking.lock, 0, __ATOMIC_SEQ_CST);
	raw3(__NR_futex, &forking.lock, FUTEX_WAKE_PRIVATE, 1);
}

static void in_parent(void)
{
	if (forking.owner == (int)raw0(__NR_gettid))
		end_fork();
}

static int start(const char *path, unsigned long sentinel, unsigned int delay_ms);

/* The region is DONTFORK and its threads stay with the parent: a child that may be dumped itself starts anew. The
 * sentinel is inherited: the daemon knows the child's session by it. */
static void in_child(void)
{
	if (forking.owner)
		end_fork();
	if (!running)
		return;
	running = 0;
	if (follow_forks)
		start(daemon_path, sentinel_page, CHILD_DELAY_MS);
}

/* The sentinel has neighbours without access, so that no other mapping merges with it. */
static long map_sentinel(void)
{
	long at = raw6(__NR_mmap, 0, 3 * SNAPD_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (at < 0 && at > -4096)
		return at;
	if (raw3(__NR_mprotect, at + (long)SNAPD_PAGE, SNAPD_PAGE, PROT_READ | PROT_WRITE) < 0)
		return -ENOMEM;
	return at + (long)SNAPD_PAGE;
}

static struct agent *map_region(const char *path, unsigned long inherited)
{
	long at = raw6(__NR_mmap, 0, REGION_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct agent *agent = (struct agent *)at;
	long sentinel;

	if (at < 0 && at > -4096)
		return 0;
	raw3(__NR_madvise, at, REGION_BYTES, SNAPD_MADV_DONTFORK);
	sentinel = inherited ? (long)inherited : map_sentinel();
	for (unsigned int i = 0; path[i] && i < AGENT_PATH_BYTES - 1; i++)
		agent->path[i] = path[i];
	agent->region = (unsigned long)at;
	agent->region_bytes = REGION_BYTES;
	agent->sentinel = sentinel < 0 ? 0 : (unsigned long)sentinel;
	agent->bss.start = (unsigned long)__bss_start & ~(SNAPD_PAGE - 1);
	agent->bss.length = (((unsigned long)_end + SNAPD_PAGE - 1) & ~(SNAPD_PAGE - 1)) - agent->bss.start;
	agent->uffd = agent->store = agent->page_map = agent->sock = -1;
	return agent->sentinel ? agent : 0;
}

static int start(const char *path, unsigned long sentinel, unsigned int delay_ms)
{
	unsigned long all = ~0UL, before = 0;
	struct agent *agent = map_region(path, sentinel);
	long tid;

	if (!agent)
		return -ENOMEM;
	agent->delay_ms = delay_ms;
	sentinel_page = agent->sentinel;
	running = agent;
	raw4(__NR_rt_sigprocmask, 2 /* SIG_SETMASK */, &all, &before, 8);
	tid = raw_thread(CLONE_VM | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM,
			 (char *)agent->region + SNAPD_PAGE + AGENT_STACK_BYTES, 0, agent_main, agent);
	raw4(__NR_rt_sigprocmask, 2, &before, 0, 8);
	if (tid < 0) {
		running = 0;
		if (!sentinel)
			raw2(__NR_munmap, agent->sentinel - SNAPD_PAGE, 3 * SNAPD_PAGE);
		raw2(__NR_munmap, agent, REGION_BYTES);
		return (int)tid;
	}
	return 0;
}

EXPORT int snapd_cooperate(const char *socket_path)
{
	if (running)
		return -EALREADY;
	if (!socket_path || !socket_path[0])
		return -EINVAL;
	if (!handlers_registered && __register_atfork) {
		__register_atfork(before_fork, in_parent, in_child, 0);
		handlers_registered = 1;
	}
	for (unsigned int i = 0; i < AGENT_PATH_BYTES - 1; i++) {
		daemon_path[i] = socket_path[i];
		if (!socket_path[i])
			break;
	}
	return start(daemon_path, 0, 0);
}

EXPORT int snapd_leave(void)
{
	struct agent *agent = running;

	if (!agent)
		return -ESRCH;
	if (__atomic_load_n(&agent->uffd, __ATOMIC_SEQ_CST) >= 0) {
		int sock = ask_daemon(agent, SNAPD_LEAVE_WAIT);

		if (sock >= 0)
			raw1(__NR_close, sock);
	} else {
		__atomic_store_n(&agent->leaving, 1, __ATOMIC_SEQ_CST);
	}
	while (!__atomic_load_n(&agent->leaving, __ATOMIC_SEQ_CST))
		raw4(__NR_futex, &agent->leaving, FUTEX_WAIT_PRIVATE, 0, 0);
	running = 0;
	return 0;
}

static const char *value_of(char **env, const char *name)
{
	for (; env && *env; env++) {
		unsigned int i = 0;

		while (name[i] && (*env)[i] == name[i])
			i++;
		if (!name[i])
			return *env + i;
	}
	return 0;
}

__attribute__((constructor)) static void start_when_preloaded(int argc, char **argv, char **env)
{
	const char *path = value_of(env, ENV_SOCKET);

	(void)argc;
	(void)argv;
	follow_forks = !value_of(env, ENV_NO_FOLLOW);
	if (path)
		snapd_cooperate(path);
}
