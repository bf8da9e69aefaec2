/* Bulk: runs of stored pages that are read, decoded and copied together, for restore and prefetch.
 *
 * Demand fills go on beside it: both look again at the entries under the session's lock before a COPY. Owns buffers for
 * one run; the caller decides which pages and when.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define READ_BYTES (1UL << 20)
#define BUFFER_BYTES (RUN_PAGES * PAGE + READ_BYTES)
#define AHEAD_BYTES (4UL << 20)
#define MAX_TRIES 20000
#define RETRY_US 100

int bulk_init(struct bulk *bulk, struct sn_session *session, bool keep_frames)
{
	*bulk = (struct bulk){.session = session, .keep_frames = keep_frames};
	bulk->opener = frame_opener_create();
	if (!bulk->opener)
		return -ENOMEM;
	bulk->pages = mmap(NULL, BUFFER_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (bulk->pages == MAP_FAILED) {
		frame_opener_destroy(bulk->opener);
		return -ENOMEM;
	}
	bulk->frames = bulk->pages + RUN_PAGES * PAGE;
	return 0;
}

void bulk_deinit(struct bulk *bulk)
{
	frame_opener_destroy(bulk->opener);
	munmap(bulk->pages, BUFFER_BYTES);
}

/* Finds the next pages to bring back at or behind *at; *at becomes where the search goes on. */
bool bulk_next(struct sn_session *session, uint64_t *at, uint64_t end, struct run *ret)
{
	const struct table *table;

	ret->n = 0;
	session_share(session);
	ret->reused = atomic_load(&session->store->reused);
	table = pm_table(&session->pm);
	for (long i = pm_first_at(table, *at); i < (long)table->nrecords && !ret->n; i++) {
		const struct record *record = &table->records[i];
		uint64_t from = max_u64(record->start, *at);
		uint64_t upto = min_u64(record->start + record->npages * PAGE, end);

		for (uint64_t address = from; record->first != NO_ENTRIES && address < upto; address += PAGE) {
			uint64_t index = record->first + (address - record->start) / PAGE;
			uint64_t entry = session->pm.entries[index];
			bool stored = ENTRY_STATE(entry) == ST_STORED && !(entry & ENTRY_MOVING);
			bool single = entry & ENTRY_MOVING || ENTRY_STATE(entry) == ST_ASIDE ||
				ENTRY_STATE(entry) == ST_BAD;

			if (ret->n && (!stored || ret->n == RUN_PAGES))
				break;
			*at = address + PAGE;
			if (!stored && !single)
				continue;
			if (!ret->n) {
				ret->start = address;
				ret->first = index;
			}
			ret->entries[ret->n++] = entry;
			if (single)
				break;
		}
		if (record->start >= end)
			break;
	}
	pthread_rwlock_unlock(&session->lock);
	return ret->n > 0;
}

/* The disk works ahead of a reader that goes through the file: once for each few segments. */
static void read_ahead(struct bulk *bulk, uint64_t offset)
{
	if (offset + AHEAD_BYTES / 2 < bulk->ahead && offset + 2 * AHEAD_BYTES > bulk->ahead)
		return;
	posix_fadvise(bulk->session->store->fd, (off_t)offset, AHEAD_BYTES, POSIX_FADV_WILLNEED);
	bulk->ahead = offset + AHEAD_BYTES;
}

/* Reads and decodes; frames that follow each other in the file come by one read. Returns how many pages are good. */
uint64_t bulk_decode(struct bulk *bulk, const struct run *run, bool nowait)
{
	uint64_t done = 0;

	while (done < run->n) {
		uint64_t offset = ENTRY_OFFSET(run->entries[done]), bytes = 0, n = done, used = 0;
		struct iovec iov = {bulk->frames, 0};
		int fault = FAULT_ERROR(FP_BULK_READ);
		ssize_t got;

		while (n < run->n && ENTRY_OFFSET(run->entries[n]) == offset + bytes &&
		       bytes + ENTRY_BYTES(run->entries[n]) <= READ_BYTES)
			bytes += ENTRY_BYTES(run->entries[n++]);
		iov.iov_len = bytes;
		if (!nowait)
			read_ahead(bulk, offset);
		do {
			got = preadv2(bulk->session->store->fd, &iov, 1, (off_t)offset, nowait ? RWF_NOWAIT : 0);
		} while (got < 0 && errno == EINTR);
		if (fault || got != (ssize_t)bytes)
			return done;
		for (; done < n; done++) {
			uint64_t length = ENTRY_BYTES(run->entries[done]);

			if (frame_open(bulk->opener, bulk->session->store, offset + used, bulk->frames + used,
				       length, bulk->pages + done * PAGE) != FRAME_OK)
				return done;
			used += length;
		}
	}
	return done;
}

/* Pages are in. A prefetched one keeps its frame and is write-protected, so that it is known for clean while nobody
 * writes; a restored one forgets it: its mapping is on the way to be released. */
static void came_in(struct bulk *bulk, const struct run *run, uint64_t from, uint64_t count)
{
	for (uint64_t k = from; k < from + count; k++) {
		uint64_t old = run->entries[k], new = bulk->keep_frames ? ENTRY_WITH(old, ST_FILLED) : ST_NONE;

		if (atomic_compare_exchange_strong(&bulk->session->pm.entries[run->first + k], &old, new) &&
		    !bulk->keep_frames)
			store_unhold_entry(bulk->session->store, old);
		bulk->filled++;
	}
}

static bool unchanged(struct sn_session *session, const struct run *run, uint64_t from, uint64_t count)
{
	const struct table *table = pm_table(&session->pm);
	long i = pm_find(table, run->start + from * PAGE);
	const struct record *record = i >= 0 ? &table->records[i] : NULL;

	if (session->unseen || run->reused != atomic_load(&session->store->reused) || !record ||
	    record->first == NO_ENTRIES ||
		record->first + (run->start + from * PAGE - record->start) / PAGE != run->first + from ||
	    record->start + record->npages * PAGE < run->start + (from + count) * PAGE)
		return false;
	for (uint64_t k = from; k < from + count; k++)
		if (session->pm.entries[run->first + k] != run->entries[k])
			return false;
	return true;
}

/* Puts the first so many pages of a run into the target, where nothing has changed. */
int bulk_copy(struct bulk *bulk, const struct run *run, const unsigned char *pages, uint64_t good)
{
	struct sn_session *session = bulk->session;
	uint64_t from = 0, most = good;
	int tries = 0;

	while (from < good) {
		uint64_t done = 0, address = run->start + from * PAGE, count = min_u64(good - from, most);
		enum uffd_result result = UFFD_DONE;
		bool same;

		session_share(session);
		/* Decoding took its time: the program may have installed a guard meanwhile. Where nobody can look,
		 * nothing is put that nobody asked for. */
		same = unchanged(session, run, from, count) && !memory_has_guard(session, address, count) &&
		       (!bulk->keep_frames || atomic_load(&session->pagemap_fd) >= 0);
		if (same) {
			result = uffd_copy(session->uffd, address, pages + from * PAGE, count * PAGE,
					   bulk->keep_frames ? SNAPD_UFFDIO_COPY_MODE_WP : 0, &done);
			FAULT_POINT(FP_RESTORED);
			came_in(bulk, run, from, done / PAGE);
			if (!done && result == UFFD_EXISTS) { /* what is there is newer */
				uffd_wake(session->uffd, address, PAGE);
				came_in(bulk, run, from, 1);
				done = PAGE;
			}
		}
		pthread_rwlock_unlock(&session->lock);
		if (!same && !bulk->keep_frames)
			return 0; /* the caller looks anew */
		if (!same) { /* a demand fill may have taken one of them: the others are right still */
			from += count == 1;
			most = max_u64(count / 2, 1);
			continue;
		}
		from += done / PAGE;
		/* A record may be of mappings side by side, and a COPY across their edge does nothing at all. One page
		 * that is in none is nobody's to fill. */
		if (result == UFFD_UNMAPPED && !done) {
			from += count == 1;
			most = max_u64(count / 2, 1);
			continue;
		}
		most = max_u64(most, 2 * done / PAGE);
		if (done)
			tries = 0;
		else if (result == UFFD_GONE)
			return -ESRCH;
		else if (result == UFFD_NO_MEMORY)
			return -ENOMEM;
		else if (bulk->keep_frames) /* the reader's own thread: an event waits for it */
			return -EAGAIN;
		else if (++tries > MAX_TRIES)
			return 0;
		else
			usleep(RETRY_US);
	}
	return 0;
}
