/* Events of the target's own doing: fork, remap, remove, unmap, applied to the page map.
 *
 * Called by the reader with the session's lock held exclusively since before the first of them was read. Owns the order
 * in which a batch makes sense; knows no fills.
 */
#include "internal.h"

#include <errno.h>
#include <sys/ioctl.h>

static void forget(struct sn_session *session, const struct record *records, long n)
{
	for (long i = 0; i < n; i++)
		for (uint64_t k = 0; records[i].first != NO_ENTRIES && k < records[i].npages; k++)
			entry_put(session, records[i].first + k, ST_NONE);
}

/* Cuts as often as the room for the parts demands. */
static void cut_and_forget(struct sn_session *session, struct table *table, uint64_t start, uint64_t end)
{
	struct record parts[64];
	long first, n;

	while ((first = pm_first_at(table, start)) < (long)table->nrecords && table->records[first].start < end) {
		uint64_t upto = end;

		if (first + 64 < (long)table->nrecords)
			upto = min_u64(end, table->records[first + 64].start);
		n = pm_cut(table, start, upto, parts, 64);
		if (n < 0)
			break;
		forget(session, parts, n);
		start = upto;
		if (start >= end)
			break;
	}
}

static void apply_remove(struct sn_session *session, uint64_t start, uint64_t end)
{
	struct table *table = pm_table(&session->pm);

	for (long i = pm_first_at(table, start); i < (long)table->nrecords && table->records[i].start < end; i++) {
		const struct record *record = &table->records[i];
		uint64_t from = max_u64(record->start, start), to = min_u64(record->start + record->npages * PAGE, end);

		for (uint64_t at = from; record->first != NO_ENTRIES && at < to; at += PAGE) {
			uint64_t index = record->first + (at - record->start) / PAGE;

			/* A guard outlives MADV_DONTNEED; what is being moved is decided by the aside. */
			if (ENTRY_STATE(session->pm.entries[index]) != ST_GUARD &&
			    !(session->pm.entries[index] & ENTRY_MOVING))
				entry_put(session, index, ST_NONE);
		}
	}
}

static void apply_unmap(struct sn_session *session, struct table *table, uint64_t start, uint64_t end)
{
	struct debt rest[64];
	int n = pm_settle(table, start, end, rest, 64);

	for (int i = 0; i < n; i++)
		if (rest[i].start < rest[i].end)
			cut_and_forget(session, table, rest[i].start, rest[i].end);
}

/* Gives the mapping that holds an address a record to its end. It may have grown without an event that says so; what
 * is not watched by us gets none: an event that never comes would be owed for it. from_start: only a mapping that
 * begins there, for after a REMAP the place may be another's by now. */
void events_cover(struct sn_session *session, struct table *table, uint64_t address, bool from_start)
{
	struct snapd_procmap_query vma = {.size = sizeof(vma), .query_addr = address};

	if (session->maps_fd < 0 || session->pagemap_fd < 0 || sn_watched(session->pagemap_fd, address) != 1)
		return;
	if (ioctl(session->maps_fd, SNAPD_PROCMAP_QUERY, &vma) == 0 &&
	    (from_start ? vma.vma_start == address : vma.vma_start <= address))
		pm_blank(table, vma.vma_start, vma.vma_end);
}

/* The page map says where a piece went, so that a successor knows it too. */
static void note_own_move(struct page_map_header *header, uint64_t from, uint64_t bytes, uint64_t to)
{
	for (int i = 0; i < MAX_INFLIGHT * MAX_SPANS; i++) {
		struct intent *intent = &header->intents[i];

		if (intent->phase == PHASE_MOVE && intent->start == from && intent->npages * PAGE == bytes)
			intent->aside = to;
	}
}

struct batch {
	struct sn_session *session;
	const struct snapd_uffd_msg *messages;
	unsigned int n;
	bool done[RING_SLOTS];
};

static bool overlap(uint64_t a, uint64_t a_end, uint64_t b, uint64_t b_end)
{
	return a < b_end && b < a_end;
}

static bool occupied(const struct table *table, uint64_t start, uint64_t end)
{
	long i = pm_first_at(table, start);

	return i < (long)table->nrecords && table->records[i].start < end;
}

static void apply_one(struct batch *batch, unsigned int i);

/* Memory moves to [start, end): whatever was there before went first, though its event was read later. An UNMAP that is
 * taken for older than it is leaves records of unmapped memory behind: nobody asks for those. */
static void vacate(struct batch *batch, unsigned int i, uint64_t start, uint64_t end)
{
	for (unsigned int k = i + 1; k < batch->n; k++) {
		const struct snapd_uffd_msg *m = &batch->messages[k];

		if (batch->done[k])
			continue;
		if (m->event == SNAPD_UFFD_EVENT_REMAP &&
		    overlap(m->arg.remap.from, m->arg.remap.from + m->arg.remap.len, start, end) &&
		    /* All of what it takes along: its own UNMAP, next in the batch, must not come before it. */
		    occupied(pm_table(&batch->session->pm), m->arg.remap.from,
			     m->arg.remap.from + m->arg.remap.len))
			apply_one(batch, k);
		else if (m->event == SNAPD_UFFD_EVENT_UNMAP && overlap(m->arg.remove.start, m->arg.remove.end,
			start, end))
			apply_one(batch, k);
	}
}

static void apply_remap(struct batch *batch, unsigned int i)
{
	struct sn_session *session = batch->session;
	uint64_t from = batch->messages[i].arg.remap.from, to = batch->messages[i].arg.remap.to;
	uint64_t bytes = batch->messages[i].arg.remap.len;
	struct record *parts = session->moving;
	struct table *table;
	bool unmapped = false;
	long n;

	vacate(batch, i, to, to + bytes);
	for (unsigned int k = i + 1; k < batch->n && !unmapped; k++) {
		const struct snapd_uffd_msg *m = &batch->messages[k];

		unmapped = !batch->done[k] && m->event == SNAPD_UFFD_EVENT_UNMAP && m->arg.remove.start == from &&
			   m->arg.remove.end == from + bytes;
		batch->done[k] |= unmapped; /* the second half of this very mremap */
	}
	table = pm_edit(&session->pm);
	n = pm_cut(table, from, from + bytes, parts, MAX_RECORDS);
	cut_and_forget(session, table, to, to + bytes);
	for (long k = 0; k < n; k++) {
		parts[k].start = parts[k].start - from + to;
		if (pm_insert(table, parts[k]))
			notify(&(struct sn_notice){.kind = SN_NOTICE_TROUBLE, .session = session->id, .cause = ENOSPC});
	}
	if (!unmapped)
		pm_add_debt(table, from, from + bytes);
	events_cover(session, table, to, true);
	pm_commit(&session->pm, pm_applied(&session->pm));
}

static void apply_one(struct batch *batch, unsigned int i)
{
	struct sn_session *session = batch->session;
	const struct snapd_uffd_msg *message = &batch->messages[i];
	struct table *table;
	int error;

	batch->done[i] = true;
	switch (message->event) {
	case SNAPD_UFFD_EVENT_FORK:
		COUNT(session, forks);
		error = session_fork(session, (int)message->arg.fork.ufd);
		if (error)
			notify(&(struct sn_notice){.kind = SN_NOTICE_TROUBLE, .session = session->id, .cause = -error,
						   .value = message->arg.fork.ufd});
		break;
	case SNAPD_UFFD_EVENT_REMOVE:
		COUNT(session, removes);
		apply_remove(session, message->arg.remove.start, message->arg.remove.end);
		break;
	case SNAPD_UFFD_EVENT_REMAP:
		if (session->in_stop) {
			note_own_move(session->pm.header, message->arg.remap.from, message->arg.remap.len,
				      message->arg.remap.to);
			break;
		}
		COUNT(session, remaps);
		apply_remap(batch, i);
		break;
	case SNAPD_UFFD_EVENT_UNMAP:
		if (session->in_stop)
			break;
		COUNT(session, unmaps);
		table = pm_edit(&session->pm);
		apply_unmap(session, table, message->arg.remove.start, message->arg.remove.end);
		pm_commit(&session->pm, pm_applied(&session->pm));
		break;
	default:
		break;
	}
}

/* Events of two threads may be read in the other order than they happened: each queues its own after it has let go of
 * the mmap lock. So they are collected until no call is in flight, and applied in an order that makes sense. */
void events_apply(struct sn_session *session, unsigned int nevents)
{
	struct batch batch = {.session = session, .messages = session->pm.ring, .n = nevents};

	for (unsigned int i = 0; i < nevents; i++)
		if (!batch.done[i])
			apply_one(&batch, i);
	pm_set_applied(&session->pm, nevents);
}
