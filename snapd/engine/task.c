/* What /proc says of a thread of the target: for the few that a stop does not get hold of at once, and to find one that
 * can be borrowed.
 *
 * Knows nothing of stops.
 */
#include "internal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PF_IO_WORKER 0x10
#define PF_USER_WORKER 0x4000
#define PF_KTHREAD 0x200000
#define CANDIDATES_SEEN 128

static ssize_t read_task_file(int pid, pid_t tid, const char *name, char *ret, size_t room)
{
	char path[64];
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/%s", pid, tid, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	n = read(fd, ret, room - 1);
	close(fd);
	ret[n > 0 ? n : 0] = 0;
	return n;
}

/* The letter that ps shows; 'X' for a thread that is no longer there. */
static char state_of(int pid, pid_t tid, unsigned int *ret_flags)
{
	char text[512], state = 'X', *after;

	*ret_flags = 0;
	if (read_task_file(pid, tid, "stat", text, sizeof(text)) <= 0)
		return 'X';
	after = strrchr(text, ')');
	if (!after || sscanf(after + 1, " %c %*d %*d %*d %*d %*d %u", &state, ret_flags) != 2)
		return '?';
	return state;
}

/* Kernel workers of io_uring and dead leaders can't be traced and touch no memory by an address of ours that is being
 * moved: a worker's copy goes through page tables and faults like any other. */
bool task_may_be_left(int pid, pid_t tid)
{
	unsigned int flags;
	char state = state_of(pid, tid, &flags);

	return state == 'Z' || state == 'X' || flags & (PF_IO_WORKER | PF_USER_WORKER | PF_KTHREAD);
}

/* Another tracer, or none: then it has just let go, or the kernel does not let us. */
bool task_is_traced(int pid, pid_t tid)
{
	static const char field[] = "\nTracerPid:";
	char text[2048], *found;
	int tracer;

	if (read_task_file(pid, tid, "status", text, sizeof(text)) <= 0)
		return false;
	found = strstr(text, field);
	tracer = found ? atoi(found + sizeof(field) - 1) : 0;
	return tracer && syscall(SYS_tgkill, getpid(), tracer, 0);
}

/* It sleeps where no signal reaches it. */
bool task_is_deaf(int pid, pid_t tid)
{
	unsigned int flags;

	return state_of(pid, tid, &flags) == 'D';
}

/* A seccomp filter of the program's own is asked about each call of this thread. */
bool task_is_filtered(int pid, pid_t tid)
{
	static const char field[] = "\nSeccomp:";
	char text[8192], *found;

	if (read_task_file(pid, tid, "status", text, sizeof(text)) <= 0)
		return false;
	found = strstr(text, field);
	return found && atoi(found + sizeof(field) - 1) != 0;
}

/* Calls that a stop ends with EINTR. */
static bool is_touchy(long number)
{
	switch (number) {
	case SYS_epoll_wait:
	case SYS_epoll_pwait:
	case SYS_epoll_pwait2:
	case SYS_semop:
	case SYS_semtimedop:
	case SYS_rt_sigtimedwait:
	case SYS_io_getevents:
	case SYS_io_pgetevents:
	case SYS_io_uring_enter:
		return true;
	default:
		return false;
	}
}

/* How much it disturbs the program to borrow this thread; the less the better, negative for not at all. */
static int rank(int pid, pid_t tid)
{
	unsigned int flags;
	char state = state_of(pid, tid, &flags), text[256];

	if (flags & (PF_IO_WORKER | PF_USER_WORKER | PF_KTHREAD))
		return -1;
	if (state == 'R')
		return 1;
	if (state != 'S')
		return -1;
	if (read_task_file(pid, tid, "syscall", text, sizeof(text)) <= 0)
		return 1;
	return is_touchy(strtol(text, NULL, 10)) ? 2 : 0;
}

int task_candidates(int pid, pid_t *ret, int capacity)
{
	int ranks[CANDIDATES_SEEN], n = 0;
	pid_t tids[CANDIDATES_SEEN];
	struct dirent *entry;
	char path[32];
	DIR *tasks;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	tasks = opendir(path);
	if (!tasks)
		return -ESRCH;
	for (int good = 0; n < CANDIDATES_SEEN && good < capacity && (entry = readdir(tasks));) {
		tids[n] = atoi(entry->d_name);
		ranks[n] = tids[n] > 0 ? rank(pid, tids[n]) : -1;
		good += ranks[n] == 0;
		n += ranks[n] >= 0;
	}
	closedir(tasks);
	capacity = capacity < n ? capacity : n;
	for (int i = 0; i < capacity; i++) { /* the first of the best come first */
		int best = i, best_rank;
		pid_t best_tid;

		for (int k = i + 1; k < n; k++)
			if (ranks[k] < ranks[best])
				best = k;
		best_rank = ranks[best];
		best_tid = tids[best];
		ranks[best] = ranks[i];
		tids[best] = tids[i];
		ranks[i] = best_rank;
		ret[i] = best_tid;
	}
	return capacity;
}
