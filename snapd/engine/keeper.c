/* The keeper: the daemon's understudy, which becomes the next daemon when this one dies.
 *
 * A process of its own that shares the daemon's descriptor table and no memory but the registry. It has unmapped all
 * that it does not need, libc included, so this file is freestanding: raw system calls, no library call, no
 * thread-local storage. It knows descriptors and how to execute a program; of a page map only where a FORK stands.
 */
#include "internal.h"
#include "keeper.h"

#include "../agent/arch.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>

#define FIRST_FD 3 /* as the LISTEN_FDS convention has it */
#define YOUNG_NS 1000000000ULL
#define FEW_DEATHS 5
#define LONGEST_PAUSE_S 32
#define EXEC_PAUSE_S 1
#define WATCH_PAUSE_NS 5000000L
#define ADDRESSES_END 0x7ffffffff000UL

static unsigned long long now(void)
{
	struct timespec time = {0, 0};

	raw2(__NR_clock_gettime, CLOCK_MONOTONIC, &time);
	return (unsigned long long)time.tv_sec * 1000000000ULL + (unsigned long long)time.tv_nsec;
}

static void pause_for(long seconds, long ns)
{
	struct timespec time = {seconds, ns};

	raw2(__NR_nanosleep, &time, 0);
}

static void say(const char *text)
{
	unsigned long n = 0;

	while (text[n])
		n++;
	raw3(__NR_write, 2, text, n);
}

static char *add_text(char *at, const char *text)
{
	while (*text)
		*at++ = *text++;
	*at = 0;
	return at;
}

static char *add_number(char *at, unsigned long number, unsigned int base)
{
	char digits[24];
	int n = 0;

	do {
		digits[n++] = "0123456789abcdef"[number % base];
		number /= base;
	} while (number);
	while (n)
		*at++ = digits[--n];
	*at = 0;
	return at;
}

/* The daemon's memory is the daemon's: a copy of it, page by page as the daemon writes, would be kept for nothing. */
static void unmap_the_rest(const struct keeper *keeper)
{
	unsigned long at = 0x10000;

	for (unsigned int i = 0; i < sizeof(keeper->stays) / sizeof(keeper->stays[0]); i++) {
		if (keeper->stays[i].start > at)
			raw2(__NR_munmap, at, keeper->stays[i].start - at);
		if (keeper->stays[i].end > at)
			at = keeper->stays[i].end;
	}
	raw2(__NR_munmap, at, ADDRESSES_END - at);
}

static struct keeper_slot *find(struct registry *registry, unsigned int letter)
{
	for (unsigned int i = 0; i < registry->nslots; i++)
		if (registry->slots[i].letter == letter)
			return &registry->slots[i];
	return 0;
}

static void add(struct registry *registry, unsigned int letter, unsigned int number, int fd)
{
	unsigned int i = 0;

	while (i < registry->nslots && registry->slots[i].letter)
		i++;
	if (i == KEEPER_SLOTS)
		return;
	registry->slots[i].fd = fd;
	registry->slots[i].number = number;
	if (i == registry->nslots)
		registry->nslots = i + 1;
	registry->slots[i].letter = letter;
}

/* A FORK that was read and not applied has put the child's userfaultfd into the table, and only the ring knows it. */
static void look_for_forks(struct registry *registry)
{
	unsigned int nslots = registry->nslots;

	for (unsigned int i = 0; i < nslots; i++) {
		const struct snapd_uffd_msg *ring;
		long at;

		if (registry->slots[i].letter != KEEP_PAGE_MAP || registry->slots[i].scanned)
			continue;
		at = raw6(__NR_mmap, 0, PM_TABLE_OFFSET, PROT_READ, MAP_SHARED, registry->slots[i].fd, 0);
		if (at < 0 && at > -4096)
			continue;
		ring = (const void *)(at + (long)PM_RING_OFFSET);
		for (unsigned int k = 0; k < (PM_TABLE_OFFSET - PM_RING_OFFSET) / sizeof(*ring); k++)
			if (ring[k].event == SNAPD_UFFD_EVENT_FORK &&
			    raw3(__NR_fcntl, ring[k].arg.fork.ufd, F_GETFD, 0) >= 0)
				add(registry, KEEP_FORK, ring[k].arg.fork.ufd, (int)ring[k].arg.fork.ufd);
		raw2(__NR_munmap, at, PM_TABLE_OFFSET);
		registry->slots[i].scanned = 1;
	}
}

/* Lays the descriptors out from FIRST_FD on, and closes all others but standard input, output and error. Whoever takes
 * over when this process dies in the middle finds each slot's descriptor open. Returns how many there are. */
static unsigned int lay_out(struct keeper *keeper)
{
	struct registry *registry = keeper->registry;
	unsigned int n = 0, i, end;
	char *name = add_text(keeper->names, "LISTEN_FDNAMES=");

	for (i = 0; i < registry->nslots; i++)
		n += registry->slots[i].letter != 0;
	end = FIRST_FD + n;
	for (i = 0; i < registry->nslots; i++) {
		struct keeper_slot *slot = &registry->slots[i];
		long fd;

		if (!slot->letter || slot->fd >= (int)end)
			continue;
		fd = raw3(__NR_fcntl, slot->fd, F_DUPFD_CLOEXEC, end);
		if (fd >= 0) {
			slot->fd = (int)fd;
		} else {
			say("snapd: ERROR: the keeper could not keep a descriptor\n");
			slot->letter = 0;
		}
	}
	raw3(__NR_close_range, FIRST_FD, end - 1, 0);
	n = 0;
	for (i = 0; i < registry->nslots; i++) {
		struct keeper_slot *slot = &registry->slots[i];

		if (!slot->letter)
			continue;
		if (name - keeper->names > (long)KEEPER_NAMES_BYTES - 32 ||
		    raw2(__NR_dup2, slot->fd, FIRST_FD + n) < 0) {
			say("snapd: ERROR: the keeper could not hand a descriptor over\n");
			slot->letter = 0;
			continue;
		}
		slot->fd = (int)(FIRST_FD + n++);
		if (n > 1)
			name = add_text(name, ":");
		*name++ = (char)slot->letter;
		*name++ = '.';
		name = add_number(name, slot->number, 16);
	}
	raw3(__NR_close_range, FIRST_FD + n, ~0U, 0);
	return n;
}

/* Targets wait until the next daemon serves them, whatever else the machine has to do. It is an ordinary process again
 * then. */
static void hurry(void)
{
	struct sched_param param = {.sched_priority = 1};

	raw3(__NR_sched_setscheduler, 0, SCHED_FIFO, &param);
}

/* The next daemon has no keeper of its own at first, and a death then must not be the end. Returns 0 in the new
 * keeper. */
static long divide(struct registry *registry, int me)
{
	struct keeper_slot *watched = find(registry, KEEP_WATCHED);
	long fd = raw2(__NR_pidfd_open, me, 0), pid;

	if (fd >= 0 && watched)
		watched->fd = (int)fd;
	else if (fd >= 0)
		add(registry, KEEP_WATCHED, 0, (int)fd);
	pid = raw5(__NR_clone, CLONE_FILES, 0, 0, 0, 0);
	if (pid < 0)
		say("snapd: WARNING: the keeper could not make an understudy of its own\n");
	return pid;
}

/* A daemon that dies again and again is started less and less often. */
static void pause_before_start(struct registry *registry)
{
	unsigned long long lived = registry->serving_ns ? registry->died_ns - registry->serving_ns : 0;
	char text[128];
	long seconds = 1;

	if (registry->ending == ENDING_UPGRADE) {
		registry->young_deaths = 0;
		return;
	}
	registry->young_deaths = lived < YOUNG_NS ? registry->young_deaths + 1 : 0;
	say("snapd: WARNING: the daemon has died; the next one starts and takes its targets over\n");
	if (registry->young_deaths < FEW_DEATHS)
		return;
	for (unsigned int i = FEW_DEATHS; i < registry->young_deaths && seconds < LONGEST_PAUSE_S; i++)
		seconds *= 2;
	add_text(add_number(add_text(add_number(add_text(text, "snapd: ERROR: the daemon has died young "),
						registry->young_deaths, 10),
				     " times in a row; the next one starts in "),
			    (unsigned long)seconds, 10),
		 " s\n");
	say(text);
	pause_for(seconds, 0);
}

static void wait_for_death(struct registry *registry)
{
	for (;;) {
		struct keeper_slot *watched = find(registry, KEEP_WATCHED);
		struct pollfd wait = {.fd = watched ? watched->fd : -1, .events = POLLIN};

		if (raw5(__NR_ppoll, &wait, 1, 0, 0, 8) > 0 && wait.revents & POLLIN)
			return;
		/* Whoever lays the descriptors out is just moving this one. */
		pause_for(0, WATCH_PAUSE_NS);
	}
}

static void become_daemon(struct keeper *keeper, int me, unsigned int nfds)
{
	int n = keeper->nenv;

	add_number(add_text(keeper->pid_text, "LISTEN_PID="), (unsigned long)me, 10);
	add_number(add_text(keeper->fds_text, "LISTEN_FDS="), nfds, 10);
	keeper->envp[n] = keeper->pid_text;
	keeper->envp[n + 1] = keeper->fds_text;
	keeper->envp[n + 2] = keeper->names;
	keeper->envp[n + 3] = 0;
	for (;;) {
		raw3(__NR_execve, keeper->path, keeper->argv, keeper->envp);
		say("snapd: ERROR: the next daemon could not be executed; trying again\n");
		pause_for(EXEC_PAUSE_S, 0);
	}
}

void keeper_main(void *arg)
{
	struct keeper *keeper = arg;
	struct registry *registry = keeper->registry;
	int32_t former = keeper->former;

	raw5(__NR_prctl, PR_SET_NAME, "snapd-keeper", 0, 0, 0);
	unmap_the_rest(keeper);
	for (;;) {
		int32_t me = (int32_t)raw0(__NR_getpid), mine = me;
		unsigned int nfds;

		/* A former keeper that has taken its turn meanwhile is the next daemon already. */
		if (!atomic_compare_exchange_strong(&registry->keeper, &former, me))
			break;
		wait_for_death(registry);
		if (!atomic_compare_exchange_strong(&registry->keeper, &mine, -me) || registry->ending == ENDING_STOP)
			break;
		if (!registry->died_ns)
			registry->died_ns = now();
		hurry();
		look_for_forks(registry);
		if (divide(registry, me) == 0) {
			former = -me;
			continue;
		}
		nfds = lay_out(keeper); /* what else the dead daemon had ends now, however long the pause */
		pause_before_start(registry);
		registry->ending = ENDING_NONE;
		registry->serving_ns = 0;
		become_daemon(keeper, me, nfds);
	}
	raw1(__NR_exit_group, 0);
}
