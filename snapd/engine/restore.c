/* Restore: every page of an interval comes back now, on all CPUs; and the release of mappings in which nothing is out.
 *
 * Knows order and outcomes; the runs are bulk.c's, single pages fill.c's.
 */
#include "internal.h"

#include <errno.h>
#include <pthread.h>
#include <unistd.h>

#define MAX_TRIES 20000
#define RETRY_US 100
#define MAX_WORKERS 16
#define PASSES 8

/* One restore: its workers take runs in order, from one place. */
struct restore {
	struct sn_session *session;
	pthread_mutex_t lock; /* all that follows */
	uint64_t at, end, filled;
	bool any; /* something was out that can come back */
	int error;
};
struct work { /* of one worker */
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
			usleep((useconds_t)(fill_delay_ns(work->session, now_ns(), result) / 1000));
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
		int error = bulk_copy(&work->bulk, run, work->bulk.pages, good);

		return error ? error : fill_single(work, run->start + good * PAGE);
	}
	return bulk_copy(&work->bulk, run, work->bulk.pages, good);
}

static int work_init(struct work *work, struct sn_session *session)
{
	int error;

	*work = (struct work){.session = session};
	error = filler_init(&work->filler);
	if (error)
		return error;
	error = bulk_init(&work->bulk, session, false);
	if (error)
		filler_deinit(&work->filler);
	return error;
}

static void work_deinit(struct work *work)
{
	bulk_deinit(&work->bulk);
	filler_deinit(&work->filler);
}

static bool take_run(struct restore *restore, struct run *run)
{
	bool found;

	pthread_mutex_lock(&restore->lock);
	found = !restore->error && bulk_next(restore->session, &restore->at, restore->end, run);
	restore->any |= found && ENTRY_STATE(run->entries[0]) != ST_BAD;
	pthread_mutex_unlock(&restore->lock);
	return found;
}

/* Any of them alone does all of it, so one that has no memory is no error while another works. */
static void *restore_main(void *arg)
{
	struct restore *restore = arg;
	struct work work;
	struct run run;
	int error;

	if (work_init(&work, restore->session))
		return restore;
	while (take_run(restore, &run)) {
		error = restore_run(&work, &run);
		pthread_mutex_lock(&restore->lock);
		if (error && !restore->error)
			restore->error = error;
		pthread_mutex_unlock(&restore->lock);
	}
	pthread_mutex_lock(&restore->lock);
	restore->filled += work.filled + work.bulk.filled;
	pthread_mutex_unlock(&restore->lock);
	work_deinit(&work);
	return NULL;
}

/* One pass by this thread and helpers. */
static void run_pass(struct restore *restore, int nhelpers)
{
	pthread_t helpers[MAX_WORKERS];
	pthread_attr_t attributes;
	int started = 0;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 128 << 10);
	while (started < nhelpers && !pthread_create(&helpers[started], &attributes, restore_main, restore))
		started++;
	pthread_attr_destroy(&attributes);
	if (restore_main(restore)) {
		pthread_mutex_lock(&restore->lock);
		if (!restore->error)
			restore->error = -ENOMEM;
		pthread_mutex_unlock(&restore->lock);
	}
	for (int i = 0; i < started; i++)
		pthread_join(helpers[i], NULL);
}

/* Whether a COPY that nobody asked for can be kept from overwriting a guard: 0, -EACCES, or -ESRCH when nobody is left
 * to have one. */
static int sees_guards(struct sn_session *session)
{
	int error = -EACCES;

	if (atomic_load(&session->pagemap_fd) < 0 && atomic_load(&session->pid))
		error = memory_open(session);
	return atomic_load(&session->pagemap_fd) >= 0 ? 0 : error == -ESRCH ? error : -EACCES;
}

/* -EACCES: guards can't be looked for, and who calls is not blind to them. */
int sn_restore(struct sn_session *session, uint64_t start, uint64_t end, int blind, uint64_t *ret_pages)
{
	struct restore restore = {.session = session, .lock = PTHREAD_MUTEX_INITIALIZER, .end = end};
	int nhelpers = (int)min_u64((uint64_t)cpus(), min_u64(MAX_WORKERS, (end - start) / (RUN_PAGES * PAGE))) - 1;

	replay_hint_end(session);
	flood_hint_end(session);
	/* A discard that the former daemon had read would come back. */
	if (!ring_is_applied(session))
		restore.error = -EBUSY;
	else if (!blind)
		restore.error = sees_guards(session);
	/* What a pass leaves behind (an entry that changed under it) the next one takes: little, so alone. */
	for (int pass = 0; pass < PASSES && !restore.error; pass++) {
		restore.at = start;
		restore.any = false;
		run_pass(&restore, pass ? 0 : nhelpers);
		if (!restore.any)
			break;
	}
	pthread_mutex_destroy(&restore.lock);
	*ret_pages = restore.filled;
	return restore.error;
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
