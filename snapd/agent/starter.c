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
#include <linux/prctl.h>
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
#define LEAVE_MS 10000
#define LEAVE_PAUSE_MS 20
#define BURY_MS 2000

static struct agent *running, *left;
static unsigned long sentinel_page;
static char daemon_path[AGENT_PATH_BYTES];
static int follow_forks = 1;
static int handlers_registered;

static void pause_ms(unsigned int ms)
{
	struct __kernel_timespec pause = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};

	raw2(__NR_nanosleep, &pause, 0);
}

/* The agent, unless it has let go by the daemon's word. */
static struct agent *running_agent(void)
{
	if (running && __atomic_load_n(&running->leaving, __ATOMIC_SEQ_CST)) {
		left = running;
		running = 0;
	}
	return running;
}

/* Asks the daemon for kind and waits for its answer. Returns the connection, or a negative errno: of the connection, or
 * the daemon's own. */
static int ask_daemon(struct agent *agent, int kind)
{
	struct snapd_wire message = {.kind = (__u16)kind};
	int fds[3], error, sock = agent_connect(agent->path);

	if (sock < 0)
		return sock;
	error = agent_send(sock, &message, fds, 0);
	if (!error)
		error = agent_receive(sock, &message, fds);
	if (!error)
		error = message.status;
	if (!error)
		return sock;
	raw1(__NR_close, sock);
	return error;
}

/* Without fork events: everything is in before the fork, and the open connection keeps the daemon from dumping until it
 * is done. One fork at a time. */
static struct {
	unsigned int lock; /* futex */
	int owner, sock;
} forking;

static void before_fork(void)
{
	struct agent *agent = running_agent();

	if (!agent || !__atomic_load_n(&agent->fork_wait, __ATOMIC_SEQ_CST))
		return;
	while (__atomic_exchange_n(&forking.lock, 1, __ATOMIC_SEQ_CST))
		raw4(__NR_futex, &forking.lock, FUTEX_WAIT_PRIVATE, 1, 0);
	forking.owner = (int)raw0(__NR_gettid);
	do { /* while no daemon answers, one is waited for: what is out would be zeros in the child */
		forking.sock = ask_daemon(agent, SNAPD_FORK_WAIT);
		if (forking.sock < 0)
			pause_ms(20);
	} while (forking.sock < 0 && !__atomic_load_n(&agent->leaving, __ATOMIC_SEQ_CST));
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
static int preloaded;

/* The region is DONTFORK and its threads stay with the parent: a child that may be dumped itself starts anew. The
 * sentinel is inherited: the daemon knows the child's session by it. */
static void in_child(void)
{
	if (forking.owner)
		end_fork();
	left = 0; /* that region is not here either */
	if (!running)
		return;
	running = 0;
	/* Under a seccomp filter the program may not survive what an agent does. */
	if (follow_forks && raw5(__NR_prctl, PR_GET_SECCOMP, 0, 0, 0, 0) == 0)
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
	agent->tells = (unsigned int)preloaded;
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
	/* Whoever leaves before the thread has run must not take its memory for deserted. */
	__atomic_store_n(&agent->comm_tid, (int)tid, __ATOMIC_SEQ_CST);
	return 0;
}

static int has_thread(int tid)
{
	return tid > 0 && raw3(__NR_tgkill, raw0(__NR_getpid), tid, 0) == 0;
}

/* The threads of an agent that has let go end by themselves, then its memory can go. */
static void bury(void)
{
	for (int ms = 0; left && ms < BURY_MS; ms++) {
		/* In this order: the one makes the other. */
		if (has_thread(left->comm_tid) || has_thread(left->mover_tid)) {
			pause_ms(1);
			continue;
		}
		raw2(__NR_munmap, left->sentinel - SNAPD_PAGE, 3 * SNAPD_PAGE);
		raw2(__NR_munmap, left, REGION_BYTES);
		left = 0;
	}
	left = 0;
}

EXPORT int snapd_cooperate(const char *socket_path)
{
	if (running_agent())
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
	bury();
	return start(daemon_path, 0, 0);
}

EXPORT int snapd_leave(void)
{
	struct agent *agent = running_agent();

	if (!agent)
		return -ESRCH;
	for (unsigned int ms = 0; !__atomic_load_n(&agent->leaving, __ATOMIC_SEQ_CST); ms += LEAVE_PAUSE_MS) {
		int sock;

		if (agent_end(agent) == 0)
			break;
		sock = ask_daemon(agent, SNAPD_LEAVE_WAIT);
		if (sock >= 0)
			raw1(__NR_close, sock);
		if (ms >= LEAVE_MS) /* pages may be out, and no daemon brings them back */
			return -EBUSY;
		pause_ms(__atomic_load_n(&agent->leaving, __ATOMIC_SEQ_CST) ? 0 : LEAVE_PAUSE_MS);
	}
	running_agent();
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
	if (path) {
		preloaded = 1;
		snapd_cooperate(path);
	}
}
