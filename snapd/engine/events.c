/* Events of the target's own doing: fork, remap, remove, unmap, applied to the page map.
 *
 * Called by the reader with the session's lock held exclusively since before the event was read. Each event's change of
 * the range table and the count of applied events become current in one store, so that a successor applies none twice.
 */
#include "internal.h"

#include <errno.h>

static void forget(struct sn_session *session, const struct record *records, long n)
{
	for (long i = 0; i < n; i++)
		for (uint64_t k = 0; k < records[i].npages; k++)
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

		for (uint64_t at = from; at < to; at += PAGE) {
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

/* A REMAP onto live addresses means that their UNMAP is still to come: it must find the old entries, not these. And the
 * UNMAP of the old place comes after the REMAP, maybe after somebody else's REMAP onto that place. */
static void apply_remap(struct sn_session *session, struct table *table, uint64_t from, uint64_t to, uint64_t bytes)
{
	struct record *parts = session->scratch;
	long n;

	if (pm_first_at(table, to) < (long)table->nrecords &&
	    table->records[pm_first_at(table, to)].start < to + bytes) {
		cut_and_forget(session, table, to, to + bytes);
		pm_add_debt(table, to, to + bytes);
	}
	n = pm_cut(table, from, from + bytes, parts, MAX_RECORDS);
	for (long i = 0; i < n; i++) {
		parts[i].start = parts[i].start - from + to;
		if (pm_insert(table, parts[i]))
			notify(&(struct sn_notice){.kind = SN_NOTICE_TROUBLE, .session = session->id, .cause = -ENOSPC});
	}
	pm_add_debt(table, from, from + bytes);
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

void events_apply(struct sn_session *session, const struct snapd_uffd_msg *message, unsigned int applied)
{
	struct page_map *pm = &session->pm;
	struct table *table;
	int error;

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
			note_own_move(pm->header, message->arg.remap.from, message->arg.remap.len, message->arg.remap.to);
			break;
		}
		COUNT(session, remaps);
		table = pm_edit(pm);
		apply_remap(session, table, message->arg.remap.from, message->arg.remap.to, message->arg.remap.len);
		pm_commit(pm, applied);
		return;
	case SNAPD_UFFD_EVENT_UNMAP:
		if (session->in_stop)
			break;
		COUNT(session, unmaps);
		table = pm_edit(pm);
		apply_unmap(session, table, message->arg.remove.start, message->arg.remove.end);
		pm_commit(pm, applied);
		return;
	default:
		break;
	}
	pm_set_applied(pm, applied);
}
