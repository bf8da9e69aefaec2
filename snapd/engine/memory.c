/* The target's memory: what is read of it, and what is said to be there.
 *
 * All of it goes by descriptors of /proc that are known to be of the userfaultfd's own address space: a process id may
 * have become another program's, and that of a thread that has ended shows nothing. A read of /proc/PID/mem answers EIO
 * for a page that is not there, and so never waits for a fill. Knows no entries.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define LOOKS 2
#define LOOK_PAUSE_US 200
#define PF_EXITING 0x4
#define MARK_TRIES 1000
#define ROUNDS 2

static int open_at(int directory, const char *name, int flags)
{
	int fd = openat(directory, name, flags | O_RDONLY | O_CLOEXEC);

	return fd < 0 ? -errno : fd;
}

static void close_fd(int fd)
{
	if (fd >= 0)
		close(fd);
}

static void publish(atomic_int *place, int fd)
{
	int none = -1;

	if (!atomic_compare_exchange_strong(place, &none, fd))
		close(fd);
}

/* Whether a pagemap is of the userfaultfd's own address space: then it shows the sentinel write-protected or not as we
 * have it. For a running reader: while an event is unread nothing can be protected. */
static int prove(struct sn_session *session, int pagemap)
{
	for (int round = 0; round < 2 * ROUNDS; round++) {
		int on = round % 2 == 0, error = -EAGAIN;

		for (int tries = 0; tries < MARK_TRIES && error == -EAGAIN; tries++) {
			error = sn_session_mark(session, on);
			if (error == -EAGAIN)
				usleep(1000);
		}
		if (error)
			return error;
		if (sn_marked(pagemap, session->sentinel) != on)
			return -ESTALE;
	}
	return 0;
}

enum { MEM, MAPS, PAGEMAP, FILES };

static bool is_denied(int error)
{
	return error == -EACCES || error == -EPERM;
}

/* By way of an agent's thread: a leader that has ended shows nothing. pagemap is opened last: all are of the address
 * space that it proves to be of, since no thread can go back to one that it has left. The memory itself may be denied
 * where the rest is not: until the agent of a plain user has told Yama of a new daemon. */
static int open_all(struct sn_session *session, int process, int fds[FILES])
{
	static const char *const names[FILES] = {"mem", "maps", "pagemap"};
	int tid = session->agent_tids[0];

	for (int i = 0; i < FILES; i++) {
		int fault = i == MEM ? FAULT_ERROR(FP_MEM_OPEN) : i == PAGEMAP ? FAULT_ERROR(FP_PAGEMAP_OPEN) : 0;
		char path[64];

		if (tid)
			snprintf(path, sizeof(path), "task/%d/%s", tid, names[i]);
		else
			snprintf(path, sizeof(path), "%s", names[i]);
		fds[i] = fault ? fault : open_at(process, path, 0);
		if (fds[i] < 0 && !(i == MEM && is_denied(fds[i])))
			return fds[i];
	}
	return prove(session, fds[PAGEMAP]);
}

int memory_open(struct sn_session *session)
{
	int process, fds[FILES] = {-1, -1, -1}, error;
	char path[32];

	if (atomic_load(&session->mem_fd) >= 0)
		return 0;
	snprintf(path, sizeof(path), "/proc/%d", atomic_load(&session->pid));
	process = open_at(AT_FDCWD, path, O_DIRECTORY);
	error = process < 0 ? process : open_all(session, process, fds);
	if (error) {
		for (int i = 0; i < FILES; i++)
			close_fd(fds[i]);
		close_fd(process);
		return error == -ENOENT ? -ESRCH : error;
	}
	publish(&session->process_fd, process);
	publish(&session->maps_fd, fds[MAPS]);
	publish(&session->pagemap_fd, fds[PAGEMAP]);
	if (fds[MEM] < 0)
		return fds[MEM];
	publish(&session->mem_fd, fds[MEM]);
	return 0;
}

void memory_close(struct sn_session *session)
{
	close_fd(session->maps_fd);
	close_fd(session->pagemap_fd);
	close_fd(session->process_fd);
	close_fd(session->mem_fd);
}

/* Bytes that are there, up to the first page that is not; -EIO when that is the first one, -ESRCH when the address
 * space is gone. */
long memory_read(struct sn_session *session, uint64_t from, void *to, uint64_t bytes)
{
	int fd = atomic_load(&session->mem_fd);
	int fault = FAULT_ERROR(FP_MEMORY_READ);
	ssize_t n;

	if (fd < 0 || fault)
		return -EIO;
	do {
		n = pread(fd, to, bytes, (off_t)from);
	} while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n ? n : -ESRCH;
}

/* Whether the target is being killed or has ended: told before the kernel takes anything of its memory, since the exit
 * code of the whole process is set when the signal is sent. A leader that ended by itself and left others is no end.
 * Asked of the agent's thread, which nobody stops: one that is traced shows what stopped it in the same place. */
static bool looks_ending(struct sn_session *session)
{
	int process = atomic_load(&session->process_fd), fd = -ENOENT;
	unsigned int flags = 0, nthreads = 0, code;
	char text[1024], *field, state = 0;
	ssize_t n;

	snprintf(text, sizeof(text), "task/%d/stat", session->agent_tids[0]);
	if (session->agent_tids[0])
		fd = open_at(process, text, 0);
	if (fd < 0)
		fd = open_at(process, "stat", 0);
	if (fd < 0)
		return true;
	n = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (n <= 0)
		return true;
	text[n] = 0;
	field = strrchr(text, ')');
	if (!field || sscanf(field + 1,
			     " %c %*d %*d %*d %*d %*d %u" /* state to flags */
			     " %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %u", /* to num_threads */
			     &state, &flags, &nthreads) != 3)
		return true;
	field = strrchr(text, ' ');
	code = field ? (unsigned int)strtoul(field, NULL, 10) : 0;
	/* A stopped process shows the signal that stopped it in the same place. */
	return (flags & PF_EXITING && nthreads < 2) ||
	       (code && state != 't' && code != SIGSTOP && code != SIGTSTP && code != SIGTTIN && code != SIGTTOU);
}

/* Without an agent it is a thread that stops and is let go: then its state and the rest may be of two moments. */
bool memory_is_ending(struct sn_session *session)
{
	for (int looks = 0; looks_ending(session); looks++) {
		if (session->agent_tids[0] || looks == LOOKS)
			return true;
		usleep(LOOK_PAUSE_US);
	}
	return false;
}

/* Whether a page that was there and can't be read was freed lazily (MADV_FREE) and then taken by the kernel: then it is
 * zeros, as the program asked. Not so where it is there after all (a read of swap failed, the memory is broken), where
 * nothing is mapped, or where a killed process's memory is taken from it. */
bool memory_is_freed(struct sn_session *session, uint64_t address)
{
	struct snapd_procmap_query vma = {.size = sizeof(vma), .query_addr = address};
	const uint64_t there = SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED | SNAPD_PAGE_IS_GUARD;
	struct snapd_page_region region;

	return ioctl(atomic_load(&session->maps_fd), SNAPD_PROCMAP_QUERY, &vma) == 0 &&
	       pagemap_scan(atomic_load(&session->pagemap_fd), address, address + PAGE, there, there, 0, &region, 1,
			    NULL) == 0 &&
	       !memory_is_ending(session);
}

/* A copy would overwrite a guard that the program installed without any event. */
bool memory_has_guard(struct sn_session *session, uint64_t start, uint64_t npages)
{
	int fd = atomic_load(&session->pagemap_fd);
	struct snapd_page_region region;

	return fd >= 0 && pagemap_scan(fd, start, start + npages * PAGE, SNAPD_PAGE_IS_GUARD, SNAPD_PAGE_IS_GUARD, 0,
				       &region, 1, NULL) > 0;
}
