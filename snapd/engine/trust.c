/* Trust: what must be true of a page map before a daemon believes it that did not have it all the time.
 *
 * It comes from an agent or from whoever kept the descriptors, and may be damaged, or made by somebody. Owns that
 * whatever it has leads nobody outside of the page map, the store, the piece or the program's addresses, and into no
 * endless work. A frame is proven by its check when it is read. Changes nothing. */
#include "internal.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#define ADDRESSES_END 0x7ffffffff000ULL
#define ENTRY_RESERVED (7ULL << 5 | 3ULL << 62)
#define RECORDS_OF_AN_INTENT 4 /* at most so many more, when it is claimed anew */

/* In memory, of small pages, and so long for ever: nobody who has it mapped gets a SIGBUS. */
bool trust_file(int fd)
{
	int seals = fcntl(fd, F_GET_SEALS);
	struct statfs system;
	struct stat status;

	return seals >= 0 && seals & F_SEAL_SHRINK && fstatfs(fd, &system) == 0 && system.f_type == TMPFS_MAGIC &&
	       fstat(fd, &status) == 0 && (uint64_t)status.st_size >= PM_BYTES;
}

static bool is_place(uint64_t start, uint64_t bytes)
{
	return start % PAGE == 0 && bytes % PAGE == 0 && bytes <= ADDRESSES_END && start <= ADDRESSES_END - bytes;
}

static bool is_interval(uint64_t start, uint64_t end)
{
	return start <= end && is_place(start, end - start);
}

static int by_first(const void *a, const void *b)
{
	const struct record *x = a, *y = b;

	return x->first < y->first ? -1 : x->first > y->first;
}

static const char *wrong_record(const struct record *record, uint64_t behind, uint64_t nentries)
{
	if (record->start < behind || !record->npages || record->npages > ADDRESSES_END / PAGE ||
	    !is_place(record->start, record->npages * PAGE))
		return "a record's place";
	if (record->aside && !is_place(record->aside, record->npages * PAGE))
		return "where a record's pages are";
	if (record->first == NO_ENTRIES)
		return record->aside ? "a record without entries" : NULL;
	return record->first > nentries || record->npages > nentries - record->first ? "a record's entries" : NULL;
}

static const char *wrong_entry(uint64_t entry, uint64_t store_bytes)
{
	if (entry & ENTRY_RESERVED || ENTRY_STATE(entry) >= ST_COUNT)
		return "an entry's state";
	if (!entry_has_frame(entry))
		return entry & ENTRY_FRAME_MASK ? "an entry's frame" : NULL;
	if (ENTRY_BYTES(entry) <= FRAME_HEADER || ENTRY_BYTES(entry) > FRAME_MAX || ENTRY_OFFSET(entry) < PAGE ||
	    ENTRY_OFFSET(entry) >= MAX_SEGMENTS << SEGMENT_SHIFT ||
	    ENTRY_OFFSET(entry) + ENTRY_BYTES(entry) > store_bytes)
		return "an entry's frame";
	return NULL;
}

/* What is looked at takes memory, also where nothing was written. */
static bool are_written(const struct page_map *pm, uint64_t nentries)
{
	struct stat status;

	return fstat(pm->fd, &status) == 0 && nentries / 64 <= (uint64_t)status.st_blocks; /* 512 bytes each */
}

static const char *wrong_records(struct page_map *pm, uint64_t store_bytes, struct record *scratch)
{
	const struct table *table = pm_table(pm);
	uint64_t nentries = pm->header->nentries, behind = 0, n = 0, named = 0;

	for (uint64_t i = 0; i < table->nrecords; i++) {
		const struct record *record = &table->records[i];
		const char *what = wrong_record(record, behind, nentries);

		if (what)
			return what;
		behind = record->start + record->npages * PAGE;
		if (record->first != NO_ENTRIES)
			scratch[n++] = *record;
	}
	qsort(scratch, n, sizeof(*scratch), by_first);
	for (uint64_t i = 0; i < n; named += scratch[i++].npages)
		if (i && scratch[i].first < scratch[i - 1].first + scratch[i - 1].npages)
			return "entries of two records";
	if (!are_written(pm, named))
		return "entries that nobody has written";
	for (uint64_t i = 0; i < n; i++)
		for (uint64_t k = 0; k < scratch[i].npages; k++) {
			const char *what = wrong_entry(pm->entries[scratch[i].first + k], store_bytes);

			if (what)
				return what;
		}
	return NULL;
}

/* Its records are claimed anew. What a successor has left to drop may be of no pages. */
static bool is_cut(const struct intent *intent)
{
	return intent->phase == PHASE_MOVE || intent->phase == PHASE_PIN || intent->phase == PHASE_CUT;
}

static const char *wrong_pieces(const struct page_map_header *header, uint64_t nrecords)
{
	uint64_t claims = 0;

	for (int slot = 0; slot < MAX_INFLIGHT; slot++) {
		const struct snapd_run *staging = &header->stagings[slot];
		uint64_t npages = 0;

		if (staging->length > SLOT_BYTES || !is_place(staging->start, staging->length))
			return "where a piece's staging is";
		for (int i = 0; i < MAX_SPANS; i++) {
			const struct intent *intent = &header->intents[slot * MAX_SPANS + i];
			uint64_t bytes = intent->npages * PAGE;

			if (intent->phase > PHASE_CUT || (is_cut(intent) && !intent->npages) ||
			    intent->npages > SLOT_BYTES / PAGE ||
			    !is_place(intent->start, bytes) || !is_place(intent->aside, bytes) ||
			    !is_place(intent->staging, bytes))
				return "what was on its way";
			npages += intent->npages;
			claims += is_cut(intent);
		}
		if (npages > SLOT_BYTES / PAGE)
			return "how much was on its way";
	}
	if (claims && nrecords > MAX_RECORDS - RECORDS_OF_AN_INTENT * claims)
		return "the length of its range table";
	return NULL;
}

static bool is_event(const struct snapd_uffd_msg *message)
{
	switch (message->event) {
	case 0:
	case SNAPD_UFFD_EVENT_PAGEFAULT:
	case SNAPD_UFFD_EVENT_FORK: return true;
	case SNAPD_UFFD_EVENT_REMOVE:
	case SNAPD_UFFD_EVENT_UNMAP: return is_interval(message->arg.remove.start, message->arg.remove.end);
	case SNAPD_UFFD_EVENT_REMAP:
		return message->arg.remap.len && is_place(message->arg.remap.from, message->arg.remap.len) &&
		       message->arg.remap.len <= ADDRESSES_END &&
		       is_place(message->arg.remap.to, message->arg.remap.len + message->reserved3 * PAGE);
	default: return false;
	}
}

static const char *wrong_events(struct page_map *pm)
{
	const struct table *table = pm_table(pm);

	for (unsigned int i = 0; i < RING_SLOTS; i++)
		if (!is_event(&pm_ring(pm)[i]))
			return "an event that was read";
	for (uint64_t i = 0; i < table->ndebts; i++)
		if (!is_interval(table->debts[i].start, table->debts[i].end))
			return "an event that is to come";
	return is_interval(table->dropping.start, table->dropping.end) ? NULL : "what was being dropped";
}

const char *trust_wrong(struct page_map *pm, uint64_t store_bytes, struct record *scratch)
{
	const struct page_map_header *header = pm->header;
	const struct table *table = pm_table(pm);
	const char *what;

	if (header->nentries > MAX_ENTRIES)
		return "how many entries it has";
	if (table->nrecords > MAX_RECORDS || table->ndebts > MAX_DEBTS)
		return "the length of its range table";
	if (!is_place(header->sentinel, PAGE) || header->attached.length > SLOT_BYTES ||
	    !is_place(header->attached.start, header->attached.length))
		return "what is ours in its program";
	what = wrong_records(pm, store_bytes, scratch);
	if (!what)
		what = wrong_pieces(header, table->nrecords);
	return what ? what : wrong_events(pm);
}
