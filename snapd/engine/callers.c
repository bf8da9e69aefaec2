/* Which thread of the target is inside which call, as /proc says: for what the events do not say.
 *
 * For the reader, when memory has moved to a place before anybody said that the place was left: whoever left it has not
 * queued its event yet. It needs hardly any CPU for that, so a thread that ran on without doing so is not the one. And
 * for the new length of what has moved, which the event does not tell. Knows no page map. */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ENOUGH_NS 20000000ULL /* CPU time in which a late thread would have queued its event */
#define LIMIT_NS 5000000000ULL
#define PAUSE_US 50

struct names {
	uint64_t ino;
	int64_t off;
	unsigned short length;
	unsigned char type;
	char name[];
};

static ssize_t read_file(int tasks, pid_t tid, const char *name, char *text, size_t bytes)
{
	char path[48];
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "%d/%s", tid, name);
	fd = openat(tasks, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	n = read(fd, text, bytes - 1);
	close(fd);
	if (n < 0)
		return -errno;
	text[n] = 0;
	return n;
}

static bool meets(uint64_t start, uint64_t bytes, struct interval place)
{
	return start < place.end && place.start < start + bytes;
}

struct question {
	struct interval place; /* who takes memory away here? */
	uint64_t moved_from;   /* or, if not 0: to what length does this mremap bring what was here? */
	uint64_t ret_bytes;
};

static bool is_meant(const char *text, struct question *question)
{
	struct interval place = question->place;
	unsigned long a[6];
	long number;

	if (sscanf(text, "%ld %lx %lx %lx %lx %lx %lx", &number, &a[0], &a[1], &a[2], &a[3], &a[4], &a[5]) != 7)
		return false;
	if (question->moved_from) {
		question->ret_bytes = (a[2] + PAGE - 1) & ~(PAGE - 1);
		return number == SYS_mremap && a[0] == question->moved_from;
	}
	switch (number) {
	case SYS_mremap:
	case SYS_munmap:
		return meets(a[0], a[1], place);
	case SYS_mmap:
		return a[3] & MAP_FIXED && meets(a[0], a[1], place);
	case SYS_brk:
	case SYS_shmat:
		return true;
	default:
		return false;
	}
}

enum look { CALLER_THERE, CALLER_MAY_COME, CALLER_NONE };

/* One look at all threads. seen: what each had run at the first look. */
static enum look look(int tasks, struct question *question, struct caller *seen, unsigned int *nseen)
{
	enum look ret = CALLER_NONE;
	char buffer[4096], text[256];
	bool first = *nseen == 0;
	long n;

	lseek(tasks, 0, SEEK_SET);
	while ((n = syscall(SYS_getdents64, tasks, buffer, sizeof(buffer))) > 0) {
		for (long at = 0; at < n;) {
			const struct names *entry = (const void *)(buffer + at);
			pid_t tid = atoi(entry->name);
			unsigned long ran = 0;
			unsigned int i = 0;
			ssize_t read;

			at += entry->length;
			if (tid <= 0)
				continue;
			while (i < *nseen && seen[i].tid != tid)
				i++;
			if (i == *nseen) {
				if (!first || i == MAX_CALLERS)
					continue; /* it started after */
				seen[(*nseen)++] = (struct caller){.tid = tid};
			}
			if (seen[i].innocent)
				continue;
			read = read_file(tasks, tid, "syscall", text, sizeof(text));
			if (read == -EACCES || read == -EPERM) {
				return CALLER_THERE;
			} else if (read <= 0) {
				seen[i].innocent = true;
			} else if (text[0] != 'r') { /* not "running": it sleeps */
				if (is_meant(text, question))
					return CALLER_THERE;
				seen[i].innocent = true;
			} else if (read_file(tasks, tid, "schedstat", text, sizeof(text)) > 0 &&
				   sscanf(text, "%lu", &ran) == 1) {
				if (first)
					seen[i].ran_ns = ran;
				seen[i].innocent = ran - seen[i].ran_ns > ENOUGH_NS;
			}
			if (!seen[i].innocent)
				ret = CALLER_MAY_COME;
		}
	}
	return ret;
}

static bool await(int pid, struct question *question, struct caller *seen)
{
	uint64_t deadline = now_ns() + LIMIT_NS;
	enum look found = CALLER_MAY_COME;
	unsigned int nseen = 0;
	char path[48];
	int tasks;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	tasks = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (tasks < 0)
		return true;
	while (found == CALLER_MAY_COME && now_ns() < deadline) {
		found = look(tasks, question, seen, &nseen);
		if (found == CALLER_MAY_COME)
			usleep(PAUSE_US);
	}
	close(tasks);
	return found == CALLER_THERE;
}

bool callers_await(int pid, struct interval place, struct caller *seen)
{
	struct question question = {.place = place};

	return await(pid, &question, seen);
}

uint64_t callers_length(int pid, uint64_t moved_from, struct caller *seen)
{
	struct question question = {.moved_from = moved_from};

	return await(pid, &question, seen) ? question.ret_bytes : 0;
}
