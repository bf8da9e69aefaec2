/* Haste: a thread that the whole program waits for goes before all others for a moment, and is scheduled as it was
 * afterwards: policy, nice value, slice, timer slack, and whether its children start anew.
 *
 * What it had is written down where a successor finds it before it changes. Knows no stops.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PRIORITY 1

/* Each thread has its own place in /proc by its number, though it is not listed. */
static int open_slack(pid_t tid, int flags)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/timerslack_ns", tid);
	return open(path, flags | O_CLOEXEC);
}

static int get(pid_t tid, struct snapd_sched_attr *ret)
{
	*ret = (struct snapd_sched_attr){.size = sizeof(*ret)};
	return syscall(SYS_sched_getattr, tid, ret, sizeof(*ret), 0) ? -errno : 0;
}

static int set(pid_t tid, struct snapd_sched_attr *attr)
{
	attr->size = sizeof(*attr);
	return syscall(SYS_sched_setattr, tid, attr, 0) ? -errno : 0;
}

/* A slice that is not the common one was given to the thread; the common one is 0 to the kernel. */
static uint64_t own_slice(uint64_t slice)
{
	struct snapd_sched_attr common;

	return get(getpid(), &common) == 0 && common.runtime == slice ? 0 : slice;
}

static bool is_common(const struct snapd_sched_attr *attr)
{
	return attr->policy == SCHED_OTHER || attr->policy == SCHED_BATCH || attr->policy == SCHED_IDLE;
}

/* Whoever has a policy of the stricter kind keeps it. */
void haste_begin(pid_t tid, struct haste *ret)
{
	struct snapd_sched_attr was, now = {.policy = SCHED_FIFO, .priority = PRIORITY};
	char text[32] = "";
	int fd;

	ret->tid = 0;
	if (get(tid, &was) || !is_common(&was))
		return;
	fd = open_slack(tid, O_RDONLY);
	if (fd < 0)
		return;
	if (read(fd, text, sizeof(text) - 1) > 0) {
		ret->was = (struct snapd_sched_attr){.size = sizeof(was), .policy = was.policy, .nice = was.nice,
						     .flags = was.flags & SNAPD_SCHED_RESET_ON_FORK,
						     .runtime = own_slice(was.runtime)};
		ret->slack_ns = strtoull(text, NULL, 10);
		atomic_store(&ret->tid, tid);
		now.flags = ret->was.flags;
		if (set(tid, &now))
			atomic_store(&ret->tid, 0);
	}
	close(fd);
}

/* Not if somebody else has given it another policy meanwhile; a nice value of somebody else's stays as well. */
void haste_end(struct haste *haste)
{
	pid_t tid = atomic_load(&haste->tid);
	struct snapd_sched_attr now, was = haste->was;
	long nice;
	int fd;

	if (!tid)
		return;
	if (get(tid, &now) == 0 && now.policy == SCHED_FIFO && now.priority == PRIORITY) {
		nice = syscall(SYS_getpriority, PRIO_PROCESS, tid);
		if (nice > 0)
			was.nice = 20 - (int32_t)nice;
		set(tid, &was);
		fd = open_slack(tid, O_WRONLY); /* it was lost with the policy */
		if (fd >= 0) {
			dprintf(fd, "%llu", (unsigned long long)haste->slack_ns);
			close(fd);
		}
	}
	atomic_store(&haste->tid, 0);
}

/* After a daemon's death: a thread of this process that it had lent may still have what it was given. What is noted
 * comes from a page map: it gives nobody more than a common thread has. */
void haste_end_former(struct haste *haste, int pid)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/task/%d", pid, atomic_load(&haste->tid));
	haste->was.flags &= SNAPD_SCHED_RESET_ON_FORK;
	if (atomic_load(&haste->tid) > 0 && is_common(&haste->was) && access(path, F_OK) == 0)
		haste_end(haste);
	atomic_store(&haste->tid, 0);
}
