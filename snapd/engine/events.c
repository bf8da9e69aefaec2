/* Events of the target's own doing: fork, remap, remove, unmap, in the order in which they happened.
 *
 * Called by the reader with the session's lock held exclusively from before the first read until events_end. Each
 * thread queues its event after it has let go of the mmap lock, so one may be read before one that happened earlier.
 * It shows where memory moves to a place that is not vacant: then everything waits for the one that vacates it. Owns
 * that order; knows no fills.
 */
#include "internal.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define FORK_TRIES 10000
#define FORK_PAUSE_US 1000

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

static struct table *current(const struct events *events)
{
	return events->table ? events->table : pm_table(&events->session->pm);
}

/* All changes of one drain are made in one copy of the table and become current together. */
static struct table *editable(struct events *events)
{
	if (!events->table)
		events->table = pm_edit(&events->session->pm);
	return events->table;
}

static void apply_remove(struct events *events, uint64_t start, uint64_t end)
{
	struct sn_session *session = events->session;
	const struct table *table = current(events);

	for (long i = pm_first_at(table, start); i < (long)table->nrecords && table->records[i].start < end; i++) {
		const struct record *record = &table->records[i];
		uint64_t from = max_u64(record->start, start), to = min_u64(record->start + record->npages * PAGE, end);

		for (uint64_t at = from; record->first != NO_ENTRIES && at < to; at += PAGE) {
			uint64_t index = record->first + (at - record->start) / PAGE;

			/* A guard outlives MADV_DONTNEED; what is being moved is decided by the aside. */
			if (ENTRY_STATE(session->pm.entries[index]) != ST_GUARD &&
			    (session->cut || !(session->pm.entries[index] & ENTRY_MOVING)))
				entry_put(session, index, ST_NONE);
		}
	}
}

static void apply_unmap(struct events *events, uint64_t start, uint64_t end)
{
	struct sn_session *session = events->session;
	struct table *table = editable(events);

	/* The mover's own: there were no records where it unmaps, but others' memory may be there by now. */
	if (table->dropping.start == start && table->dropping.end == end)
		table->dropping = (struct interval){0, 0};
	else if (!pm_settle(table, start, end))
		cut_and_forget(session, table, start, end);
}

/* Gives the whole mapping at an address a record: it may have grown in place without an event that says so. What is not
 * watched by us gets none. */
void events_cover(struct sn_session *session, struct table *table, uint64_t address)
{
	struct snapd_procmap_query vma = {.size = sizeof(vma), .query_addr = address};

	if (session->maps_fd < 0 || session->pagemap_fd < 0 || sn_watched(session->pagemap_fd, address) != 1)
		return;
	if (ioctl(session->maps_fd, SNAPD_PROCMAP_QUERY, &vma) == 0 && vma.vma_start <= address)
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

/* What a move adds at the end is in no event, but watched. It is noted in fields of the message that the kernel leaves
 * alone, while the caller is still in its call: that cannot end before the UNMAP of the old place is read. Who finds
 * the message in a dead daemon's ring does not ask again: somebody else's call may be the one of that place by then. */
static void note_growth(struct sn_session *session, struct snapd_uffd_msg *message)
{
	struct snapd_procmap_query vma = {.size = sizeof(vma), .query_addr = message->arg.remap.to};
	uint64_t end = message->arg.remap.to + message->arg.remap.len, bytes;

	if (session->maps_fd < 0 || ioctl(session->maps_fd, SNAPD_PROCMAP_QUERY, &vma) || vma.vma_end <= end)
		return; /* it has not grown */
	bytes = callers_length(atomic_load(&session->pid), message->arg.remap.from, (void *)session->moving);
	if (bytes > message->arg.remap.len)
		message->reserved3 = (__u32)((bytes - message->arg.remap.len) / PAGE);
}

static uint64_t remap_end(const struct snapd_uffd_msg *message)
{
	return message->arg.remap.to + message->arg.remap.len + message->reserved3 * PAGE;
}

static void apply_remap(struct events *events, const struct snapd_uffd_msg *message)
{
	uint64_t from = message->arg.remap.from, to = message->arg.remap.to, bytes = message->arg.remap.len;
	struct sn_session *session = events->session;
	struct table *table = editable(events);
	struct record *parts = session->moving;
	long n = pm_cut(table, from, from + bytes, parts, MAX_RECORDS);

	/* There is nothing, but where nobody was found who vacates it. */
	cut_and_forget(session, table, to, remap_end(message));
	for (long k = 0; k < n; k++) {
		parts[k].start = parts[k].start - from + to;
		if (pm_insert(table, parts[k]))
			notify(&(struct sn_notice){.kind = SN_NOTICE_TROUBLE, .session = session->id, .cause = ENOSPC});
	}
	pm_blank(table, to + bytes, remap_end(message));
	/* The call's own UNMAP comes next; by then another's memory may be there. */
	pm_add_debt(table, from, from + bytes);
}

/* Without a session nobody answers the child. Descriptors and memory come back when others end, and until then the
 * parent waits in its fork: it makes no more children than can be served. */
static void apply_fork(struct events *events, int uffd)
{
	struct sn_session *session = events->session;
	int error = session_fork(session, current(events), uffd);

	for (int tries = 0; tries < FORK_TRIES && (error == -EMFILE || error == -ENFILE || error == -ENOMEM); tries++) {
		usleep(FORK_PAUSE_US);
		error = session_fork(session, current(events), uffd);
	}
	if (error)
		notify(&(struct sn_notice){.kind = SN_NOTICE_TROUBLE, .session = session->id, .cause = -error,
					   .value = (uint64_t)uffd});
}

static void apply(struct events *events, const struct snapd_uffd_msg *message)
{
	struct sn_session *session = events->session;

	switch (message->event) {
	case SNAPD_UFFD_EVENT_FORK:
		COUNT(session, forks);
		FAULT_POINT(FP_FORK_READ);
		apply_fork(events, (int)message->arg.fork.ufd);
		FAULT_POINT(FP_FORK_SERVED);
		break;
	case SNAPD_UFFD_EVENT_REMOVE:
		COUNT(session, removes);
		apply_remove(events, message->arg.remove.start, message->arg.remove.end);
		break;
	case SNAPD_UFFD_EVENT_REMAP:
		if (session->in_stop) {
			FAULT_POINT(FP_OWN_MOVE_READ);
			note_own_move(session->pm.header, message->arg.remap.from, message->arg.remap.len,
				      message->arg.remap.to);
			FAULT_POINT(FP_OWN_MOVE_NOTED);
			break;
		}
		if (session->cut && recover_moved(session, editable(events), message->arg.remap.from,
						  message->arg.remap.to, message->arg.remap.len))
			break;
		COUNT(session, remaps);
		apply_remap(events, message);
		break;
	case SNAPD_UFFD_EVENT_UNMAP:
		if (session->in_stop)
			break;
		COUNT(session, unmaps);
		apply_unmap(events, message->arg.remove.start, message->arg.remove.end);
		break;
	default:
		break;
	}
}

static const struct snapd_uffd_msg *waiting(const struct events *events, unsigned int i)
{
	return &pm_ring(&events->session->pm)[events->waiting[i]];
}

/* The part of a REMAP's destination that is still taken. */
static struct interval taken(const struct events *events, const struct snapd_uffd_msg *message)
{
	const struct table *table = current(events);
	uint64_t start = message->arg.remap.to, end = remap_end(message);
	struct interval ret = {0, 0};

	if (message->event != SNAPD_UFFD_EVENT_REMAP || events->session->in_stop)
		return ret;
	for (long i = pm_first_at(table, start); i < (long)table->nrecords && table->records[i].start < end; i++) {
		const struct record *record = &table->records[i];

		if (!ret.end)
			ret.start = max_u64(record->start, start);
		ret.end = min_u64(record->start + record->npages * PAGE, end);
	}
	return ret;
}

static bool vacates(const struct snapd_uffd_msg *message, struct interval place)
{
	uint64_t start, end;

	if (message->event == SNAPD_UFFD_EVENT_REMAP) {
		start = message->arg.remap.from;
		end = start + message->arg.remap.len;
	} else if (message->event == SNAPD_UFFD_EVENT_UNMAP) {
		start = message->arg.remove.start;
		end = message->arg.remove.end;
	} else {
		return false;
	}
	return start < place.end && place.start < end;
}

static void take_first(struct events *events)
{
	const struct snapd_uffd_msg *message = waiting(events, 0);

	events->nwaiting--;
	memmove(events->waiting, events->waiting + 1, events->nwaiting * sizeof(events->waiting[0]));
	apply(events, message);
}

/* Applies what can be; the first that needs a vacant place pulls the one that vacates it forward. */
static void settle(struct events *events)
{
	unsigned int pulled = 0;

	while (events->nwaiting) {
		struct interval need = taken(events, waiting(events, 0));
		unsigned int k = 1;
		uint16_t slot;

		if (!need.end) {
			take_first(events);
			pulled = 0;
			continue;
		}
		while (k < events->nwaiting && !vacates(waiting(events, k), need))
			k++;
		if (k == events->nwaiting || pulled++ == events->nwaiting)
			break;
		slot = events->waiting[k];
		memmove(events->waiting + 1, events->waiting, k * sizeof(events->waiting[0]));
		events->waiting[0] = slot;
	}
}

void events_begin(struct events *events, struct sn_session *session)
{
	events->session = session;
	events->table = NULL;
	events->n = events->nwaiting = 0;
}

void events_take(struct events *events)
{
	struct snapd_uffd_msg *message = &pm_ring(&events->session->pm)[events->n];

	if (message->event == SNAPD_UFFD_EVENT_REMAP && !message->reserved1 && !events->session->in_stop) {
		note_growth(events->session, message);
		message->reserved1 = true;
	}
	events->waiting[events->nwaiting++] = (uint16_t)events->n++;
	settle(events);
}

struct interval events_need(const struct events *events)
{
	return events->nwaiting ? taken(events, waiting(events, 0)) : (struct interval){0, 0};
}

void events_force(struct events *events)
{
	take_first(events);
	settle(events);
}

/* What was applied becomes current and leaves the ring in one step; what waits is in the other half of it by then. */
static void commit(struct events *events)
{
	struct page_map *pm = &events->session->pm;
	struct snapd_uffd_msg *old = pm_ring(pm), *new = pm_other_ring(pm);

	for (unsigned int i = 0; i < events->nwaiting; i++)
		new[i] = old[events->waiting[i]];
	if (events->table)
		pm_commit(pm);
	FAULT_POINT(FP_EVENT_APPLIED);
	/* Without a change of the table only REMOVEs were applied, and those may be applied again. */
	memset(old, 0, min_u64(events->n + 1, RING_SLOTS) * sizeof(old[0]));
	events->table = NULL;
}

void events_compact(struct events *events)
{
	editable(events);
	commit(events);
	for (unsigned int i = 0; i < events->nwaiting; i++)
		events->waiting[i] = (uint16_t)i;
	events->n = events->nwaiting;
}

void events_end(struct events *events, bool quiet)
{
	if (quiet && current(events)->ndebts) {
		struct table *table = editable(events);

		/* No call is in flight: what is owed was the program's own DONTUNMAP; the place is watched. */
		for (uint64_t i = 0; i < table->ndebts; i++)
			if (sn_watched(events->session->pagemap_fd, table->debts[i].start) == 1)
				pm_blank(table, table->debts[i].start, table->debts[i].end);
		table->ndebts = 0;
	}
	if (events->n || events->table)
		commit(events);
}
