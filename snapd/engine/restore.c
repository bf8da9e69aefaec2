/* Restore: every page of an interval comes back now; and the release of mappings in which nothing is out.
 *
 * Knows order and outcomes; the runs are bulk.c's, single pages fill.c's.
 */
#include "internal.h"

#include <errno.h>
#include <unistd.h>

#define MAX_TRIES 20000
#define RETRY_US 100

struct work {
	struct sn_session *session;
	struct filler filler;
	struct bulk bulk;
	uint64_t filled;
};

/* One page by the way of a demand fill: the aside, poison, or whatever it has become. */
static int fill_single(struct work *work, uint64_t address)
{
	struct fault fault = {.address = address, .write = true, .unasked = true};

	for (int tries = 0; tries < MAX_TRIES; tries++) {
		enum fill_result result = fill_page(work->session, &work->filler, &fault, false);

		switch (result) {
		case FILL_DONE:
			work->filled++;
			return 0;
		case FILL_GONE:
			return -ESRCH;
		case FILL_NO_MEMORY:
			return -ENOMEM;
		case FILL_TROUBLE:
			usleep((useconds_t)(fill_delay_ns(work->session, result) / 1000));
			break;
		default:
			usleep(RETRY_US);
		}
	}
	return -EBUSY;
}

static int restore_run(struct work *work, const struct run *run)
{
	uint64_t good;

	if (ENTRY_STATE(run->entries[0]) != ST_STORED || run->entries[0] & ENTRY_MOVING ||
	    memory_has_guard(work->session, run->start, run->n)) {
		int error = 0;

		for (uint64_t k = 0; k < run->n && !error; k++)
			error = fill_single(work, run->start + k * PAGE);
		return error;
	}
	good = bulk_decode(&work->bulk, run, false);
	if (good < run->n) { /* a frame that can't be had: the fill says so to the page */
		int error = bulk_copy(&work->bulk, run, good);

		return error ? error : fill_single(work, run->start + good * PAGE);
	}
	return bulk_copy(&work->bulk, run, good);
}

int sn_restore(struct sn_session *session, uint64_t start, uint64_t end, uint64_t *ret_pages)
{
	struct work work = {.session = session};
	int error = filler_init(&work.filler);

	*ret_pages = 0;
	if (error)
		return error;
	error = bulk_init(&work.bulk, session, false);
	if (error) {
		filler_deinit(&work.filler);
		return error;
	}
	/* What a pass leaves behind (an entry that changed under it) the next one takes. */
	for (int pass = 0; pass < 8 && !error; pass++) {
		struct run run;
		uint64_t at = start;
		bool any = false;

		while (!error && bulk_next(session, &at, end, &run)) {
			error = restore_run(&work, &run);
			any |= ENTRY_STATE(run.entries[0]) != ST_BAD;
		}
		if (!any)
			break;
	}
	*ret_pages = work.filled + work.bulk.filled;
	bulk_deinit(&work.bulk);
	filler_deinit(&work.filler);
	return error;
}

int sn_release(struct sn_session *session, uint64_t start, uint64_t end)
{
	struct table *table;
	int error = 0;

	/* Nothing may become missing or stored between the look and the end of the watch: no event is applied
	 * meanwhile. A mapping with a lost page stays watched: only the page map knows a poison marker from a swapped
	 * page, and who looks must go on seeing that something is lost. */
	pthread_rwlock_wrlock(&session->lock);
	table = pm_table(&session->pm);
	for (long i = pm_first_at(table, start); i < (long)table->nrecords && table->records[i].start < end; i++)
		for (uint64_t k = 0; table->records[i].first != NO_ENTRIES && k < table->records[i].npages; k++) {
			uint64_t entry = session->pm.entries[table->records[i].first + k];

			if (entry & ENTRY_MOVING || ENTRY_STATE(entry) == ST_STORED ||
			    ENTRY_STATE(entry) == ST_ASIDE || ENTRY_STATE(entry) == ST_BAD)
				error = -EBUSY;
		}
	if (!error)
		error = uffd_unregister(session->uffd, start, end - start);
	if (!error) {
		long n;

		table = pm_edit(&session->pm);
		n = pm_cut(table, start, end, session->scratch, MAX_RECORDS);
		for (long i = 0; i < n; i++)
			for (uint64_t k = 0; session->scratch[i].first != NO_ENTRIES &&
				k < session->scratch[i].npages; k++)
				entry_put(session, session->scratch[i].first + k, ST_NONE);
		pm_commit(&session->pm);
	}
	pthread_rwlock_unlock(&session->lock);
	return error;
}
