/* Robust futexes: when a thread ends, the kernel walks its list of them and marks each one that it held. By then the
 * thread can no longer fault, so what the kernel will look at has to be in memory all the time.
 *
 * Owns the pages that stay for it: they are found at each full stop, before anything is moved. A futex that is taken
 * later is in memory because it was taken, and stays until the next stop, which finds it.
 */
#include "internal.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#define LIST_LIMIT 2048 /* the kernel goes no further */
#define MAX_ABSENT 16

struct robust {
	int npages, nabsent;
	uint64_t pages[MAX_KEPT];
	uint64_t absent[MAX_ABSENT]; /* out, but reachable by a list */
};

struct robust *robust_create(void)
{
	return calloc(1, sizeof(struct robust));
}

void robust_destroy(struct robust *robust)
{
	free(robust);
}

static bool is_out(struct sn_session *session, uint64_t page)
{
	bool ret = false;
	long i;

	pthread_rwlock_rdlock(&session->lock);
	i = pm_find(pm_table(&session->pm), page);
	if (i >= 0 && pm_table(&session->pm)->records[i].first != NO_ENTRIES) {
		const struct record *record = &pm_table(&session->pm)->records[i];
		enum state state = ENTRY_STATE(session->pm.entries[record->first + (page - record->start) / PAGE]);

		ret = state == ST_ASIDE || state == ST_STORED || state == ST_ZERO;
	}
	pthread_rwlock_unlock(&session->lock);
	return ret;
}

static int keep(struct robust *robust, uint64_t page)
{
	/* Most lists are empty, and most locks lie close together: the last few are enough to look at. */
	for (int i = robust->npages - 1; i >= 0 && i >= robust->npages - 8; i--)
		if (robust->pages[i] == page)
			return 0;
	if (robust->npages == MAX_KEPT)
		return -E2BIG;
	robust->pages[robust->npages++] = page;
	return 0;
}

/* What the kernel will read or write; never waits for what is out. -EFAULT: the kernel could not, whatever we do, or
 * not while a page is out, which is noted; -E2BIG. */
static int see(struct sn_session *session, uint64_t address, void *to, size_t bytes)
{
	struct robust *robust = session->robust;
	uint64_t first = PAGE_DOWN(address), last = PAGE_DOWN(address + bytes - 1);
	int error;

	if (last < first)
		return -EFAULT;
	error = keep(robust, first);
	if (!error && last != first)
		error = keep(robust, last);
	if (error || memory_read(session, address, to, bytes) == (long)bytes)
		return error;
	for (uint64_t page = first; page <= last; page += PAGE)
		if (robust->nabsent < MAX_ABSENT && is_out(session, page))
			robust->absent[robust->nabsent++] = page;
	return -EFAULT;
}

/* The lowest bit of a pointer says that the futex inherits priorities. */
static uint64_t plain(const void *pointer)
{
	return (uint64_t)pointer & ~1UL;
}

static int see_futex(struct sn_session *session, uint64_t entry, long offset)
{
	uint32_t word;

	return see(session, entry + (uint64_t)offset, &word, sizeof(word));
}

/* As exit_robust_list() of the kernel goes; it ends where something can't be read. */
static int walk(struct sn_session *session, uint64_t at)
{
	struct robust_list_head head;
	struct robust_list next;
	uint64_t entry;
	int error = see(session, at, &head, sizeof(head));

	if (error)
		return error;
	if (head.list_op_pending)
		error = see_futex(session, plain(head.list_op_pending), head.futex_offset);
	entry = plain(head.list.next);
	for (int n = 0; error != -E2BIG && entry != at && n < LIST_LIMIT; n++) {
		error = see_futex(session, entry, head.futex_offset);
		if (error != -E2BIG)
			error = see(session, entry, &next, sizeof(next));
		if (error)
			return error;
		entry = plain(next.next);
	}
	return error;
}

/* At a full stop: finds all pages that must stay. Returns 0 or a negative errno: then nothing may be moved, for what is
 * behind the place that could not be seen is not known. */
int robust_look(struct sn_session *session)
{
	struct robust *robust = session->robust;
	int error = 0;

	robust->npages = robust->nabsent = 0;
	for (int i = 0; error != -E2BIG && i < stop_threads(session->stop); i++) {
		pid_t tid = stop_thread(session->stop, i);
		struct robust_list_head *head;
		size_t bytes;

		if (tid && syscall(SYS_get_robust_list, tid, &head, &bytes) == 0 && head)
			error = walk(session, (uint64_t)head);
	}
	return error == -E2BIG ? error : robust->nabsent ? -ENODATA : 0;
}

/* After the stop: brings what was out and must not be. */
void robust_fill(struct sn_session *session)
{
	uint64_t now = now_ns();

	for (int i = 0; i < session->robust->nabsent; i++)
		fill_queue(session, (struct fault){.address = session->robust->absent[i], .unasked = true,
			.since_ns = now, .due_ns = now});
	session->robust->nabsent = 0;
}

bool robust_touches(const struct robust *robust, uint64_t start, uint64_t end)
{
	for (int i = 0; i < robust->npages; i++)
		if (robust->pages[i] >= start && robust->pages[i] < end)
			return true;
	return false;
}

int robust_pages(const struct robust *robust, uint64_t *ret, int capacity)
{
	int n = robust->npages < capacity ? robust->npages : capacity;

	memcpy(ret, robust->pages, (size_t)n * sizeof(ret[0]));
	return n;
}
