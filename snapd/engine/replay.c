/* Replay: the pages of a working set come back in the order of the store's file, on all CPUs, behind the demand fills.
 *
 * Nobody has asked for them, so each is put into the target as prefetch does it: bulk.c looks at its entry, and for
 * guards, once more under the session's lock. What can't be had is left to the demand fill. Its threads run at common
 * priority and hold the lock for a few pages at a time. Which pages is resume.c's.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_REPLAYERS 8
#define CHUNK 64	  /* pages that a thread takes at once */
#define STEP_PAGES 16	  /* of one COPY */
#define GAP_BYTES 8192UL  /* between frames that are read at once: copying it takes less than another call */
#define SPAN_BYTES (1UL << 20)
#define FAR_BYTES (64UL << 10) /* between frames that the disk reads at once */
#define AHEAD 1024	       /* pages that the disk is told of ahead */
#define LOOK_PAGES 256	       /* of one look at the entries with the lock held */
#define TRIES 50
#define RETRY_US 100

struct item {
	uint64_t entry, address, index;
};

struct replay {
	struct sn_session *session;
	const struct working_set *set;
	struct item *items;
	uint64_t nitems, bytes, reused;
	atomic_bool ending;
	pthread_mutex_t lock; /* what follows */
	uint64_t next, told;
	int nthreads;
	pthread_t lead, helpers[MAX_REPLAYERS];
};

static bool is_ending(const struct replay *replay)
{
	return atomic_load(&replay->ending) || atomic_load(&replay->session->stopping);
}

/* What of [at, upto) is stored; for whoever holds the lock. */
static void collect(struct replay *replay, uint64_t at, uint64_t upto)
{
	struct sn_session *session = replay->session;
	const struct table *table = pm_table(&session->pm);

	for (long i = pm_first_at(table, at); i < (long)table->nrecords && table->records[i].start < upto; i++) {
		const struct record *record = &table->records[i];
		uint64_t behind = min_u64(upto, record->start + record->npages * PAGE);

		for (uint64_t address = max_u64(at, record->start);
		     record->first != NO_ENTRIES && address < behind; address += PAGE) {
			uint64_t index = record->first + (address - record->start) / PAGE;
			uint64_t entry = session->pm.entries[index];

			if (ENTRY_STATE(entry) == ST_STORED && !(entry & ENTRY_MOVING) &&
			    !set_holds_back(replay->set, address / PAGE))
				replay->items[replay->nitems++] = (struct item){entry, address, index};
		}
	}
}

/* Goes on through the set for a few pages: *i is a run of it, *at a place in it or 0. */
static void look(struct replay *replay, uint64_t *i, uint64_t *at)
{
	uint64_t pages = 0;

	session_share(replay->session);
	while (*i < replay->set->nruns && pages < LOOK_PAGES) {
		struct interval run = set_run(replay->set, *i);
		uint64_t from = max_u64(run.start, *at);
		uint64_t upto = min_u64(run.end, from + (LOOK_PAGES - pages) * PAGE);

		collect(replay, from, upto);
		pages += (upto - from) / PAGE;
		*at = upto;
		*i += upto == run.end;
	}
	pthread_rwlock_unlock(&replay->session->lock);
}

static int by_place(const void *a, const void *b)
{
	uint64_t x = ENTRY_OFFSET(((const struct item *)a)->entry), y = ENTRY_OFFSET(((const struct item *)b)->entry);

	return x < y ? -1 : x > y;
}

static bool prepare(struct replay *replay)
{
	uint64_t i = 0, at = 0;
	bool in_order = true;

	replay->bytes = replay->set->npages * sizeof(*replay->items);
	replay->items = mmap(NULL, replay->bytes, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (replay->items == MAP_FAILED) {
		replay->items = NULL;
		return false;
	}
	replay->reused = atomic_load(&replay->session->store->reused);
	while (i < replay->set->nruns && !is_ending(replay))
		look(replay, &i, &at);
	for (uint64_t k = 1; k < replay->nitems && in_order; k++)
		in_order = by_place(&replay->items[k - 1], &replay->items[k]) < 0;
	if (!in_order)
		qsort(replay->items, replay->nitems, sizeof(*replay->items), by_place);
	return true;
}

static uint64_t frame_end(const struct item *item)
{
	return ENTRY_OFFSET(item->entry) + ENTRY_BYTES(item->entry);
}

/* Tells the disk what will be read soon. */
static void read_ahead(struct replay *replay, uint64_t from, uint64_t to)
{
	while (from < to) {
		uint64_t n = from + 1, start = ENTRY_OFFSET(replay->items[from].entry);

		while (n < to && ENTRY_OFFSET(replay->items[n].entry) < frame_end(&replay->items[n - 1]) + FAR_BYTES)
			n++;
		posix_fadvise(replay->session->store->fd, (off_t)start,
			      (off_t)(frame_end(&replay->items[n - 1]) - start), POSIX_FADV_WILLNEED);
		from = n;
	}
}

/* How many items, from one on, are read together. */
static uint64_t span(const struct item *items, uint64_t n)
{
	uint64_t k = 1;

	while (k < n && ENTRY_OFFSET(items[k].entry) >= frame_end(&items[k - 1]) &&
	       ENTRY_OFFSET(items[k].entry) - frame_end(&items[k - 1]) <= GAP_BYTES &&
	       frame_end(&items[k]) - ENTRY_OFFSET(items[0].entry) <= SPAN_BYTES)
		k++;
	return k;
}

/* Pages in a row, decoded. While an event is unread the kernel refuses: the program goes first. */
static int put(struct replay *replay, struct bulk *bulk, const struct item *items, const unsigned char *pages,
	       uint64_t n)
{
	struct run run = {.start = items[0].address, .first = items[0].index, .n = n, .reused = replay->reused};
	int error = -EAGAIN;

	for (uint64_t k = 0; k < n; k++)
		run.entries[k] = items[k].entry;
	for (int tries = 0; error == -EAGAIN && tries < TRIES && !is_ending(replay); tries++) {
		error = bulk_copy(bulk, &run, pages, n);
		if (error == -EAGAIN)
			usleep(RETRY_US);
	}
	return error == -EAGAIN ? 0 : error;
}

/* Some items whose frames are near each other. */
static int bring(struct replay *replay, struct bulk *bulk, const struct item *items, uint64_t n)
{
	uint64_t offset = ENTRY_OFFSET(items[0].entry);
	struct iovec iov = {bulk->frames, frame_end(&items[n - 1]) - offset};
	struct sn_store *store = replay->session->store;
	bool good[CHUNK];
	ssize_t got;
	int error = 0;

	do {
		got = preadv2(store->fd, &iov, 1, (off_t)offset, 0);
	} while (got < 0 && errno == EINTR);
	if (got != (ssize_t)iov.iov_len)
		return 0;
	for (uint64_t k = 0; k < n; k++)
		good[k] = frame_open(bulk->opener, store, ENTRY_OFFSET(items[k].entry),
				     bulk->frames + ENTRY_OFFSET(items[k].entry) - offset,
				     ENTRY_BYTES(items[k].entry), bulk->pages + k * PAGE) == FRAME_OK;
	FAULT_POINT(FP_REPLAY_DECODED);
	for (uint64_t k = 0, m; k < n && !error; k = m) {
		m = k + 1;
		while (m < n && m - k < STEP_PAGES && good[m] && items[m].address == items[m - 1].address + PAGE &&
		       items[m].index == items[m - 1].index + 1)
			m++;
		if (good[k])
			error = put(replay, bulk, items + k, bulk->pages + k * PAGE, m - k);
	}
	return error;
}

static uint64_t take(struct replay *replay, uint64_t *ret_n)
{
	uint64_t first, from, to;

	pthread_mutex_lock(&replay->lock);
	first = replay->next;
	replay->next = min_u64(first + CHUNK, replay->nitems);
	*ret_n = replay->next - first;
	from = replay->told;
	to = from < replay->next + AHEAD / 2 ? min_u64(replay->next + AHEAD, replay->nitems) : from;
	replay->told = to;
	pthread_mutex_unlock(&replay->lock);
	read_ahead(replay, from, to);
	return first;
}

static void *helper_main(void *arg)
{
	struct replay *replay = arg;
	uint64_t first, n, done;
	struct bulk bulk;
	int error = 0;

	prctl(PR_SET_NAME, "snapd-replay");
	if (bulk_init(&bulk, replay->session, true))
		return NULL;
	spin_yield(true);
	for (;;) {
		first = take(replay, &n);
		if (!n)
			break;
		for (done = 0; done < n && !error && !is_ending(replay); ) {
			uint64_t some = span(replay->items + first + done, n - done);

			error = bring(replay, &bulk, replay->items + first + done, some);
			done += some;
		}
		if (error || is_ending(replay))
			break;
	}
	spin_yield(false);
	if (error) /* no memory, or nobody is there */
		atomic_store(&replay->ending, true);
	__atomic_fetch_add(&replay->session->stats.replayed, bulk.filled, __ATOMIC_RELAXED);
	bulk_deinit(&bulk);
	return NULL;
}

static void *lead_main(void *arg)
{
	struct replay *replay = arg;
	int wanted = (int)min_u64((uint64_t)cpus(), MAX_REPLAYERS) - 1;
	uint64_t bytes = replay->set->npages * PAGE;

	/* The program may not be allowed all of it, or others need it: then it asks for what it wants. */
	if (sn_headroom_take(atomic_load(&replay->session->pid), bytes))
		return NULL;
	if (prepare(replay)) {
		while (replay->nthreads < wanted && !is_ending(replay) &&
		       start_thread(&replay->helpers[replay->nthreads], helper_main, replay))
			replay->nthreads++;
		helper_main(replay);
		for (int i = 0; i < replay->nthreads; i++)
			pthread_join(replay->helpers[i], NULL);
		munmap(replay->items, replay->bytes);
	}
	sn_headroom_give(bytes);
	return NULL;
}

bool replay_start(struct sn_session *session, const struct working_set *set)
{
	struct replay *replay;

	/* Without the page map of the kernel there is no look for guards. */
	if (session->replay || !set->nruns || atomic_load(&session->pagemap_fd) < 0)
		return false;
	replay = calloc(1, sizeof(*replay));
	if (!replay)
		return false;
	*replay = (struct replay){.session = session, .set = set};
	pthread_mutex_init(&replay->lock, NULL);
	if (!start_thread(&replay->lead, lead_main, replay)) {
		pthread_mutex_destroy(&replay->lock);
		free(replay);
		return false;
	}
	atomic_store(&session->replay, replay);
	return true;
}

void replay_hint_end(struct sn_session *session)
{
	struct replay *replay = atomic_load(&session->replay);

	if (replay)
		atomic_store(&replay->ending, true);
}

void replay_end(struct sn_session *session)
{
	struct replay *replay = atomic_load(&session->replay);

	if (!replay)
		return;
	atomic_store(&replay->ending, true);
	pthread_join(replay->lead, NULL);
	pthread_mutex_destroy(&replay->lock);
	atomic_store(&session->replay, NULL);
	free(replay);
}
