/* The working set: which pages came back in the seconds after a resume, and whether it pays to bring them first at the
 * next one.
 *
 * A dump arms it. Many pages that come back in a short time are the resume; when most of them are of the set that was
 * wanted the last time, replay.c brings all of it. What comes back is noted, and the next dump makes a set of it. A
 * page that was brought leaves no trace of whether it is ever used, so a random few of the set are held back: how many
 * of those are asked for is how well the set fits. Nothing here must be right: it is a guess about what is wanted next.
 */
#include "internal.h"

#include <stdlib.h>
#include <sys/mman.h>

#define WINDOW_NS 5000000000ULL /* what comes back in so long is the set */
#define BURST_NS 1000000000ULL	/* so many pages in so long are a resume */
#define MIN_BURST 16
#define MAX_BURST 512
#define BURST_PART 64	    /* of the set: a small part of it that is used by the way resumes nothing */
#define FEWEST_SAMPLES 8    /* of held back pages, to judge by */
#define SAMPLES 64	    /* as many are held back */
#define SAMPLE_PART 16	    /* but not more than this part of a small set */
#define OUT_OF 65536
#define LEAST_OUT 16384		/* pages: of less there is no flood, the faults take no time */
#define MOST_PART(out) ((out) / 4 * 3) /* a set of so much says of no page that it is rather wanted than another */
#define FLOOD_PART(out) ((out) / 32 * 9) /* more than a quarter: then the rest is likely wanted, too */
#define KNOWN_PART(out) ((out) / 16)	 /* the same where nearly all was wanted so many times in a row */
#define HABIT 3
#define DOUBT_PART(out) ((out) / 2) /* the same where a flood was in vain the last time */
#define FLOOD_NS 10000000000ULL /* in so long it must come back, or in twice as long */
#define LOG_BYTES (MAX_SET_RUNS * sizeof(uint64_t))

/* A run of pages in one word. */
#define RUN_BITS 16
#define RUN_FIRST(run) ((run) >> RUN_BITS)
#define RUN_LENGTH(run) (((run) & (OUT_OF - 1)) + 1)
#define RUN_MAKE(first, npages) ((first) << RUN_BITS | ((npages) - 1))

enum resume_phase { RESUME_OFF, RESUME_ARMED, RESUME_SEEN };

struct resume {
	pthread_mutex_t lock;
	_Atomic int phase;
	bool replayed;
	uint64_t *log, nlog;
	uint64_t burst_ns, burst, burst_known; /* pages since then, and those in the set */
	uint64_t seen_ns;
	_Atomic uint64_t out; /* pages, after the dump; 0: nobody counts */
	uint64_t came, came_ns; /* pages of it since then */
	uint64_t salt, asked;	/* of a flood: pages that it holds back, and somebody wanted */
	bool flooded, doubtful;
	unsigned int habit; /* floods in a row that were not in vain */
};

static struct working_set *set_of(struct sn_session *session)
{
	return (void *)(session->pm.base + PM_SET_OFFSET);
}

uint64_t page_lot(uint64_t x)
{
	x = (x ^ x >> 31) * 0x7fb5d329728ea185ULL;
	x = (x ^ x >> 27) * 0x81dadef4bc2dd44dULL;
	return x ^ x >> 33;
}

bool set_holds_back(const struct working_set *set, uint64_t page)
{
	return page_lot(page ^ (uint64_t)set->replays << 44) % OUT_OF < set->held_back;
}

struct interval set_run(const struct working_set *set, uint64_t i)
{
	return (struct interval){RUN_FIRST(set->runs[i]) * PAGE,
				 (RUN_FIRST(set->runs[i]) + RUN_LENGTH(set->runs[i])) * PAGE};
}

static bool set_has(const struct working_set *set, uint64_t page)
{
	uint64_t low = 0, high = set->nruns;

	while (low < high) {
		uint64_t middle = (low + high) / 2;

		if (RUN_FIRST(set->runs[middle]) + RUN_LENGTH(set->runs[middle]) <= page)
			low = middle + 1;
		else
			high = middle;
	}
	return low < set->nruns && RUN_FIRST(set->runs[low]) <= page;
}

/* Of a former daemon. */
void set_check(struct sn_session *session)
{
	struct working_set *set = set_of(session);
	uint64_t behind = 0;

	if (set->nruns > MAX_SET_RUNS || set->held_back > OUT_OF)
		set->nruns = 0;
	set->npages = 0;
	for (uint64_t i = 0; i < set->nruns; i++) {
		if (RUN_FIRST(set->runs[i]) < behind || RUN_FIRST(set->runs[i]) >= 1ULL << (47 - 12)) {
			set->nruns = set->npages = 0;
			return;
		}
		behind = RUN_FIRST(set->runs[i]) + RUN_LENGTH(set->runs[i]);
		set->npages += RUN_LENGTH(set->runs[i]);
	}
}

static void append(uint64_t *runs, uint64_t *n, uint64_t first, uint64_t npages)
{
	uint64_t last = *n ? runs[*n - 1] : 0;

	if (*n && RUN_FIRST(last) + RUN_LENGTH(last) == first && RUN_LENGTH(last) + npages <= OUT_OF)
		runs[*n - 1] += npages;
	else if (*n < MAX_SET_RUNS)
		runs[(*n)++] = RUN_MAKE(first, npages);
}

static bool is_nearly_all(struct sn_session *session, struct resume *resume)
{
	return resume->out >= LEAST_OUT && set_of(session)->npages >= MOST_PART(resume->out);
}

/* Pages that came back, some time after a dump. How many of all are wanted at random can't be told before so many were
 * asked for: a quarter of the heap looks like all of it until it is there. */
static void look_for_flood(struct sn_session *session, struct resume *resume, uint64_t page, uint64_t npages,
			   uint64_t now)
{
	uint64_t part;

	if (resume->flooded) {
		for (uint64_t k = 0; k < npages; k++)
			resume->asked += flood_holds_back(resume->salt, resume->out, page + k);
		return;
	}
	if (now - resume->came_ns > FLOOD_NS) {
		resume->came /= 2;
		resume->came_ns = now;
	}
	resume->came += npages;
	part = resume->habit >= HABIT	      ? KNOWN_PART(resume->out)
	       : resume->doubtful	      ? DOUBT_PART(resume->out)
					      : FLOOD_PART(resume->out);
	if (resume->out < LEAST_OUT || resume->came < part)
		return;
	resume->salt++;
	resume->flooded = flood_start(session, resume->out, resume->salt);
	if (resume->flooded)
		COUNT(session, replays);
	else
		atomic_store(&resume->out, 0);
}

/* Pages that came back while a resume is waited for. */
static void look_for_resume(struct sn_session *session, struct resume *resume, uint64_t page, uint64_t npages,
			    uint64_t now)
{
	const struct working_set *set = set_of(session);
	uint64_t enough = max_u64(MIN_BURST, min_u64(MAX_BURST, set->npages / BURST_PART));

	if (now - resume->burst_ns > BURST_NS) {
		resume->burst_ns = now;
		resume->burst = resume->burst_known = 0;
	}
	resume->burst += npages;
	resume->burst_known += set_has(set, page) ? npages : 0;
	if (resume->burst < enough)
		return;
	resume->seen_ns = now;
	atomic_store(&resume->phase, RESUME_SEEN);
	if (is_nearly_all(session, resume))
		return;
	resume->replayed = 2 * resume->burst_known >= resume->burst && replay_start(session, set);
	if (resume->replayed)
		COUNT(session, replays);
}

void resume_note(struct sn_session *session, uint64_t address, uint64_t npages)
{
	struct resume *resume = atomic_load(&session->resume);
	uint64_t now;

	if (!resume || (atomic_load_explicit(&resume->phase, memory_order_relaxed) == RESUME_OFF &&
			!atomic_load_explicit(&resume->out, memory_order_relaxed)))
		return;
	now = now_ns();
	pthread_mutex_lock(&resume->lock);
	if (resume->phase == RESUME_SEEN && now - resume->seen_ns > WINDOW_NS)
		atomic_store(&resume->phase, RESUME_OFF);
	if (resume->phase != RESUME_OFF) {
		append(resume->log, &resume->nlog, address / PAGE, npages);
		if (resume->phase == RESUME_ARMED)
			look_for_resume(session, resume, address / PAGE, npages, now);
	}
	if (resume->out)
		look_for_flood(session, resume, address / PAGE, npages, now);
	pthread_mutex_unlock(&resume->lock);
}

static int by_value(const void *a, const void *b)
{
	const uint64_t *x = a, *y = b;

	return *x < *y ? -1 : *x > *y;
}

/* Goes through the pages of sorted runs, which may overlap. */
struct walk {
	const uint64_t *runs;
	uint64_t n, i, page; /* page: the next one is not before it */
};

static bool walk_next(struct walk *walk, uint64_t *ret_page)
{
	while (walk->i < walk->n && RUN_FIRST(walk->runs[walk->i]) + RUN_LENGTH(walk->runs[walk->i]) <= walk->page)
		walk->i++;
	if (walk->i == walk->n)
		return false;
	*ret_page = max_u64(RUN_FIRST(walk->runs[walk->i]), walk->page);
	walk->page = *ret_page + 1;
	return true;
}

struct verdict {
	uint64_t hits, misses; /* pages that were held back, and asked for or not */
};

/* The pages of the log, and of the set those that were not held back in vain. out has room for MAX_SET_RUNS. */
static uint64_t unite(const struct working_set *set, const uint64_t *log, uint64_t nlog, uint64_t *out,
		      struct verdict *ret)
{
	struct walk old = {set->runs, set->nruns, 0, 0}, new = {log, nlog, 0, 0};
	uint64_t n = 0, a = 0, b = 0;
	bool in_old = walk_next(&old, &a), in_new = walk_next(&new, &b);

	*ret = (struct verdict){0};
	while (in_old || in_new) {
		bool only_old = in_old && (!in_new || a < b), both = in_old && in_new && a == b;
		uint64_t page = only_old ? a : b;
		bool sample = (only_old || both) && set_holds_back(set, page);

		ret->hits += sample && both;
		ret->misses += sample && only_old;
		if (!(sample && only_old))
			append(out, &n, page, 1);
		if (only_old || both)
			in_old = walk_next(&old, &a);
		if (!only_old)
			in_new = walk_next(&new, &b);
	}
	return n;
}

static uint64_t merge(const uint64_t *log, uint64_t nlog, uint64_t *out)
{
	struct walk walk = {log, nlog, 0, 0};
	uint64_t n = 0, page;

	while (walk_next(&walk, &page))
		append(out, &n, page, 1);
	return n;
}

static uint64_t everything(struct sn_session *session, uint64_t *out)
{
	const struct table *table;
	uint64_t n = 0;

	pthread_rwlock_rdlock(&session->lock);
	table = pm_table(&session->pm);
	for (uint64_t i = 0; i < table->nrecords; i++) {
		const struct record *record = &table->records[i];

		for (uint64_t k = 0; record->first != NO_ENTRIES && k < record->npages; k += OUT_OF)
			append(out, &n, record->start / PAGE + k, min_u64(OUT_OF, record->npages - k));
	}
	pthread_rwlock_unlock(&session->lock);
	return n;
}

static void set_write(struct working_set *set, const uint64_t *runs, uint64_t n, uint64_t held_back)
{
	uint64_t npages = 0;

	/* A successor finds none where this is cut. */
	__atomic_store_n(&set->nruns, 0, __ATOMIC_SEQ_CST);
	for (uint64_t i = 0; i < n; i++) {
		set->runs[i] = runs[i];
		npages += RUN_LENGTH(runs[i]);
	}
	set->npages = npages;
	set->replays++;
	set->held_back = (uint32_t)max_u64(held_back, min_u64(OUT_OF / SAMPLE_PART,
							      npages ? (SAMPLES * OUT_OF + npages - 1) / npages : 0));
	__atomic_store_n(&set->nruns, n, __ATOMIC_SEQ_CST);
}

/* Makes the next set of what was noted. The more of what was held back nobody asked for, the more is held back the next
 * time, and what is not asked for leaves the set: so it shrinks where it does not fit. */
static void learn(struct sn_session *session, struct resume *resume, uint64_t held)
{
	struct working_set *set = set_of(session);
	uint64_t *runs = mmap(NULL, LOG_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
			      -1, 0);
	struct verdict verdict;
	uint64_t n, samples, held_back = 0;

	if (runs == MAP_FAILED)
		return;
	qsort(resume->log, resume->nlog, sizeof(*resume->log), by_value);
	if (resume->flooded) {
		bool paid = held >= FEWEST_SAMPLES && 2 * resume->asked >= held;
		uint64_t hits = min_u64(resume->asked, held);

		__atomic_fetch_add(&session->stats.replay_hits, hits, __ATOMIC_RELAXED);
		__atomic_fetch_add(&session->stats.replay_misses, held - hits, __ATOMIC_RELAXED);
		resume->doubtful = !paid;
		resume->habit = paid ? resume->habit + 1 : 0;
		n = paid ? everything(session, runs) : merge(resume->log, resume->nlog, runs);
	} else if (resume->replayed) {
		n = unite(set, resume->log, resume->nlog, runs, &verdict);
		samples = verdict.hits + verdict.misses;
		__atomic_fetch_add(&session->stats.replay_hits, verdict.hits, __ATOMIC_RELAXED);
		__atomic_fetch_add(&session->stats.replay_misses, verdict.misses, __ATOMIC_RELAXED);
		if (samples >= FEWEST_SAMPLES && verdict.misses > verdict.hits)
			n = merge(resume->log, resume->nlog, runs); /* it did not pay */
		else if (samples >= FEWEST_SAMPLES)
			held_back = verdict.misses * OUT_OF / samples;
	} else {
		n = merge(resume->log, resume->nlog, runs);
	}
	if (!resume->flooded)
		resume->habit = 0;
	set_write(set, runs, n, held_back);
	munmap(runs, LOG_BYTES);
}

void sn_session_dumping(struct sn_session *session)
{
	struct resume *resume = atomic_load(&session->resume);
	uint64_t held;
	bool seen;

	if (!resume)
		return;
	pthread_mutex_lock(&resume->lock);
	seen = resume->seen_ns != 0;
	atomic_store(&resume->phase, RESUME_OFF); /* from here on nobody starts a replay or a flood */
	atomic_store(&resume->out, 0);
	pthread_mutex_unlock(&resume->lock);
	replay_end(session);
	held = flood_end(session);
	/* A few pages now and then are no resume, and say little: the set of the last one stays. */
	if (seen || (resume->nlog && !set_of(session)->nruns))
		learn(session, resume, held);
	if (resume->log)
		munmap(resume->log, LOG_BYTES);
	resume->log = NULL;
}

/* How many pages are in the store. */
static uint64_t count_out(struct sn_session *session)
{
	const struct table *table;
	uint64_t n = 0;

	pthread_rwlock_rdlock(&session->lock);
	table = pm_table(&session->pm);
	for (uint64_t i = 0; i < table->nrecords; i++)
		for (uint64_t k = 0; table->records[i].first != NO_ENTRIES && k < table->records[i].npages; k++)
			n += ENTRY_STATE(session->pm.entries[table->records[i].first + k]) == ST_STORED;
	pthread_rwlock_unlock(&session->lock);
	return n;
}

void sn_session_dumped(struct sn_session *session)
{
	struct resume *resume = atomic_load(&session->resume);

	if (!resume) {
		resume = calloc(1, sizeof(*resume));
		if (!resume)
			return;
		pthread_mutex_init(&resume->lock, NULL);
		atomic_store(&session->resume, resume);
	}
	if (resume->log)
		return;
	resume->log = mmap(NULL, LOG_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (resume->log == MAP_FAILED) {
		resume->log = NULL;
		return;
	}
	resume->nlog = resume->burst = resume->burst_known = resume->burst_ns = resume->seen_ns = 0;
	resume->came = resume->came_ns = resume->asked = 0;
	resume->replayed = resume->flooded = false;
	atomic_store(&resume->out, count_out(session));
	atomic_store(&resume->phase, RESUME_ARMED);
}

void resume_destroy(struct resume *resume)
{
	if (!resume)
		return;
	if (resume->log)
		munmap(resume->log, LOG_BYTES);
	pthread_mutex_destroy(&resume->lock);
	free(resume);
}
