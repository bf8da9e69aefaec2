/* Headroom: how much memory a process may still take before its control groups, or the machine, have none.
 *
 * A COPY is charged to the target, and at the limit of its group the kernel may kill it for a page that it did not ask
 * for. Several may be brought pages at the same time: what one has been promised is not there for the next. Knows both
 * versions of control groups; what can't be read is no limit.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define ROOM_PART 2 /* of the memory that is left, one part in so many may be taken */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t promised; /* whatever groups they are in: those may have a limit together further up */

static const struct version {
	const char *mark, *root, *limits[2], *used;
} versions[] = {
	{"0::", "/sys/fs/cgroup", {"memory.max", "memory.high"}, "memory.current"},
	{":memory:", "/sys/fs/cgroup/memory", {"memory.limit_in_bytes", "memory.soft_limit_in_bytes"},
	 "memory.usage_in_bytes"},
};

static bool read_text(const char *path, char *text, size_t bytes)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n;

	if (fd < 0)
		return false;
	n = read(fd, text, bytes - 1);
	close(fd);
	text[n > 0 ? n : 0] = 0;
	return n > 0;
}

/* A file of a group with one number; ~0 for "max", and where there is none. */
static uint64_t read_number(const char *top, const struct version *version, const char *group, const char *name)
{
	char path[2 * PATH_MAX], text[64];

	snprintf(path, sizeof(path), "%s%s%s/%s", top, version->root, group, name);
	if (!read_text(path, text, sizeof(text)) || text[0] < '0' || text[0] > '9')
		return ~0ULL;
	return strtoull(text, NULL, 10);
}

/* Of a group and all that it is in. In a control group namespace the root is a group with limits, too. A group that
 * nobody here can see (of another namespace, or not mounted) may have any: nothing is left. */
static uint64_t left_of(const char *top, const struct version *version, char *group)
{
	uint64_t least = ~0ULL;
	bool seen = !group[1], more = true;
	char *end;

	if (strstr(group, "/.."))
		return 0;
	if (!group[1])
		group[0] = 0;
	while (more) {
		uint64_t used = read_number(top, version, group, version->used);

		seen |= used != ~0ULL;
		for (int i = 0; i < 2 && used != ~0ULL; i++) {
			uint64_t limit = read_number(top, version, group, version->limits[i]);

			if (limit != ~0ULL)
				least = min_u64(least, limit > used ? limit - used : 0);
		}
		end = strrchr(group, '/');
		more = end;
		if (end)
			*end = 0;
	}
	return seen ? least : 0;
}

/* What all programs of the machine may take together. */
static uint64_t available(void)
{
	char text[4096], *line;

	if (!read_text("/proc/meminfo", text, sizeof(text)))
		return ~0ULL;
	line = strstr(text, "MemAvailable:");
	return line ? strtoull(line + strlen("MemAvailable:"), NULL, 10) * 1024 : ~0ULL;
}

/* By what /proc/PID/cgroup says; top is what /sys is in. */
uint64_t sn_headroom(const char *top, const char *groups)
{
	uint64_t least = ~0ULL, left;

	for (size_t i = 0; i < sizeof(versions) / sizeof(versions[0]); i++) {
		const char *line = strstr(groups, versions[i].mark);
		char group[PATH_MAX];

		if (!line)
			continue;
		line += strlen(versions[i].mark);
		snprintf(group, sizeof(group), "%.*s", (int)strcspn(line, "\n"), line);
		left = left_of(top, &versions[i], group);
		least = min_u64(least, left);
	}
	return least;
}

uint64_t headroom(int pid)
{
	char path[64], text[PATH_MAX + 512];
	uint64_t least = available(), left;

	snprintf(path, sizeof(path), "/proc/%d/cgroup", pid);
	if (!read_text(path, text, sizeof(text)))
		return least;
	left = sn_headroom("", text);
	return min_u64(least, left);
}

int sn_headroom_take(int pid, uint64_t bytes)
{
	int error = 0;

	pthread_mutex_lock(&lock);
	if (headroom(pid) / ROOM_PART < promised + bytes)
		error = -ENOMEM;
	else
		promised += bytes;
	pthread_mutex_unlock(&lock);
	return error;
}

void sn_headroom_give(uint64_t bytes)
{
	pthread_mutex_lock(&lock);
	promised -= bytes;
	pthread_mutex_unlock(&lock);
}
