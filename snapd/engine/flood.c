/* Flood: all that is out comes back, on all CPUs, behind the demand fills: for a program that asks for so much of it
 * that it is likely to ask for the rest.
 *
 * Nobody has asked for these pages, so each is put into the target as prefetch does it: bulk.c looks at its entry, and
 * for guards, once more under the session's lock. What can't be had is left to the demand fill. Its threads run at
 * common priority. When and whether it pays is resume.c's; a random few pages are held back for that.
 */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

#define MAX_FLOODERS 8
#define ROOM_PART 2    /* of the memory that is left it may take one part in so many */
#define LOOK_PAGES 16384 /* between two looks at how much is left */
#define PART_PAGES 1024UL /* in order; the parts come from the end */
#define STEP_PAGES 16  /* decoded and put at a time: a demand fill may want one of them */
#define TRIES 50
#define RETRY_US 100

struct flood {
	struct sn_session *session;
	uint64_t out, salt;
	atomic_bool ending;
	_Atomic uint64_t held;
	pthread_mutex_t lock; /* what follows */
	uint64_t low, taken, looked;
	int nthreads;
	pthread_t lead, helpers[MAX_FLOODERS];
};

static bool is_ending(const struct flood *flood)
{
	return atomic_load(&flood->ending) || atomic_load(&flood->session->stopping);
}

bool flood_holds_back(uint64_t salt, uint64_t out, uint64_t page)
{
	return page_lot(page ^ salt << 44) % out < FLOOD_SAMPLES;
}

/* The program may not be allowed all of it, or others need it: then it asks for what it wants. */
static bool has_room(struct flood *flood)
{
	uint64_t left = flood->out > flood->taken ? flood->out - flood->taken : 0;

	if (flood->looked && flood->taken < flood->looked + LOOK_PAGES)
		return true;
	flood->looked = max_u64(flood->taken, 1);
	return headroom(atomic_load(&flood->session->pid)) / ROOM_PART >= left * PAGE;
}

/* The next part, below the last one: from the end, since a program that walks through its memory comes from the other
 * side, and what it meets the demand fills bring. */
static bool take(struct flood *flood, struct interval *ret)
{
	struct sn_session *session = flood->session;
	const struct table *table;
	bool found;
	long i;

	pthread_mutex_lock(&flood->lock);
	session_share(session);
	table = pm_table(&session->pm);
	i = pm_first_at(table, flood->low);
	if (i == (long)table->nrecords || table->records[i].start >= flood->low)
		i--;
	if (i >= 0) {
		const struct record *record = &table->records[i];

		ret->end = min_u64(flood->low, record->start + record->npages * PAGE);
		ret->start = max_u64(record->start, ret->end - min_u64(ret->end, PART_PAGES * PAGE));
		flood->low = ret->start;
		flood->taken += (ret->end - ret->start) / PAGE;
	}
	pthread_rwlock_unlock(&session->lock);
	found = i >= 0 && !is_ending(flood);
	if (found && !has_room(flood)) {
		atomic_store(&flood->ending, true); /* for all of its threads */
		found = false;
	}
	pthread_mutex_unlock(&flood->lock);
	return found;
}

/* The next pages in a row at *at or behind it, up to one that is held back. */
static bool next_run(struct flood *flood, uint64_t *at, uint64_t end, struct run *ret)
{
	while (!is_ending(flood) && bulk_next(flood->session, at, end, ret)) {
		uint64_t n = 0;

		if (ENTRY_STATE(ret->entries[0]) != ST_STORED || ret->entries[0] & ENTRY_MOVING)
			continue;
		while (n < ret->n && !flood_holds_back(flood->salt, flood->out, ret->start / PAGE + n))
			n++;
		if (n < ret->n) {
			atomic_fetch_add(&flood->held, 1);
			*at = ret->start + (n + 1) * PAGE;
		}
		ret->n = n;
		if (n)
			return true;
	}
	return false;
}

/* While an event is unread the kernel refuses: the program goes first. */
static int bring(struct flood *flood, struct bulk *bulk, const struct run *run)
{
	uint64_t good = bulk_decode(bulk, run, false);
	int error = -EAGAIN;

	for (int tries = 0; error == -EAGAIN && tries < TRIES && !is_ending(flood); tries++) {
		error = bulk_copy(bulk, run, bulk->pages, good);
		if (error == -EAGAIN)
			usleep(RETRY_US);
	}
	return error == -EAGAIN ? 0 : error;
}

static int bring_run(struct flood *flood, struct bulk *bulk, const struct run *run)
{
	struct run step = {.reused = run->reused};
	int error = 0;

	for (uint64_t k = 0; k < run->n && !error && !is_ending(flood); k += step.n) {
		step.start = run->start + k * PAGE;
		step.first = run->first + k;
		step.n = min_u64(STEP_PAGES, run->n - k);
		memcpy(step.entries, run->entries + k, step.n * sizeof(*step.entries));
		error = bring(flood, bulk, &step);
	}
	return error;
}

static void *flooder_main(void *arg)
{
	struct flood *flood = arg;
	struct bulk bulk;
	struct interval part;
	struct run run;
	int error = 0;

	prctl(PR_SET_NAME, "snapd-flood");
	if (bulk_init(&bulk, flood->session, true))
		return NULL;
	spin_yield(true);
	while (!error && !is_ending(flood) && take(flood, &part))
		while (!error && next_run(flood, &part.start, part.end, &run))
			error = bring_run(flood, &bulk, &run);
	spin_yield(false);
	if (error) /* no memory, or nobody is there */
		atomic_store(&flood->ending, true);
	__atomic_fetch_add(&flood->session->stats.replayed, bulk.filled, __ATOMIC_RELAXED);
	bulk_deinit(&bulk);
	return NULL;
}

static void *lead_main(void *arg)
{
	struct flood *flood = arg;
	int wanted = (int)min_u64((uint64_t)cpus(), MAX_FLOODERS) - 1;

	while (flood->nthreads < wanted && !is_ending(flood) &&
	       start_thread(&flood->helpers[flood->nthreads], flooder_main, flood))
		flood->nthreads++;
	flooder_main(flood);
	for (int i = 0; i < flood->nthreads; i++)
		pthread_join(flood->helpers[i], NULL);
	return NULL;
}

bool flood_start(struct sn_session *session, uint64_t out, uint64_t salt)
{
	struct flood *flood;

	/* Without the page map of the kernel there is no look for guards. */
	if (session->flood || !out || atomic_load(&session->pagemap_fd) < 0)
		return false;
	flood = calloc(1, sizeof(*flood));
	if (!flood)
		return false;
	*flood = (struct flood){.session = session, .out = out, .salt = salt, .low = ~0ULL};
	pthread_mutex_init(&flood->lock, NULL);
	if (!start_thread(&flood->lead, lead_main, flood)) {
		pthread_mutex_destroy(&flood->lock);
		free(flood);
		return false;
	}
	atomic_store(&session->flood, flood);
	return true;
}

void flood_hint_end(struct sn_session *session)
{
	struct flood *flood = atomic_load(&session->flood);

	if (flood)
		atomic_store(&flood->ending, true);
}

uint64_t flood_end(struct sn_session *session)
{
	struct flood *flood = atomic_load(&session->flood);
	uint64_t held;

	if (!flood)
		return 0;
	atomic_store(&flood->ending, true);
	pthread_join(flood->lead, NULL);
	held = flood->held;
	pthread_mutex_destroy(&flood->lock);
	atomic_store(&session->flood, NULL);
	free(flood);
	return held;
}
