/* Restore: every page of an interval comes back now, in runs; and the release of mappings in which nothing is out.
 *
 * Demand fills go on beside it: both look again at the entries under the session's lock before a COPY.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define RUN_PAGES 128
#define READ_BYTES (1UL << 20)
#define MAX_TRIES 20000
#define RETRY_US 100

struct run {
	uint64_t start, first;
	uint64_t entries[RUN_PAGES];
	uint64_t n;
};

struct work {
	struct sn_session *session;
	struct filler filler;
	unsigned char *pages, *frames;
	int pagemap;
	uint64_t filled;
};

/* Finds the next pages to bring back at or behind *at; *at becomes where the search goes on. */
static bool next_run(struct sn_session *session, uint64_t *at, uint64_t end, struct run *ret)
{
	const struct table *table;

	ret->n = 0;
	pthread_rwlock_rdlock(&session->lock);
	table = pm_table(&session->pm);
	for (long i = pm_first_at(table, *at); i < (long)table->nrecords && !ret->n; i++) {
		const struct record *record = &table->records[i];
		uint64_t from = max_u64(record->start, *at);
		uint64_t upto = min_u64(record->start + record->npages * PAGE, end);

		for (uint64_t address = from; address < upto; address += PAGE) {
			uint64_t index = record->first + (address - record->start) / PAGE;
			uint64_t entry = session->pm.entries[index];
			bool stored = ENTRY_STATE(entry) == ST_STORED && !(entry & ENTRY_MOVING);
			bool single = entry & ENTRY_MOVING || ENTRY_STATE(entry) == ST_ASIDE || ENTRY_STATE(entry) == ST_BAD;

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

/* Reads and decodes; frames that follow each other in the file come by one read. Returns how many pages are good. */
static uint64_t decode_run(struct work *work, const struct run *run)
{
	uint64_t done = 0;

	while (done < run->n) {
		uint64_t offset = ENTRY_OFFSET(run->entries[done]), bytes = 0, n = done, used = 0;
		ssize_t got;

		while (n < run->n && ENTRY_OFFSET(run->entries[n]) == offset + bytes &&
		       bytes + ENTRY_BYTES(run->entries[n]) <= READ_BYTES)
			bytes += ENTRY_BYTES(run->entries[n++]);
		do {
			got = pread(work->session->store->fd, work->frames, bytes, (off_t)offset);
		} while (got < 0 && errno == EINTR);
		if (got != (ssize_t)bytes)
			return done;
		for (; done < n; done++) {
			uint64_t length = ENTRY_BYTES(run->entries[done]);

			if (frame_open(work->filler.opener, work->session->store, offset + used, work->frames + used,
				       length, work->pages + done * PAGE) != FRAME_OK)
				return done;
			used += length;
		}
	}
	return done;
}

/* A copy in bulk would overwrite a guard that the program installed without any event. */
static bool has_guard(const struct work *work, uint64_t start, uint64_t npages)
{
	struct snapd_page_region region;

	return work->pagemap >= 0 && pagemap_scan(work->pagemap, start, start + npages * PAGE, SNAPD_PAGE_IS_GUARD,
						  SNAPD_PAGE_IS_GUARD, 0, &region, 1, NULL) > 0;
}

/* One page by the way of a demand fill: the aside, poison, or whatever it has become. */
static int fill_single(struct work *work, uint64_t address)
{
	for (int tries = 0; tries < MAX_TRIES; tries++) {
		switch (fill_page(work->session, &work->filler, address, true, false)) {
		case FILL_DONE:
			work->filled++;
			return 0;
		case FILL_GONE:
			return -ESRCH;
		case FILL_NO_MEMORY:
			return -ENOMEM;
		default:
			usleep(RETRY_US);
		}
	}
	return -EBUSY;
}

/* Forgets the frames of pages that are in: the range is on its way to be released. */
static void came_in(struct work *work, const struct run *run, uint64_t from, uint64_t count)
{
	for (uint64_t k = from; k < from + count; k++) {
		uint64_t old = run->entries[k];

		if (atomic_compare_exchange_strong(&work->session->pm.entries[run->first + k], &old, ST_NONE))
			store_unhold_entry(work->session->store, old);
		work->filled++;
	}
}

static bool unchanged(struct sn_session *session, const struct run *run, uint64_t from, uint64_t count)
{
	const struct table *table = pm_table(&session->pm);
	long i = pm_find(table, run->start + from * PAGE);
	const struct record *record = i >= 0 ? &table->records[i] : NULL;

	if (!record || record->first + (run->start + from * PAGE - record->start) / PAGE != run->first + from ||
	    record->start + record->npages * PAGE < run->start + (from + count) * PAGE)
		return false;
	for (uint64_t k = from; k < from + count; k++)
		if (session->pm.entries[run->first + k] != run->entries[k])
			return false;
	return true;
}

static int copy_run(struct work *work, const struct run *run, uint64_t good)
{
	struct sn_session *session = work->session;
	uint64_t from = 0;
	int tries = 0;

	while (from < good) {
		uint64_t done = 0, address = run->start + from * PAGE;
		enum uffd_result result = UFFD_DONE;
		bool same;

		pthread_rwlock_rdlock(&session->lock);
		same = unchanged(session, run, from, good - from);
		if (same) {
			result = uffd_copy(session->uffd, address, work->pages + from * PAGE, (good - from) * PAGE, 0,
					   &done);
			came_in(work, run, from, done / PAGE);
			if (!done && result == UFFD_EXISTS) { /* what is there is newer */
				uffd_wake(session->uffd, address, PAGE);
				came_in(work, run, from, 1);
				done = PAGE;
			}
		}
		pthread_rwlock_unlock(&session->lock);
		if (!same)
			return 0; /* the caller looks anew */
		from += done / PAGE;
		if (done)
			tries = 0;
		else if (result == UFFD_GONE)
			return -ESRCH;
		else if (result == UFFD_NO_MEMORY)
			return -ENOMEM;
		else if (result == UFFD_UNMAPPED || ++tries > MAX_TRIES)
			return 0;
		else
			usleep(RETRY_US);
	}
	return 0;
}

static int restore_run(struct work *work, const struct run *run)
{
	uint64_t good;

	if (ENTRY_STATE(run->entries[0]) != ST_STORED || run->entries[0] & ENTRY_MOVING ||
	    has_guard(work, run->start, run->n)) {
		int error = 0;

		for (uint64_t k = 0; k < run->n && !error; k++)
			if (has_guard(work, run->start + k * PAGE, 1)) {
				uint64_t old = run->entries[k];

				if (atomic_compare_exchange_strong(&work->session->pm.entries[run->first + k], &old,
								   ST_GUARD))
					store_unhold_entry(work->session->store, old);
			} else {
				error = fill_single(work, run->start + k * PAGE);
			}
		return error;
	}
	good = decode_run(work, run);
	if (good < run->n) { /* a frame that can't be had: the fill says so to the page */
		int error = copy_run(work, run, good);

		return error ? error : fill_single(work, run->start + good * PAGE);
	}
	return copy_run(work, run, good);
}

int sn_restore(struct sn_session *session, uint64_t start, uint64_t end, uint64_t *ret_pages)
{
	struct work work = {.session = session, .pagemap = -1};
	char path[64];
	int error = filler_init(&work.filler);

	*ret_pages = 0;
	if (error)
		return error;
	if (atomic_load(&session->pid)) {
		snprintf(path, sizeof(path), "/proc/%d/pagemap", atomic_load(&session->pid));
		work.pagemap = open(path, O_RDONLY | O_CLOEXEC);
	}
	work.pages = mmap(NULL, RUN_PAGES * PAGE + READ_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (work.pages == MAP_FAILED) {
		error = -ENOMEM;
	} else {
		work.frames = work.pages + RUN_PAGES * PAGE;
		/* What a pass leaves behind (an entry that changed under it) the next one takes. */
		for (int pass = 0; pass < 8 && !error; pass++) {
			struct run run;
			uint64_t at = start;
			bool any = false;

			while (!error && next_run(session, &at, end, &run)) {
				error = restore_run(&work, &run);
				any |= ENTRY_STATE(run.entries[0]) != ST_BAD;
			}
			if (!any)
				break;
		}
		munmap(work.pages, RUN_PAGES * PAGE + READ_BYTES);
	}
	if (work.pagemap >= 0)
		close(work.pagemap);
	filler_deinit(&work.filler);
	*ret_pages = work.filled;
	return error;
}

int sn_release(struct sn_session *session, uint64_t start, uint64_t end)
{
	struct table *table;
	int error = 0;

	/* Nothing may become missing or stored between the look and the end of the watch: no event is applied meanwhile. */
	pthread_rwlock_wrlock(&session->lock);
	table = pm_table(&session->pm);
	for (long i = pm_first_at(table, start); i < (long)table->nrecords && table->records[i].start < end; i++)
		for (uint64_t k = 0; k < table->records[i].npages; k++) {
			uint64_t entry = session->pm.entries[table->records[i].first + k];

			if (entry & ENTRY_MOVING || ENTRY_STATE(entry) == ST_STORED || ENTRY_STATE(entry) == ST_ASIDE)
				error = -EBUSY;
		}
	if (!error)
		error = uffd_unregister(session->uffd, start, end - start);
	if (!error) {
		long n;

		table = pm_edit(&session->pm);
		n = pm_cut(table, start, end, session->scratch, MAX_RECORDS);
		for (long i = 0; i < n; i++)
			for (uint64_t k = 0; k < session->scratch[i].npages; k++)
				entry_put(session, session->scratch[i].first + k, ST_NONE);
		pm_commit(&session->pm, pm_applied(&session->pm));
	}
	pthread_rwlock_unlock(&session->lock);
	return error;
}
