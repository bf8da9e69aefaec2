/* Compaction: what is left of segments that are mostly dead is moved to the end of the store, so that they can be given
 * back whole.
 *
 * Runs beside everything else. A page's entry changes to its frame's new place under the session's lock, and only if it
 * still names the old one: a fill that read the old place meanwhile looks again, as after any change. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#define MAX_VICTIMS 32 /* segments a call: what is read and written in one go is half of that */
#define SCAN_PAGES 65536

struct ref { /* an entry that names a frame in a victim; the frame is held */
	uint64_t entry, index;
	struct sn_session *session;
};
struct work {
	struct sn_store *store;
	uint64_t victims[MAX_VICTIMS];
	int nvictims;
	struct ref *refs;
	uint64_t nrefs, room;
	unsigned char *frames;
	uint64_t moved_bytes;
};

static void choose(struct work *work)
{
	struct sn_store *store = work->store;
	uint64_t end = atomic_load(&store->end), open = atomic_load(&store->tail) >> SEGMENT_SHIFT;

	for (uint64_t i = 0; i < end && work->nvictims < MAX_VICTIMS; i++) {
		uint64_t live = atomic_load_explicit(&store->live[i], memory_order_relaxed);

		if (i != open && live && 2 * live < store->written[i])
			work->victims[work->nvictims++] = i;
	}
}

static bool is_victim(const struct work *work, uint64_t entry)
{
	uint64_t segment = ENTRY_OFFSET(entry) >> SEGMENT_SHIFT;
	int low = 0, high = work->nvictims;

	if (!entry_has_frame(entry) || entry & ENTRY_MOVING)
		return false;
	while (low < high) {
		int middle = (low + high) / 2;

		if (work->victims[middle] < segment)
			low = middle + 1;
		else
			high = middle;
	}
	return low < work->nvictims && work->victims[low] == segment;
}

static int add_ref(struct work *work, struct sn_session *session, uint64_t index, uint64_t entry)
{
	if (work->nrefs == work->room) {
		uint64_t room = work->room ? 2 * work->room : 4096;
		struct ref *refs = realloc(work->refs, room * sizeof(*refs));

		if (!refs)
			return -ENOMEM;
		work->refs = refs;
		work->room = room;
	}
	work->refs[work->nrefs++] = (struct ref){entry, index, session};
	store_hold_entry(work->store, entry);
	return 0;
}

/* For a while at a time, so that events need not wait long. The lock is held exclusively so that no entry loses its
 * frame between the look and the hold. */
static int collect(struct work *work, struct sn_session *session)
{
	uint64_t at = 0, n;
	int error = 0;

	do {
		const struct table *table;

		n = 0;
		pthread_rwlock_wrlock(&session->lock);
		table = pm_table(&session->pm);
		for (long i = pm_first_at(table, at); !n && i < (long)table->nrecords; i++) {
			const struct record *record = &table->records[i];

			if (record->first == NO_ENTRIES)
				continue;
			at = max_u64(record->start, at);
			n = min_u64(SCAN_PAGES, record->npages - (at - record->start) / PAGE);
			for (uint64_t k = 0; k < n && !error; k++) {
				uint64_t index = record->first + (at - record->start) / PAGE + k;

				if (is_victim(work, session->pm.entries[index]))
					error = add_ref(work, session, index, session->pm.entries[index]);
			}
		}
		pthread_rwlock_unlock(&session->lock);
		at += n * PAGE;
	} while (n && !error);
	return error;
}

static int by_frame(const void *a, const void *b)
{
	uint64_t x = ENTRY_OFFSET(((const struct ref *)a)->entry), y = ENTRY_OFFSET(((const struct ref *)b)->entry);

	return x < y ? -1 : x > y;
}

/* What is not as it was any more keeps its newer state. */
static void publish(struct work *work, const struct ref *ref, uint64_t offset)
{
	uint64_t old = ref->entry, new = ENTRY_MAKE(ENTRY_STATE(old), offset, ENTRY_BYTES(old));

	store_hold_entry(work->store, new);
	if (atomic_compare_exchange_strong(&ref->session->pm.entries[ref->index], &old, new))
		store_unhold_entry(work->store, ref->entry);
	else
		store_unhold_entry(work->store, new);
}

/* The frames of refs first to last-1 are in the buffer, each once: writes them and lets the entries name them. */
static int move_batch(struct work *work, uint64_t first, uint64_t last, uint64_t used)
{
	uint64_t offset, at = 0;
	int error;

	if (!used)
		return 0;
	/* More is given back than this takes, so the floor is no reason to stop here. */
	error = store_reserve(work->store, used, false, &offset);
	if (error)
		return error;
	for (uint64_t i = first; i < last; i++)
		if (i == first || work->refs[i].entry >> 18 != work->refs[i - 1].entry >> 18) {
			frame_seal(work->store, offset + at, work->frames + at);
			at += ENTRY_BYTES(work->refs[i].entry);
		}
	error = store_write(work->store, work->frames, used, offset);
	FAULT_POINT(FP_COMPACT_WRITTEN);
	at = 0;
	for (uint64_t i = first; i < last && !error; i++) {
		struct sn_session *session = work->refs[i].session;

		if (i > first && work->refs[i].entry >> 18 != work->refs[i - 1].entry >> 18)
			at += ENTRY_BYTES(work->refs[i - 1].entry);
		pthread_rwlock_wrlock(&session->lock);
		FAULT_POINT(FP_COMPACT_PUBLISHING);
		publish(work, &work->refs[i], offset + at);
		pthread_rwlock_unlock(&session->lock);
	}
	store_unhold(work->store, offset, used);
	if (!error)
		work->moved_bytes += used;
	return error;
}

/* Whether the frame is good: one that is not stays where it is, for whoever touches it to be told. */
static bool read_frame(struct work *work, uint64_t entry, unsigned char *room)
{
	uint64_t offset = ENTRY_OFFSET(entry), bytes = ENTRY_BYTES(entry);

	return bytes <= FRAME_MAX && pread(work->store->fd, room, bytes, (off_t)offset) == (ssize_t)bytes &&
	       frame_is_whole(work->store, offset, room, bytes);
}

static int move_all(struct work *work)
{
	uint64_t first = 0, used = 0, i = 0;
	int error = 0;

	qsort(work->refs, work->nrefs, sizeof(*work->refs), by_frame);
	while (i < work->nrefs && !error) {
		uint64_t entry = work->refs[i].entry, next = i + 1;

		while (next < work->nrefs && work->refs[next].entry >> 18 == entry >> 18)
			next++; /* others that share the frame */
		if (used + ENTRY_BYTES(entry) > SEGMENT_BYTES / 4) {
			error = move_batch(work, first, i, used);
			first = i;
			used = 0;
		}
		if (!error && read_frame(work, entry, work->frames + used)) {
			used += ENTRY_BYTES(entry);
		} else if (!error) {
			error = move_batch(work, first, i, used);
			first = next;
			used = 0;
		}
		i = next;
	}
	return error ? error : move_batch(work, first, i, used);
}

int sn_store_compact(struct sn_store *store, struct sn_session **sessions, int nsessions, uint64_t *ret_bytes)
{
	struct work work = {.store = store};
	int error = 0;

	*ret_bytes = 0;
	if (atomic_load(&store->distrusted)) /* what is on such a disk is safer where it is */
		return 0;
	choose(&work);
	if (!work.nvictims)
		return 0;
	work.frames = malloc(SEGMENT_BYTES / 4 + FRAME_MAX);
	if (!work.frames)
		return -ENOMEM;
	for (int i = 0; i < nsessions && !error; i++)
		error = collect(&work, sessions[i]);
	if (!error)
		error = move_all(&work);
	for (uint64_t i = 0; i < work.nrefs; i++)
		store_unhold_entry(store, work.refs[i].entry);
	*ret_bytes = work.moved_bytes;
	free(work.refs);
	free(work.frames);
	return error;
}
