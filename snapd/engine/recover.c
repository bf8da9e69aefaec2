/* What a former daemon had on its way when it died: a stop that was cut, a piece that was not packed or not dropped.
 *
 * What PAGEMAP_SCAN finds in the staging, in the aside and at the address decides each page of a cut stop. Until then
 * they wait. Most are decided while the program runs, the rest in a stop of its own. Since the program has run in
 * between, it may have discarded, unmapped or moved them: so the records of a cut stop name the aside that a page
 * belongs to, and follow its events.
 * Knows the mover and the page map; when to recover is session.py's. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#define LOOK                                                                                                           \
	(SNAPD_PAGE_IS_WRITTEN | SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED | SNAPD_PAGE_IS_PFNZERO |               \
	 SNAPD_PAGE_IS_GUARD)
#define THERE (SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED | SNAPD_PAGE_IS_GUARD)
#define PROBE_TRIES 20000
#define RUNNING_TRIES 100
#define RUNNING_PAUSE_US 200
#define RUNNING_ROUNDS 3
#define HAND_TRIES 100

enum verdict { SETTLED, NOWHERE, STAGED, HERE, IS_DIRTY, IS_CLEAN, IS_ZERO, IS_GUARD, IS_PINNED, IS_LEFT };

struct part { /* pages of a cut stop in a row: where the program has them now, their entries, and where they may be */
	uint64_t start, npages, first, aside, staging;
	bool left; /* the record's pages are in the aside, for good */
	uint8_t *verdicts;
};

struct parts {
	struct part *list;
	long n, capacity;
	int error;
};

static uint64_t intent_bytes(const struct intent *intent)
{
	return intent->npages * PAGE;
}

static bool inside(uint64_t at, uint64_t start, uint64_t bytes)
{
	return start && at >= start && at - start < bytes;
}

static struct intent *intent_at(struct sn_session *session, int i)
{
	return &session->pm.header->intents[i];
}

/* Marks [start, end) as moving, and says in which aside its pages may be. Without one a record goes on saying what it
 * says: a span that was not moved, because its pages are in another's aside or staging already, is in the piece too. */
static void claim(struct sn_session *session, struct table *table, uint64_t start, uint64_t end, uint64_t aside)
{
	struct record *parts = session->scratch;
	long n = pm_cut(table, start, end, parts, MAX_RECORDS);

	for (long i = 0; i < n; i++) {
		for (uint64_t k = 0; parts[i].first != NO_ENTRIES && k < parts[i].npages; k++)
			atomic_fetch_or(&session->pm.entries[parts[i].first + k], ENTRY_MOVING);
		if (parts[i].first != NO_ENTRIES)
			parts[i].aside = aside ? aside + (parts[i].start - start) : parts[i].aside;
		pm_insert(table, parts[i]);
	}
}

static bool is_moving(struct sn_session *session)
{
	const struct table *table = pm_table(&session->pm);

	for (uint64_t i = 0; i < table->nrecords; i++)
		for (uint64_t k = 0; table->records[i].first != NO_ENTRIES && k < table->records[i].npages; k++)
			if (session->pm.entries[table->records[i].first + k] & ENTRY_MOVING)
				return true;
	return false;
}

/* For an adopted session whose events are not read yet: the range table is as the former daemon left it. */
void recover_begin(struct sn_session *session)
{
	struct table *table = NULL;

	for (int i = 0; i < MAX_INFLIGHT * MAX_SPANS; i++) {
		const struct intent *intent = intent_at(session, i);

		session->cut |= intent->phase == PHASE_CUT;
		if (intent->phase != PHASE_MOVE && intent->phase != PHASE_PIN)
			continue;
		if (!table)
			table = pm_edit(&session->pm);
		claim(session, table, intent->start, intent->start + intent_bytes(intent), intent->aside);
	}
	if (!table) {
		/* A child that was forked after the cut waits for its parent. */
		session->cut |= session->pm.header->source && is_moving(session);
		return;
	}
	FAULT_POINT(FP_CUT_CLAIMED);
	/* What was read and not applied goes along: with the table another ring becomes current. */
	memcpy(pm_other_ring(&session->pm), pm_ring(&session->pm), RING_SLOTS * sizeof(struct snapd_uffd_msg));
	pm_commit(&session->pm);
	FAULT_POINT(FP_CUT_COMMITTED);
	for (int i = 0; i < MAX_INFLIGHT * MAX_SPANS; i++)
		if (intent_at(session, i)->phase == PHASE_MOVE || intent_at(session, i)->phase == PHASE_PIN)
			intent_at(session, i)->phase = PHASE_CUT;
	session->cut = true;
}

/* Whether a REMAP that was read is the move of a cut stop: the mover was inside it when the daemon died. */
bool recover_moved(struct sn_session *session, struct table *table, uint64_t from, uint64_t to, uint64_t bytes)
{
	for (int i = 0; session->cut && i < MAX_INFLIGHT * MAX_SPANS; i++) {
		struct intent *intent = intent_at(session, i);

		if (intent->phase != PHASE_CUT || intent->start != from || intent_bytes(intent) != bytes ||
		    (intent->aside && intent->aside != to))
			continue;
		/* The program's own move of the same pages does not leave them mapped. */
		if (session->pagemap_fd >= 0 && sn_watched(session->pagemap_fd, from) == 0)
			continue;
		intent->aside = to;
		claim(session, table, from, from + bytes, to);
		return true;
	}
	return false;
}

static void add_part(struct parts *parts, struct part part)
{
	if (parts->n == parts->capacity) {
		long capacity = parts->capacity ? 2 * parts->capacity : 64;
		struct part *list = realloc(parts->list, (size_t)capacity * sizeof(*list));

		if (!list) {
			parts->error = -ENOMEM;
			return;
		}
		parts->list = list;
		parts->capacity = capacity;
	}
	part.verdicts = calloc(part.npages, 1);
	if (!part.verdicts)
		parts->error = -ENOMEM;
	parts->list[parts->n++] = part;
}

/* The pages of a record that are in the aside or the staging of an intent, which begins at base there. */
static void add_overlap(struct parts *parts, const struct record *record, const struct intent *intent, uint64_t base)
{
	uint64_t from = max_u64(record->aside, base);
	uint64_t to = min_u64(record->aside + record->npages * PAGE, base + intent_bytes(intent));
	uint64_t skip = from - record->aside;

	if (!base || from >= to)
		return;
	add_part(parts, (struct part){.start = record->start + skip, .npages = (to - from) / PAGE,
				      .first = record->first + skip / PAGE, .aside = intent->aside + (from - base),
				      .staging = intent->staging + (from - base), .left = base == intent->aside});
}

static void find_parts(struct sn_session *session, struct parts *parts)
{
	const struct table *table = pm_table(&session->pm);

	for (int i = 0; i < MAX_INFLIGHT * MAX_SPANS; i++) {
		const struct intent *intent = intent_at(session, i);

		for (uint64_t k = 0; intent->phase == PHASE_CUT && intent->aside && k < table->nrecords; k++) {
			const struct record *record = &table->records[k];

			if (record->first == NO_ENTRIES || !record->aside)
				continue;
			add_overlap(parts, record, intent, intent->aside);
			add_overlap(parts, record, intent, intent->staging);
		}
	}
}

static void free_parts(struct parts *parts)
{
	for (long i = 0; i < parts->n; i++)
		free(parts->list[i].verdicts);
	free(parts->list);
}

struct scan {
	int fd;
	struct snapd_page_region *regions;
};

static enum verdict verdict_of(uint64_t entry, uint64_t categories)
{
	enum state state = ENTRY_STATE(entry);

	if (categories & SNAPD_PAGE_IS_GUARD)
		return IS_GUARD;
	if (state == ST_BAD && !(categories & SNAPD_PAGE_IS_PRESENT))
		return NOWHERE;
	if (categories & SNAPD_PAGE_IS_PFNZERO)
		return IS_ZERO;
	return categories & SNAPD_PAGE_IS_WRITTEN || !entry_has_frame(entry) ? IS_DIRTY : IS_CLEAN;
}

/* Looks at one place where pages may be; the places are looked at in the order of how little they say. */
static int look(struct sn_session *session, struct part *part, uint64_t at, const struct scan *scan)
{
	long n = pagemap_scan(scan->fd, at, at + part->npages * PAGE, THERE, LOOK, 0, scan->regions, part->npages + 1,
			      NULL);

	for (long i = 0; i < n; i++)
		for (uint64_t address = scan->regions[i].start; address < scan->regions[i].end; address += PAGE) {
			uint64_t k = (address - at) / PAGE;

			if (part->verdicts[k] == SETTLED)
				continue;
			if (at == part->aside)
				part->verdicts[k] = (uint8_t)verdict_of(session->pm.entries[part->first + k],
									scan->regions[i].categories);
			else if (scan->regions[i].categories & (SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED))
				part->verdicts[k] = at == part->staging ? STAGED : HERE;
		}
	return n < 0 ? (int)n : 0;
}

static int look_everywhere(struct sn_session *session, struct parts *parts, int pagemap)
{
	int error = parts->error;

	for (long i = 0; i < parts->n && !error; i++) {
		struct part *part = &parts->list[i];
		struct scan scan = {pagemap, calloc(part->npages + 1, sizeof(*scan.regions))};

		for (uint64_t k = 0; k < part->npages; k++)
			part->verdicts[k] =
				session->pm.entries[part->first + k] & ENTRY_MOVING ? NOWHERE : SETTLED;
		error = scan.regions ? look(session, part, part->start, &scan) : -ENOMEM;
		if (!error)
			error = look(session, part, part->aside, &scan);
		if (!error)
			error = look(session, part, part->staging, &scan);
		free(scan.regions);
	}
	return error;
}

/* Calls one for each run of pages with a verdict; the first error ends it. */
static int each_run(struct sn_session *session, struct parts *parts, enum verdict verdict,
		    int (*one)(struct sn_session *, struct part *, uint64_t page, uint64_t npages))
{
	int error = 0;

	for (long i = 0; i < parts->n && !error; i++) {
		struct part *part = &parts->list[i];

		for (uint64_t page = 0, n; page < part->npages && !error; page += n) {
			for (n = 0; page + n < part->npages && part->verdicts[page + n] == verdict; n++)
				;
			if (n)
				error = one(session, part, page, n);
			else
				n = 1;
		}
	}
	return error;
}

static bool any_is_there(struct sn_session *session, uint64_t at, uint64_t npages)
{
	struct snapd_page_region region;

	return pagemap_scan(session->pagemap_fd, at, at + npages * PAGE, SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED,
			    SNAPD_PAGE_IS_PRESENT, 0, &region, 1, NULL) > 0;
}

static bool is_there(struct sn_session *session, uint64_t at)
{
	return any_is_there(session, at, 1);
}

static int install_guard(struct sn_session *session, struct part *part, uint64_t page, uint64_t npages)
{
	struct snapd_wire message = {
		.kind = SNAPD_GUARD, .nruns = 1, .runs = {{part->start + page * PAGE, npages * PAGE}}};

	return mover_call(session, &message) == -EPIPE ? -EPIPE : 0;
}

/* The pin pass of a run, as far as it came and on from there: what is pinned stays in the aside. */
static int pin_run(struct sn_session *session, struct part *part, uint64_t page, uint64_t npages)
{
	uint64_t done = 0;

	while (done < npages) {
		struct snapd_wire message = {
			.kind = SNAPD_PIN,
			.nruns = 2,
			.runs = {{part->aside + (page + done) * PAGE, (npages - done) * PAGE},
				 {part->staging + (page + done) * PAGE, 0}}};
		uint64_t reached;
		int error = mover_call(session, &message);

		if (error == -EPIPE)
			return error;
		if (error == MOVER_SILENT || error == MOVER_FILTERED) { /* what it has moved is in the staging */
			for (uint64_t k = page + done; k < page + npages; k++)
				part->verdicts[k] =
					is_there(session, part->staging + k * PAGE) ? STAGED : IS_PINNED;
			break;
		}
		for (unsigned int i = 0; i < message.nruns; i++)
			for (uint64_t at = 0; at < message.runs[i].length; at += PAGE) {
				uint64_t k = (message.runs[i].start + at - part->aside) / PAGE;

				if (k >= page && k < page + npages)
					part->verdicts[k] = IS_PINNED;
			}
		reached = error || message.flags & SNAPD_REPLY_MORE ? (message.value - part->aside) / PAGE - page
								     : npages;
		if (error) /* not to be known: what did not move is not stored either */
			for (uint64_t k = min_u64(reached, npages); k < npages; k++)
				part->verdicts[page + k] = IS_PINNED;
		if (error || reached <= done)
			break;
		done = reached;
	}
	for (uint64_t k = page; k < page + npages; k++)
		if (part->verdicts[k] == IS_DIRTY)
			part->verdicts[k] = STAGED;
	return 0;
}

/* Pinned pages return to where the program has them now. A child that was forked meanwhile takes a copy. */
static int return_run(struct sn_session *session, struct part *part, uint64_t page, uint64_t npages)
{
	unsigned char copy[PAGE];
	int error;

	for (uint64_t k = page; atomic_load(&session->fork_copies) && k < page + npages; k++)
		if (memory_read(session, part->aside + k * PAGE, copy, PAGE) == (long)PAGE)
			uffd_copy(session->uffd, part->staging + k * PAGE, copy, PAGE, 0, NULL);
	/* One of which a copy was handed out is the program's by now. */
	error = session->loan && any_is_there(session, part->start + page * PAGE, npages)
			? -EEXIST
			: move_back(session, part->aside + page * PAGE, part->start + page * PAGE, npages * PAGE);
	for (uint64_t k = page; k < page + npages; k++)
		part->verdicts[k] = error && is_there(session, part->aside + k * PAGE) ? IS_LEFT : HERE;
	return error == -EPIPE ? error : 0;
}

/* Of a page that was found once and is nowhere: whoever wants it gets SIGBUS, and the log says why. */
static void tell_of_loss(struct sn_session *session, uint64_t address)
{
	COUNT(session, bad_pages);
	notify(&(struct sn_notice){.kind = SN_NOTICE_BAD_FRAME, .session = session->id, .address = address,
				   .cause = FRAME_LOST_ASIDE});
}

static uint64_t settled(uint64_t entry, enum verdict verdict)
{
	switch (verdict) {
	case STAGED:
	case IS_LEFT:
		return ST_ASIDE;
	case IS_CLEAN:
		return ENTRY_WITH(entry, ST_STORED);
	case IS_ZERO:
		return ST_ZERO;
	case IS_GUARD:
		return ST_GUARD;
	case NOWHERE:
		if (ENTRY_STATE(entry) == ST_ASIDE) /* it was found once, and is nowhere: never zeros */
			return ST_BAD;
		return ENTRY_STATE(entry) == ST_FILLED || ENTRY_STATE(entry) == ST_GUARD ? ST_NONE
											 : entry & ~ENTRY_MOVING;
	default:
		return ST_NONE; /* it is at its address */
	}
}

/* The records say for good where pages are before an entry says that one is there: a death in between is no harm. */
static void point(struct sn_session *session, struct table *table, const struct part *part)
{
	struct record *records = session->scratch;
	long n = pm_cut(table, part->start, part->start + part->npages * PAGE, records, MAX_RECORDS);

	for (long i = 0; i < n; i++)
		for (uint64_t k = 0, run; k < records[i].npages; k += run) {
			uint64_t page = (records[i].start - part->start) / PAGE + k;
			const uint8_t *verdicts = part->verdicts + page;
			bool left = verdicts[0] == IS_LEFT || (verdicts[0] == SETTLED && part->left);

			for (run = 1; k + run < records[i].npages; run++)
				if ((verdicts[run] == IS_LEFT || (verdicts[run] == SETTLED && part->left)) != left)
					break;
			pm_insert(table, (struct record){records[i].start + k * PAGE, run, records[i].first + k,
							 (left ? part->aside : part->staging) + page * PAGE});
		}
}

/* What is pinned returns to its address and a guard is installed at it: by then the program may have something else
 * there, unless it stands. */
static bool takes_a_stop(uint64_t entry, enum verdict verdict)
{
	return verdict == IS_GUARD || verdict == IS_DIRTY || verdict == IS_PINNED ||
	       (verdict == NOWHERE && ENTRY_STATE(entry) == ST_ASIDE);
}

static void end_cut(struct sn_session *session)
{
	const struct table *table = pm_table(&session->pm);

	/* What is still marked was never moved. */
	for (uint64_t i = 0; i < table->nrecords; i++)
		for (uint64_t k = 0; table->records[i].first != NO_ENTRIES && k < table->records[i].npages; k++)
			if (session->pm.entries[table->records[i].first + k] & ENTRY_MOVING)
				atomic_fetch_and(&session->pm.entries[table->records[i].first + k], ~ENTRY_MOVING);
	FAULT_POINT(FP_CUT_SETTLED);
	for (int i = 0; i < MAX_INFLIGHT * MAX_SPANS; i++)
		if (intent_at(session, i)->phase == PHASE_CUT)
			intent_at(session, i)->phase = PHASE_STORE;
	session->cut = false;
}

/* Settles what was found, as far as it can be while the program runs or not; with the lock held. */
static void settle(struct sn_session *session, const struct parts *parts, bool stands)
{
	struct table *table = pm_edit(&session->pm);
	bool all = true;

	for (long i = 0; i < parts->n; i++)
		point(session, table, &parts->list[i]);
	pm_commit(&session->pm);
	FAULT_POINT(FP_CUT_POINTED);
	for (long i = 0; i < parts->n; i++) {
		const struct part *part = &parts->list[i];

		for (uint64_t k = 0; k < part->npages; k++) {
			uint64_t entry = session->pm.entries[part->first + k];
			enum verdict verdict = (enum verdict)part->verdicts[k];

			if (verdict == SETTLED)
				continue;
			FAULT_POINT(FP_CUT_SETTLING);
			if (stands || !takes_a_stop(entry, verdict)) {
				entry_put(session, part->first + k, settled(entry, verdict));
				if (verdict == NOWHERE && ENTRY_STATE(entry) == ST_ASIDE)
					tell_of_loss(session, part->start + k * PAGE);
			} else {
				all = false;
			}
		}
	}
	if (all)
		end_cut(session);
}

/* What is where, by a table that has all that the program did: no event is unread, and no call that raises one has
 * changed anything yet. Returns with the lock held, or an error. */
static int look_while_it_runs(struct sn_session *session, struct parts *parts)
{
	for (int tries = 0; tries < RUNNING_TRIES; tries++) {
		int error;

		pthread_rwlock_wrlock(&session->lock);
		find_parts(session, parts);
		error = look_everywhere(session, parts, atomic_load(&session->pagemap_fd));
		if (!error && !uffd_changing(session->uffd))
			return 0;
		pthread_rwlock_unlock(&session->lock);
		free_parts(parts);
		*parts = (struct parts){0};
		if (error)
			return error;
		usleep(RUNNING_PAUSE_US);
	}
	return -EAGAIN;
}

/* Before any stop: a thread that waits for a page of the cut one inside a call of the kernel's would not stand until it
 * has it. Nobody but the mover touches an aside or a staging, so the pin pass needs no stop either. */
static int finish_while_it_runs(struct sn_session *session)
{
	int error = 0;

	for (int round = 0; round < RUNNING_ROUNDS && session->cut && !error; round++) {
		struct parts parts = {0};

		error = look_while_it_runs(session, &parts);
		if (!error) {
			FAULT_POINT(FP_CUT_SEEN);
			settle(session, &parts, false);
			pthread_rwlock_unlock(&session->lock);
			error = each_run(session, &parts, IS_DIRTY, pin_run);
			FAULT_POINT(FP_CUT_MOVED);
		}
		free_parts(&parts);
	}
	return error;
}

/* When no thread of a target without an agent can be lent, because each of them waits in a call of the kernel's for a
 * page of the cut stop: what takes no mover is settled, and until all stand they get copies of what is aside. Whether
 * such a page is pinned is not known. */
static int hand_out(struct sn_session *session)
{
	struct parts parts = {0};
	int error;

	if (!session->cut || !ring_is_applied(session))
		return 0;
	error = memory_open(session);
	if (!error)
		error = look_while_it_runs(session, &parts);
	if (!error) {
		settle(session, &parts, false);
		session->handing = session->cut;
		pthread_rwlock_unlock(&session->lock);
	}
	free_parts(&parts);
	return error;
}

int sn_session_hand_out(struct sn_session *session)
{
	int error;

	pthread_mutex_lock(&session->mover);
	error = hand_out(session);
	pthread_mutex_unlock(&session->mover);
	return error;
}

static int finish_stop(struct sn_session *session)
{
	struct parts parts = {0};
	int error;

	/* Nothing runs, so no event is unread: all that the program did meanwhile is in the table. */
	pthread_rwlock_wrlock(&session->lock);
	find_parts(session, &parts);
	session->in_stop = true;
	session->handing = false;
	pthread_rwlock_unlock(&session->lock);
	FAULT_POINT(FP_CUT_STANDING);
	error = look_everywhere(session, &parts, atomic_load(&session->pagemap_fd));
	FAULT_POINT(FP_CUT_LOOKED);
	if (!error)
		error = each_run(session, &parts, IS_GUARD, install_guard);
	if (!error)
		error = each_run(session, &parts, IS_DIRTY, pin_run);
	FAULT_POINT(FP_CUT_PINNED);
	if (!error)
		error = each_run(session, &parts, IS_PINNED, return_run);
	FAULT_POINT(FP_CUT_RETURNED);
	pthread_rwlock_wrlock(&session->lock);
	if (!error)
		settle(session, &parts, true);
	session->in_stop = false;
	pthread_rwlock_unlock(&session->lock);
	free_parts(&parts);
	return error;
}

/* Where a page of the source is that a child may not have yet, by the entry that both know it by, else by where the
 * child's record says. 0: nowhere. For the child's reader, when the source's stop is finished. */
int recover_find(struct sn_session *source, uint64_t index, uint64_t aside, uint64_t *ret)
{
	int error = 0;

	struct snapd_page_region region;
	const struct table *table;

	*ret = 0;
	pthread_rwlock_rdlock(&source->lock);
	table = pm_table(&source->pm);
	for (uint64_t i = 0; i < table->nrecords; i++) {
		const struct record *record = &table->records[i];

		if (record->first != NO_ENTRIES && record->aside && index - record->first < record->npages)
			aside = record->aside + (index - record->first) * PAGE;
	}
	for (int i = 0; i < MAX_INFLIGHT * MAX_SPANS && aside && !*ret; i++) {
		const struct intent *intent = intent_at(source, i);
		uint64_t places[2] = {0, 0};

		if (inside(aside, intent->staging, intent_bytes(intent))) {
			places[0] = aside;
			places[1] = intent->aside + (aside - intent->staging);
		} else if (inside(aside, intent->aside, intent_bytes(intent))) {
			places[0] = intent->staging + (aside - intent->aside);
			places[1] = aside;
		}
		for (int k = 0; k < 2 && places[k] && !*ret && !error; k++) {
			long n = pagemap_scan(source->pagemap_fd, places[k], places[k] + PAGE,
					      SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED, SNAPD_PAGE_IS_PRESENT, 0,
					      &region, 1, NULL);

			if (n < 0)
				error = (int)n;
			else if (n > 0)
				*ret = places[k];
		}
	}
	pthread_rwlock_unlock(&source->lock);
	return error;
}

int sn_session_is_cut(struct sn_session *session)
{
	return session->cut;
}

struct recovery {
	struct sn_session *session;
	int outcome;
};

static int begin_stop(struct sn_session *session)
{
	int outcome = stop_begin(session->stop, atomic_load(&session->pid), session->agent_tids, true);

	for (int tries = 0; session->loan && outcome == SN_BUSY && tries < HAND_TRIES; tries++) {
		if (hand_out(session))
			break;
		stop_finish(session->stop);
		outcome = stop_begin(session->stop, atomic_load(&session->pid), session->agent_tids, true);
	}
	return outcome;
}

static int recover(struct sn_session *session)
{
	struct snapd_wire ping = {.kind = SNAPD_PING};
	int outcome, error;

	/* Where the last move went may stand in the ring only: nobody knows of its aside then, and what is in it would
	 * pass for what was never moved. */
	if (!ring_is_applied(session))
		return SN_BUSY;
	/* Its answer says that the mover is through with what the former daemon wanted of it. One that was ended since,
	 * or that a filter would kill, is none to wait for. */
	error = session->mover_ended ? 0 : mover_call(session, &ping);
	if (!error)
		error = memory_open(session);
	if (error && error != MOVER_FILTERED)
		return error == MOVER_LATE || error == MOVER_SILENT ? SN_SILENT : SN_GONE;
	if (!session->cut)
		return SN_MOVED;
	if (session->source) /* the reader gets its pages from the parent, when that knows where they are */
		return SN_BUSY;
	hold_take(session); /* if it can't be, children that are forked now may lose pages to the parent's exit */
	if (!session->loan) /* who would be lent may be who waits */
		error = finish_while_it_runs(session);
	if (!session->cut)
		return SN_MOVED;
	if (error == -EPIPE || error == -ESRCH)
		return SN_GONE;
	mover_pause(session);
	outcome = begin_stop(session);
	if (outcome == SN_MOVED) {
		error = finish_stop(session);
		if (error)
			outcome = error == -EPIPE || error == -ESRCH ? SN_GONE : SN_FAILED;
		lift_end();
		stop_end(session->stop);
	}
	mover_continue(session);
	return outcome;
}

static void recover_main(void *arg)
{
	struct recovery *recovery = arg;

	recovery->outcome = recover(recovery->session);
}

int sn_session_recover(struct sn_session *session)
{
	struct recovery recovery = {session, SN_FAILED};

	pthread_mutex_lock(&session->mover);
	if (session_stop(session))
		stop_run(session->stop, recover_main, &recovery);
	pthread_mutex_unlock(&session->mover);
	return recovery.outcome;
}

static bool on_its_way(struct sn_session *session, int slot)
{
	const struct intent *intents = intent_at(session, slot * MAX_SPANS);

	for (int i = 0; i < MAX_SPANS; i++)
		if (intents[i].phase == PHASE_STORE || intents[i].phase == PHASE_DROP)
			return true;
	return session->pm.header->stagings[slot].length != 0;
}

/* The segments of a piece are the records whose pages are in its staging. With segments NULL they are counted. */
static long find_segments(struct sn_piece *piece, struct segment *segments)
{
	const struct table *table = pm_table(&piece->session->pm);
	long n = 0;

	for (int i = 0; i < piece->nspans; i++) {
		struct span *span = &piece->spans[i];

		for (uint64_t k = 0; k < table->nrecords; k++) {
			const struct record *record = &table->records[k];
			uint64_t from, to;

			if (record->first == NO_ENTRIES || !record->aside)
				continue;
			span->keep_aside |= inside(record->aside, span->aside, span_bytes(span));
			from = max_u64(record->aside, span->staging);
			to = min_u64(record->aside + record->npages * PAGE, span->staging + span_bytes(span));
			if (!span->staging || from >= to)
				continue;
			if (segments)
				segments[n] = (struct segment){record->first + (from - record->aside) / PAGE,
							       (to - from) / PAGE, from,
							       span->base + (from - span->staging) / PAGE};
			n++;
		}
	}
	return n;
}

struct sn_piece *sn_piece_adopt(struct sn_session *session, int slot)
{
	const struct page_map_header *header = session->pm.header;
	struct sn_piece *piece;

	if (slot < 0 || slot >= MAX_INFLIGHT || session->inflight[slot] || !on_its_way(session, slot))
		return NULL;
	piece = calloc(1, sizeof(*piece));
	if (!piece)
		return NULL;
	piece->session = session;
	piece->slot = slot;
	piece->adopted = true;
	piece->nspans = MAX_SPANS;
	piece->staging = header->stagings[slot].start;
	piece->staging_bytes = header->stagings[slot].length;
	pthread_mutex_init(&piece->lock, NULL);
	pthread_cond_init(&piece->done, NULL);
	pthread_rwlock_wrlock(&session->lock);
	session->inflight[slot] = piece;
	for (int i = 0; i < MAX_SPANS; i++) {
		const struct intent *intent = &header->intents[slot * MAX_SPANS + i];

		piece->spans[i] = (struct span){.start = intent->start, .npages = intent->npages,
						.aside = intent->aside, .staging = intent->staging,
						.base = piece->npages};
		piece->npages += intent->npages;
	}
	piece->nsegments = find_segments(piece, NULL);
	piece->segments = calloc((size_t)piece->nsegments + 1, sizeof(*piece->segments));
	piece->decisions = calloc(piece->npages + 1, 1);
	piece->regions = calloc(1, sizeof(*piece->regions));
	if (piece->segments)
		find_segments(piece, piece->segments);
	if (piece->decisions) /* what is aside in the staging was found to be that */
		memset(piece->decisions, DIRTY, piece->npages);
	pthread_rwlock_unlock(&session->lock);
	if (!piece->segments || !piece->decisions || !piece->regions) {
		session->inflight[slot] = NULL; /* and nothing of it is forgotten */
		free(piece->segments);
		free(piece->decisions);
		free(piece->regions);
		free(piece);
		return NULL;
	}
	FAULT_POINT(FP_PIECE_ADOPTED);
	return piece;
}

/* Whether a page of a staging or aside is still that. The former daemon may have unmapped it, and then the program's
 * own memory can be there: that is not watched, or has a record. */
static bool is_ours(struct sn_session *session, uint64_t address)
{
	enum uffd_result result = UFFD_AGAIN;
	bool recorded;

	pthread_rwlock_rdlock(&session->lock);
	recorded = pm_find(pm_table(&session->pm), address) >= 0;
	pthread_rwlock_unlock(&session->lock);
	for (int tries = 0; !recorded && result == UFFD_AGAIN && tries < PROBE_TRIES; tries++) {
		result = uffd_zero(session->uffd, address, PAGE);
		if (result == UFFD_AGAIN)
			usleep(50);
	}
	return !recorded && (result == UFFD_DONE || result == UFFD_EXISTS);
}

/* The first run of pages that is still ours; no bytes: there is none. */
struct snapd_run recover_ours(struct sn_session *session, struct snapd_run whole)
{
	struct snapd_run run = {whole.start, 0};
	uint64_t end = whole.start + whole.length;

	while (run.start < end && !is_ours(session, run.start))
		run.start += PAGE;
	while (run.start + run.length < end && (!run.length || is_ours(session, run.start + run.length)))
		run.length += PAGE;
	return run;
}
