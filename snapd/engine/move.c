/* One stop: stop, stage, recheck, watch, move, look, pin pass, go on. The order is docs/design.md's.
 *
 * Inside the stop nothing is allocated and nothing logged. Knows the page map and the mover; the piece's life
 * before and after is piece.c's. */
#include "internal.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define RECORD_RESERVE 4096
#define BACK_TRIES 100
#define MERGE_GAP 32 /* pages that need no pin pass but cost less inside a run than a run of their own */
#define LOOK                                                                                                           \
	(SNAPD_PAGE_IS_WRITTEN | SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED | SNAPD_PAGE_IS_PFNZERO |               \
	 SNAPD_PAGE_IS_HUGE | SNAPD_PAGE_IS_GUARD)

/* While the program stands: what it was about to do as the stop before this one ended it does now, and if that is to
 * forbid its threads the mover's calls, the first of them would kill it. */
static int stage(struct sn_piece *piece)
{
	struct sn_session *session = piece->session;
	struct snapd_wire message = {
		.kind = SNAPD_STAGE, .length = piece->staging_bytes, .dest = piece->staging_hint};
	int error;

	session->standing = true;
	error = mover_call(session, &message);
	session->standing = false;
	if (error)
		return error;
	FAULT_POINT(FP_STAGE_MAPPED);
	piece->staging = message.value;
	session->pm.header->stagings[piece->slot] = (struct snapd_run){piece->staging, piece->staging_bytes};
	FAULT_POINT(FP_STAGED);
	for (int i = 0; i < piece->nspans; i++)
		piece->spans[i].staging += piece->staging;
	return uffd_register(session->uffd, piece->staging, piece->staging_bytes, SNAPD_UFFDIO_REGISTER_MODE_MISSING);
}

/* While the program still runs: what a piece moves a part of is no huge page any more when the stop looks at it. */
static void note_huge(struct sn_piece *piece)
{
	for (int i = 0; i < piece->nspans; i++) {
		const struct span *span = &piece->spans[i];
		uint64_t start = span->start & ~(HUGE_BYTES - 1);
		uint64_t end = (span->start + span_bytes(span) + HUGE_BYTES - 1) & ~(HUGE_BYTES - 1);
		long n = pagemap_scan(atomic_load(&piece->session->pagemap_fd), start, end, SNAPD_PAGE_IS_HUGE,
				      SNAPD_PAGE_IS_HUGE, 0, piece->regions, piece->npages + 1, NULL);

		for (long k = 0; k < n; k++)
			huge_note(piece->session->huge, piece->regions[k].start, piece->regions[k].end);
	}
}

/* The mapping is still what was chosen, and nothing in it may not move. Returns an outcome. */
static int recheck(const struct sn_piece *piece, const struct span *span, struct snapd_procmap_query *vma)
{
	uint64_t end = span->start + span_bytes(span);

	*vma = (struct snapd_procmap_query){.size = sizeof(*vma), .query_addr = span->start};
	if (ioctl(atomic_load(&piece->session->maps_fd), SNAPD_PROCMAP_QUERY, vma))
		return errno == ESRCH ? SN_GONE : SN_CHANGED;
	if (vma->vma_start > span->start || vma->vma_end < end || vma->inode || vma->dev_major || vma->dev_minor ||
	    !(vma->vma_flags & SNAPD_PROCMAP_VMA_READABLE) || !(vma->vma_flags & SNAPD_PROCMAP_VMA_WRITABLE) ||
	    vma->vma_flags & SNAPD_PROCMAP_VMA_SHARED || stop_touches(piece->session->stop, span->start, end) ||
	    robust_touches(piece->session->robust, span->start, end))
		return SN_CHANGED;
	return SN_MOVED;
}

/* Registers the whole mapping: a part would split it, and the program's own mremap across the split fails. Records at
 * addresses that were not watched belong to a mapping that is gone. */
static int watch(struct sn_piece *piece, struct span *span, const struct snapd_procmap_query *vma)
{
	struct sn_session *session = piece->session;
	bool watched = sn_watched(atomic_load(&session->pagemap_fd), span->start) == 1;
	struct table *table;
	long n;

	if (!FAULT_ERROR(FP_REGISTERING))
		span->cause = sn_uffd_register(session->uffd, vma->vma_start, vma->vma_end - vma->vma_start);
	switch (span->cause) {
	case 0: break;
	case -EBUSY: return SN_FOREIGN;
	case -ESRCH: return SN_GONE;
	case -ENOMEM: return SN_NO_ROOM;
	default: return SN_FAILED;
	}
	pthread_rwlock_wrlock(&session->lock);
	table = pm_edit(&session->pm);
	n = watched ? 0 : pm_cut(table, vma->vma_start, vma->vma_end, session->scratch, MAX_RECORDS);
	for (long i = 0; i < n; i++)
		for (uint64_t k = 0; session->scratch[i].first != NO_ENTRIES && k < session->scratch[i].npages; k++)
			entry_put(session, session->scratch[i].first + k, ST_NONE);
	span->cause = pm_blank(table, vma->vma_start, vma->vma_end);
	pm_commit(&session->pm);
	pthread_rwlock_unlock(&session->lock);
	return span->cause ? SN_NO_ROOM : SN_MOVED;
}

/* Gives every page of the span an entry in the table that is being edited. */
static int cover(struct page_map *pm, struct table *table, const struct span *span)
{
	uint64_t at = span->start, end = at + span_bytes(span), first;
	int error = 0;

	if (table->nrecords > MAX_RECORDS - RECORD_RESERVE)
		return -ENOSPC;
	while (at < end && !error) {
		long i = pm_first_at(table, at);
		const struct record *next = i < (long)table->nrecords ? &table->records[i] : NULL;
		bool here = next && next->start <= at;
		uint64_t upto = here ? next->start + next->npages * PAGE : next ? next->start : end;

		upto = min_u64(upto, end);
		if (!here || next->first == NO_ENTRIES) {
			if (here)
				pm_cut(table, at, upto, NULL, 0);
			error = pm_alloc(pm, (upto - at) / PAGE, &first);
			if (!error)
				error = pm_insert(table, (struct record){at, (upto - at) / PAGE, first, 0});
		}
		at = upto;
	}
	return error;
}

static int find_segments(struct sn_piece *piece, struct span *span, const struct table *table)
{
	uint64_t end = span->start + span_bytes(span);

	span->first_segment = piece->nsegments;
	for (long i = pm_first_at(table, span->start); i < (long)table->nrecords; i++) {
		const struct record *record = &table->records[i];
		uint64_t from = max_u64(record->start, span->start);
		uint64_t to = min_u64(record->start + record->npages * PAGE, end);
		uint64_t page = (from - span->start) / PAGE;

		if (record->start >= end)
			break;
		if (piece->nsegments == MAX_SEGMENTS_OF_PIECE || record->aside) {
			piece->nsegments = span->first_segment;
			return record->aside ? -EBUSY : -E2BIG;
		}
		piece->segments[piece->nsegments++] =
			(struct segment){record->first + (from - record->start) / PAGE, (to - from) / PAGE,
					 span->staging + page * PAGE, span->base + page};
	}
	span->nsegments = piece->nsegments - span->first_segment;
	return 0;
}

static void set_moving(struct sn_piece *piece, const struct span *span, bool moving)
{
	for (long i = 0; i < span->nsegments; i++) {
		const struct segment *segment = &piece->segments[span->first_segment + i];

		for (uint64_t k = 0; k < segment->npages; k++) {
			if (moving)
				atomic_fetch_or(&piece->session->pm.entries[segment->first + k], ENTRY_MOVING);
			else
				atomic_fetch_and(&piece->session->pm.entries[segment->first + k], ~ENTRY_MOVING);
		}
	}
}

/* /proc may list a mapping twice while it grows: no page is moved for two spans. */
static bool overlaps_earlier(const struct sn_piece *piece, int span)
{
	const struct span *one = &piece->spans[span];

	for (int i = 0; i < span; i++) {
		const struct span *other = &piece->spans[i];

		if (other->outcome == SN_MOVED && other->start < one->start + span_bytes(one) &&
		    one->start < other->start + span_bytes(other))
			return true;
	}
	return false;
}

/* From here to settle() every event is our own. Debts are void: at a full stop no event is unread. */
static void claim(struct sn_piece *piece)
{
	struct sn_session *session = piece->session;
	struct table *table;

	pthread_rwlock_wrlock(&session->lock);
	table = pm_edit(&session->pm);
	table->ndebts = 0;
	for (int i = 0; i < piece->nspans; i++) {
		struct span *span = &piece->spans[i];

		if (span->outcome != SN_MOVED)
			continue;
		span->cause = overlaps_earlier(piece, i) ? -EBUSY : cover(&session->pm, table, span);
		if (!span->cause)
			span->cause = find_segments(piece, span, table);
		if (span->cause) {
			span->outcome = span->cause == -EBUSY ? SN_BUSY : SN_NO_ROOM;
			continue;
		}
	}
	piece_set_phase(piece, PHASE_MOVE);
	pm_commit(&session->pm);
	for (int i = 0; i < piece->nspans; i++)
		if (piece->spans[i].outcome == SN_MOVED)
			set_moving(piece, &piece->spans[i], true);
	session->in_stop = session->unseen = true;
	pthread_rwlock_unlock(&session->lock);
}

static void unclaim(struct sn_piece *piece, struct span *span, int outcome)
{
	pthread_rwlock_wrlock(&piece->session->lock);
	set_moving(piece, span, false);
	span->outcome = outcome;
	pthread_rwlock_unlock(&piece->session->lock);
}

/* There must be a way back: memory for a mapping may be short for a moment. */
int move_back(struct sn_session *session, uint64_t from, uint64_t to, uint64_t bytes)
{
	int error = 0;

	for (int tries = 0; tries < BACK_TRIES; tries++) {
		struct snapd_wire message = {.kind = SNAPD_BACK, .addr = from, .length = bytes, .dest = to};

		error = mover_call(session, &message);
		if (error != -ENOMEM && error != -EAGAIN)
			break;
		usleep(1000);
	}
	return error;
}

static int outcome_of_mremap(int error)
{
	switch (error) {
	case ENOMEM: return SN_NO_ROOM;
	case EPERM: return SN_SEALED;
	case EFAULT: return SN_CHANGED;
	case -MOVER_SILENT: return SN_SILENT;
	default: return SN_FAILED;
	}
}

/* What the event said, which is in the page map; 0 for no event. */
static uint64_t where_it_went(const struct sn_piece *piece, int span)
{
	return piece->session->pm.header->intents[piece->slot * MAX_SPANS + span].aside;
}

static int move(struct sn_piece *piece)
{
	struct sn_session *session = piece->session;
	struct snapd_wire message = {.kind = SNAPD_MOVE};
	int error;

	for (int i = 0; i < piece->nspans; i++) {
		const struct span *span = &piece->spans[i];

		if (span->outcome != SN_MOVED)
			continue;
		message.runs[message.nruns++] = (struct snapd_run){span->start, span_bytes(span)};
		message.runs[message.nruns++] = (struct snapd_run){span->hint, 0};
	}
	error = message.nruns ? mover_call(session, &message) : 0;
	if (error == -EPIPE)
		return error;
	/* The mremaps returned, so their events were read; taking the lock makes sure that they were applied. */
	pthread_rwlock_wrlock(&session->lock);
	pthread_rwlock_unlock(&session->lock);
	for (int i = 0, pair = 0; i < piece->nspans; i++) {
		struct span *span = &piece->spans[i];

		if (span->outcome != SN_MOVED)
			continue;
		/* Without a reply the events say what was moved. */
		span->aside = error ? where_it_went(piece, i) : message.runs[2 * pair + 1].start;
		span->cause = error ? error : -(int)message.runs[2 * pair++ + 1].length;
		if (!span->aside) {
			unclaim(piece, span, outcome_of_mremap(-span->cause));
		} else if (where_it_went(piece, i) != span->aside) {
			/* No event: the mapping was not ours to watch. Nothing runs: it goes back as if nothing had
			 * been. */
			if (move_back(session, span->aside, span->start, span_bytes(span)) == 0)
				span->aside = 0;
			else
				span->keep_aside = true; /* all that is left of these pages */
			unclaim(piece, span, SN_CHANGED);
		}
	}
	piece_set_phase(piece, PHASE_PIN);
	return 0;
}

static uint64_t entry_of(const struct sn_piece *piece, uint64_t page, long *segment)
{
	while (page >= piece->segments[*segment].base + piece->segments[*segment].npages)
		++*segment;
	return piece->segments[*segment].first + (page - piece->segments[*segment].base);
}

/* What the aside holds decides each page, whatever its entry said. */
static int look(struct sn_piece *piece, struct span *span, struct sn_piece_report *ret)
{
	_Atomic uint64_t *entries = piece->session->pm.entries;
	long segment = span->first_segment, n;

	n = FAULT_ERROR(FP_LOOKING);
	if (!n)
		n = pagemap_scan(atomic_load(&piece->session->pagemap_fd), span->aside, span->aside + span_bytes(span),
				 SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED | SNAPD_PAGE_IS_GUARD, LOOK, 0,
				 piece->regions, span->npages + 1, NULL);
	if (n < 0)
		return (int)n;
	memset(piece->decisions + span->base, ABSENT, span->npages);
	for (long i = 0; i < n; i++) {
		const struct snapd_page_region *region = &piece->regions[i];
		uint64_t from = (region->start - span->aside) / PAGE, to = (region->end - span->aside) / PAGE;

		for (uint64_t page = span->base + from; page < span->base + to; page++) {
			enum decision decision = DIRTY;
			enum state state = ENTRY_STATE(entries[entry_of(piece, page, &segment)]);

			if (region->categories & SNAPD_PAGE_IS_GUARD)
				decision = GUARD;
			else if (state == ST_BAD && !(region->categories & SNAPD_PAGE_IS_PRESENT))
				decision = POISON; /* its marker looks swapped */
			else if (region->categories & SNAPD_PAGE_IS_PFNZERO)
				decision = ZERO;
			else if (!(region->categories & SNAPD_PAGE_IS_WRITTEN) &&
				 (state == ST_STORED || state == ST_FILLED))
				decision = CLEAN;
			piece->decisions[page] = (uint8_t)decision;
			ret->present += decision != GUARD && decision != POISON;
			ret->huge += (region->categories & SNAPD_PAGE_IS_HUGE) != 0;
		}
	}
	return 0;
}

static int send_guards(struct sn_piece *piece, struct snapd_wire *message)
{
	int error = message->nruns ? mover_call(piece->session, message) : 0;

	*message = (struct snapd_wire){.kind = SNAPD_GUARD};
	return error;
}

/* Guards moved along: their addresses get new ones, by as many messages as it takes. */
static int install_guards(struct sn_piece *piece, struct sn_piece_report *ret)
{
	struct snapd_wire message = {.kind = SNAPD_GUARD};
	int error = 0;

	for (int i = 0; i < piece->nspans; i++) {
		const struct span *span = &piece->spans[i];

		for (uint64_t page = 0; span->outcome == SN_MOVED && page < span->npages && !error; page++) {
			uint64_t address = span->start + page * PAGE;
			struct snapd_run *last = message.nruns ? &message.runs[message.nruns - 1] : NULL;

			if (piece->decisions[span->base + page] != GUARD)
				continue;
			ret->guards++;
			if (last && last->start + last->length == address) {
				last->length += PAGE;
				continue;
			}
			if (message.nruns == SNAPD_WIRE_RUNS)
				error = send_guards(piece, &message);
			message.runs[message.nruns++] = (struct snapd_run){address, PAGE};
		}
	}
	return error ? error : send_guards(piece, &message);
}

/* Marks pages of asides; those that need no pin pass keep their decision. Asides of spans that follow each other do so
 * too: a run may be of several. */
static void mark(struct sn_piece *piece, uint64_t start, uint64_t bytes, enum decision decision)
{
	for (int i = 0; i < piece->nspans; i++) {
		const struct span *span = &piece->spans[i];
		uint64_t from = max_u64(start, span->aside);
		uint64_t to = min_u64(start + bytes, span->aside + span_bytes(span));

		for (uint64_t at = from; span->aside && at < to; at += PAGE) {
			uint8_t *one = &piece->decisions[span->base + (at - span->aside) / PAGE];

			if (*one == DIRTY || decision == LEFT_ASIDE)
				*one = (uint8_t)decision;
		}
	}
}

/* What PIN did of a pair before its mover ended: pages are in the staging or still in the aside. */
static void mark_unmoved(struct sn_piece *piece, const struct snapd_run *pair)
{
	uint64_t at = pair[1].start, end = at + pair[0].length;
	long n = pagemap_scan(piece->session->pagemap_fd, at, end, SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED,
			      SNAPD_PAGE_IS_PRESENT, 0, piece->regions, piece->npages + 1, NULL);

	for (long i = 0; i <= n; i++) {
		uint64_t upto = i < n ? piece->regions[i].start : end;

		if (upto > at)
			mark(piece, pair[0].start + (at - pair[1].start), upto - at, PINNED);
		at = i < n ? piece->regions[i].end : end;
	}
}

/* Sends pairs of runs until the pass is through them; pinned pages are marked. On an error the rest counts as pinned:
 * what was not moved to the staging goes back, whatever the cause. */
static void pin_runs(struct sn_piece *piece, struct snapd_run *pairs, unsigned int npairs)
{
	unsigned int first = 0;

	while (first < npairs) {
		struct snapd_wire message = {.kind = SNAPD_PIN, .nruns = 2 * (npairs - first)};
		unsigned int reached;
		uint64_t skip;
		int error;

		memcpy(message.runs, pairs + 2UL * first, message.nruns * sizeof(pairs[0]));
		error = mover_call(piece->session, &message);
		if (error == -EPIPE) /* the target is gone */
			return;
		if (error == MOVER_SILENT) {
			for (; first < npairs; first++)
				mark_unmoved(piece, pairs + 2UL * first);
			return;
		}
		for (unsigned int i = 0; i < message.nruns; i++)
			mark(piece, message.runs[i].start, message.runs[i].length, PINNED);
		if (!error && !(message.flags & SNAPD_REPLY_MORE))
			return;
		reached = first + (unsigned int)min_u64(message.dest, npairs - first - 1);
		skip = message.value - pairs[2 * reached].start;
		if (skip >= pairs[2 * reached].length) /* an agent that makes no sense */
			skip = 0;
		first = reached;
		pairs[2 * first].start += skip;
		pairs[2 * first].length -= skip;
		pairs[2 * first + 1].start += skip;
		if (error) {
			for (; first < npairs; first++)
				mark(piece, pairs[2 * first].start, pairs[2 * first].length, PINNED);
			return;
		}
	}
}

/* Guards and poison in between would fail the move; clean pages, zero pages and holes do not. */
static bool fit_between(const struct sn_piece *piece, uint64_t from, uint64_t to)
{
	int present = 0;

	for (uint64_t page = from; page < to; page++) {
		enum decision decision = (enum decision)piece->decisions[page];

		if (decision != CLEAN && decision != ZERO && decision != ABSENT)
			return false;
		present += decision != ABSENT;
	}
	return present < MERGE_GAP;
}

static void pin_pass(struct sn_piece *piece)
{
	struct snapd_run pairs[SNAPD_WIRE_RUNS];
	unsigned int npairs = 0;

	for (int i = 0; i < piece->nspans; i++) {
		const struct span *span = &piece->spans[i];
		uint64_t last_dirty = 0;
		bool open = false;

		for (uint64_t page = 0; span->outcome == SN_MOVED && page < span->npages; page++) {
			if (piece->decisions[span->base + page] != DIRTY)
				continue;
			if (open && fit_between(piece, span->base + last_dirty + 1, span->base + page)) {
				uint64_t to = span->aside + (page + 1) * PAGE;

				pairs[2 * npairs - 2].length = to - pairs[2 * npairs - 2].start;
			} else {
				if (npairs == SNAPD_WIRE_RUNS / 2) {
					pin_runs(piece, pairs, npairs);
					npairs = 0;
				}
				pairs[2 * npairs] = (struct snapd_run){span->aside + page * PAGE, PAGE};
				pairs[2 * npairs + 1] = (struct snapd_run){span->staging + page * PAGE, 0};
				npairs++;
				open = true;
			}
			last_dirty = page;
		}
	}
	if (npairs)
		pin_runs(piece, pairs, npairs);
}

static bool is_present(struct sn_session *session, uint64_t address)
{
	const uint64_t there = SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED;
	struct snapd_page_region region;

	return pagemap_scan(session->pagemap_fd, address, address + PAGE, there, there, 1, &region, 1, NULL) > 0;
}

/* What the pin pass was told is one thing, what is in the aside another: a page that is still there and not in the
 * staging would be dropped with the aside. One that is in both was brought into the aside since, by somebody who reads
 * all of the program's memory: what the program had is in the staging. */
static void check_moved(struct sn_piece *piece, struct span *span)
{
	long n = -ENOMEM;

	for (int tries = 0; n == -ENOMEM && tries < BACK_TRIES; tries++) {
		if (tries)
			usleep(1000);
		n = pagemap_scan(piece->session->pagemap_fd, span->aside, span->aside + span_bytes(span),
				 SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED, SNAPD_PAGE_IS_PRESENT, 0,
				 piece->regions, piece->npages + 1, NULL);
	}
	for (long i = 0; i < n; i++)
		for (uint64_t at = piece->regions[i].start; at < piece->regions[i].end; at += PAGE) {
			uint64_t page = (at - span->aside) / PAGE;
			uint8_t *decision = &piece->decisions[span->base + page];

			if (*decision == DIRTY && !is_present(piece->session, span->staging + page * PAGE))
				*decision = PINNED;
		}
	span->keep_aside |= n < 0;
}

/* Whether pages that were in an aside are there still. */
static bool still_there(struct sn_piece *piece, uint64_t start, uint64_t bytes)
{
	return pagemap_scan(piece->session->pagemap_fd, start, start + bytes,
			    SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED, SNAPD_PAGE_IS_PRESENT, 0, piece->regions,
			    piece->npages + 1, NULL) > 0;
}

/* Pinned pages return to their address, the pin with them. Where that fails they are served from the aside. */
static void return_pinned(struct sn_piece *piece, struct span *span, struct sn_piece_report *ret)
{
	const uint8_t *decisions = piece->decisions + span->base;

	for (uint64_t page = 0; page < span->npages;) {
		uint64_t count = 0;

		while (page + count < span->npages && decisions[page + count] == PINNED)
			count++;
		if (count && move_back(piece->session, span->aside + page * PAGE, span->start + page * PAGE,
			count * PAGE) && still_there(piece, span->aside + page * PAGE, count * PAGE)) {
			mark(piece, span->aside + page * PAGE, count * PAGE, LEFT_ASIDE);
			span->keep_aside = true;
		}
		ret->pinned += count;
		page += count ? count : 1;
	}
}

static uint64_t settled(uint64_t entry, enum decision decision, struct sn_piece_report *ret)
{
	switch (decision) {
	case ABSENT: /* what was filled and is not there was discarded without an event */
	case POISON:
		return ENTRY_STATE(entry) == ST_FILLED || ENTRY_STATE(entry) == ST_GUARD ? ST_NONE : entry;
	case DIRTY:
	case LEFT_ASIDE:
		ret->aside++;
		return ST_ASIDE;
	case CLEAN:
		ret->clean++;
		return ENTRY_WITH(entry, ST_STORED);
	case ZERO:
		ret->zero++;
		return ST_ZERO;
	case GUARD:
		return ST_GUARD;
	default:
		return ST_NONE; /* pinned: present at its address */
	}
}

/* The records of a span say where its pages are; a page that could not go back is still in the aside. */
static void point_aside(struct sn_piece *piece, const struct span *span, struct table *table)
{
	const uint8_t *decisions = piece->decisions + span->base;
	struct record *parts = piece->session->scratch;
	long n = pm_cut(table, span->start, span->start + span_bytes(span), parts, MAX_RECORDS);
	uint64_t done;

	for (long i = 0; i < n; i++)
		for (uint64_t k = 0; k < parts[i].npages; k += done) {
			uint64_t page = (parts[i].start - span->start) / PAGE + k;
			bool left = decisions[page] == LEFT_ASIDE;

			done = 1;
			while (k + done < parts[i].npages && (decisions[page + done] == LEFT_ASIDE) == left)
				done++;
			pm_insert(table, (struct record){parts[i].start + k * PAGE, done, parts[i].first + k,
							 (left ? span->aside : span->staging) + page * PAGE});
		}
}

/* Writes the decisions into the entries and lets faults go on. */
static void settle(struct sn_piece *piece, struct sn_piece_report *ret)
{
	struct sn_session *session = piece->session;
	_Atomic uint64_t *entries = session->pm.entries;
	struct table *table;

	pthread_rwlock_wrlock(&session->lock);
	table = pm_edit(&session->pm);
	for (int i = 0; i < piece->nspans; i++) {
		const struct span *span = &piece->spans[i];
		long segment = span->first_segment;

		if (span->outcome != SN_MOVED)
			continue;
		point_aside(piece, span, table);
		for (uint64_t page = span->base; page < span->base + span->npages; page++) {
			uint64_t index = entry_of(piece, page, &segment);

			uint64_t entry =
				settled(entries[index] & ~ENTRY_MOVING, (enum decision)piece->decisions[page], ret);

			if (piece->kept)
				piece_note_kept(piece, page, entry);
			FAULT_POINT(FP_SETTLING);
			entry_put(session, index, entry);
		}
	}
	pm_commit(&session->pm);
	FAULT_POINT(FP_SETTLED);
	session->in_stop = false;
	piece_set_phase(piece, PHASE_STORE);
	pthread_rwlock_unlock(&session->lock);
}

/* From here on a page that comes into an aside changes no decision. The agent's own write fault in the pin pass may
 * bring one in, where the kernel took what had been freed lazily. */
static void all_seen(struct sn_session *session)
{
	pthread_rwlock_wrlock(&session->lock);
	session->unseen = false;
	pthread_rwlock_unlock(&session->lock);
}

/* Everything between the stop's two ends. Each span is either moved whole or as it was. */
static int inside_stop(struct sn_piece *piece, struct sn_piece_report *ret)
{
	struct snapd_procmap_query vma;
	int error;

	FAULT_POINT(FP_STANDING);
	for (int i = 0; i < piece->nspans; i++) {
		struct span *span = &piece->spans[i];

		span->outcome = recheck(piece, span, &vma);
		if (span->outcome == SN_MOVED)
			span->outcome = watch(piece, span, &vma);
	}
	FAULT_POINT(FP_WATCHED);
	claim(piece);
	FAULT_POINT(FP_CLAIMED);
	error = move(piece);
	FAULT_POINT(FP_MOVED);
	for (int i = 0; i < piece->nspans; i++) {
		struct span *span = &piece->spans[i];

		if (error && span->outcome == SN_MOVED)
			unclaim(piece, span, error == -EPIPE ? SN_GONE : SN_FAILED);
		if (span->outcome != SN_MOVED)
			continue;
		span->cause = look(piece, span, ret);
		if (!span->cause)
			continue;
		/* Not to be known: back as it was, or served from where it is. */
		if (move_back(piece->session, span->aside, span->start, span_bytes(span)) == 0) {
			span->aside = 0;
			unclaim(piece, span, span->cause == -ESRCH ? SN_GONE : SN_FAILED);
		} else {
			memset(piece->decisions + span->base, LEFT_ASIDE, span->npages);
			span->keep_aside = true;
		}
	}
	all_seen(piece->session);
	FAULT_POINT(FP_LOOKED);
	install_guards(piece, ret);
	FAULT_POINT(FP_GUARDED);
	pin_pass(piece);
	FAULT_POINT(FP_PINNED);
	for (int i = 0; i < piece->nspans; i++) {
		if (piece->spans[i].outcome != SN_MOVED)
			continue;
		check_moved(piece, &piece->spans[i]);
		return_pinned(piece, &piece->spans[i], ret);
	}
	FAULT_POINT(FP_RETURNED);
	settle(piece, ret);
	FAULT_POINT(FP_LETTING_GO);
	return error == -EPIPE ? SN_GONE : SN_MOVED;
}

/* Segments of spans that did not move are nobody's to pack. */
static void keep_moved_segments(struct sn_piece *piece)
{
	long kept = 0;

	for (int i = 0; i < piece->nspans; i++) {
		struct span *span = &piece->spans[i];

		if (span->outcome != SN_MOVED)
			continue;
		for (long k = 0; k < span->nsegments; k++)
			piece->segments[kept + k] = piece->segments[span->first_segment + k];
		span->first_segment = kept;
		kept += span->nsegments;
	}
	piece->nsegments = kept;
}

static int outcome_of_start(int error)
{
	switch (error) {
	case 0: return SN_MOVED;
	case -ENOMEM: return SN_NO_ROOM;
	case MOVER_FILTERED: return SN_FILTERED;
	case MOVER_LATE:
	case MOVER_SILENT: return SN_SILENT;
	case -EPIPE:
	case -ESRCH:
	case -ENOENT: return SN_GONE;
	default: return SN_FAILED;
	}
}

/* From the stop's begin to its end. */
static void stand(struct sn_piece *piece, bool patient, struct sn_piece_report *ret)
{
	struct sn_session *session = piece->session;
	uint64_t began = now_ns();

	ret->outcome = stop_begin(session->stop, atomic_load(&session->pid), session->agent_tids, patient);
	ret->until_stopped_ns = now_ns() - began;
	ret->cause = stop_cause(session->stop);
	ret->threads = stop_threads(session->stop);
	if (ret->outcome == SN_MOVED) {
		ret->cause = robust_look(session);
		if (ret->cause)
			ret->outcome = SN_BUSY;
	}
	if (ret->outcome == SN_MOVED) {
		ret->cause = stage(piece);
		ret->outcome = outcome_of_start(ret->cause);
	}
	if (ret->outcome == SN_MOVED)
		ret->outcome = inside_stop(piece, ret);
	else
		piece->nspans = 0;
	lift_end();
	stop_end(session->stop);
	ret->stop_ns = now_ns() - began;
}

static void move_piece(struct sn_piece *piece, bool patient, struct sn_piece_report *ret)
{
	struct sn_session *session = piece->session;
	int error = memory_open(session);

	if (!error)
		error = hold_take(session);
	if (!error)
		error = mover_ready(session);
	if (error) {
		ret->cause = error;
		ret->outcome = outcome_of_start(error);
	} else {
		note_huge(piece);
		mover_pause(session);
		stand(piece, patient, ret);
		mover_continue(session);
		robust_fill(session);
		if (ret->cause == MOVER_LATE) { /* one that was only slow has put this piece off */
			error = mover_settle(session);
			ret->outcome = error ? outcome_of_start(error) : SN_BUSY;
		}
	}
	keep_moved_segments(piece);
	for (int i = 0; i < piece->nspans; i++) {
		ret->outcomes[i] = piece->spans[i].outcome;
		ret->causes[i] = piece->spans[i].cause;
	}
	if (!piece->nsegments && piece->staging) {
		struct snapd_run staging = {piece->staging, piece->staging_bytes};

		mover_unmap(session, staging);
		piece->staging = 0;
	}
}

struct move_job {
	struct sn_piece *piece;
	bool patient;
	struct sn_piece_report *ret;
};

static void move_main(void *arg)
{
	struct move_job *job = arg;

	move_piece(job->piece, job->patient, job->ret);
}

int sn_piece_move(struct sn_piece *piece, bool patient, struct sn_piece_report *ret)
{
	struct move_job job = {piece, patient, ret};
	struct sn_session *session = piece->session;
	int error;

	memset(ret, 0, sizeof(*ret));
	pthread_mutex_lock(&session->mover);
	error = session_stop(session) ? stop_run(session->stop, move_main, &job) : ENOMEM;
	if (error) {
		ret->outcome = SN_FAILED;
		ret->cause = -error;
	}
	pthread_mutex_unlock(&session->mover);
	return ret->outcome == SN_MOVED ? 0 : -EAGAIN;
}
