/* Kept pages: what one dump saw of each page, for a snapshot, and the copying of their frames into its file.
 *
 * Owns references to the frames, so that no segment they are in is given back before they are copied. Knows neither the
 * snapshot's name nor its footer. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define BASE_PAGES 8192
#define READ_BYTES (256UL << 10)

struct part { /* pages in a row that are all held, or all not */
	uint64_t start, npages, first;
	int reason; /* enum sn_unheld */
};
struct sn_keep {
	struct sn_session *session;
	struct part *parts;
	uint64_t nparts, parts_room;
	uint64_t *entries;
	uint64_t nentries, entries_room;
};

/* realloc that doubles: room is in items and at least wanted afterwards. */
static int grow(void **array, uint64_t *room, uint64_t wanted, size_t item)
{
	uint64_t next = *room ? *room : 1024;
	void *grown;

	if (wanted <= *room)
		return 0;
	while (next < wanted)
		next *= 2;
	grown = realloc(*array, next * item);
	if (!grown)
		return -ENOMEM;
	*array = grown;
	*room = next;
	return 0;
}

static int reason_of(uint64_t kept)
{
	switch (kept) {
	case KEPT_PINNED: return SN_UNHELD_PINNED;
	case KEPT_ASIDE: return SN_UNHELD_ASIDE;
	default: return SN_HELD;
	}
}

/* Takes over the references of entries; on an error the caller still has them all. */
static int add(struct sn_keep *keep, uint64_t start, const uint64_t *entries, uint64_t n)
{
	int error = grow((void **)&keep->entries, &keep->entries_room, keep->nentries + n, sizeof(*entries));

	for (uint64_t k = 0, run; k < n && !error; k += run) {
		int reason = reason_of(entries[k]);

		for (run = 1; k + run < n && (entries[k + run] == KEPT_LEFT) == (entries[k] == KEPT_LEFT) &&
			      reason_of(entries[k + run]) == reason;)
			run++;
		if (entries[k] == KEPT_LEFT)
			continue;
		error = grow((void **)&keep->parts, &keep->parts_room, keep->nparts + 1, sizeof(*keep->parts));
		if (!error)
			keep->parts[keep->nparts++] =
				(struct part){start + k * PAGE, run, keep->nentries + k, reason};
	}
	if (error)
		return error;
	memcpy(keep->entries + keep->nentries, entries, n * sizeof(*entries));
	keep->nentries += n;
	return 0;
}

/* What is out before the dump began is as it was then. The entry's own reference keeps the segment until ours does. */
static uint64_t out_before(struct sn_session *session, uint64_t index)
{
	for (;;) {
		uint64_t e = session->pm.entries[index];

		switch (ENTRY_STATE(e)) {
		case ST_STORED:
			store_hold_entry(session->store, e);
			if (session->pm.entries[index] == e)
				return e;
			store_unhold_entry(session->store, e);
			continue;
		case ST_ASIDE: return KEPT_ASIDE;
		case ST_BAD: return ST_BAD;
		case ST_ZERO: return ST_ZERO; /* unless it is present, which is for look_at_zeros */
		default: return KEPT_LEFT; /* present, or nothing is known to be there */
		}
	}
}

/* A zero page that the program has touched is present, with whatever it wrote since: the pieces will say. Nobody fills
 * what is known to be zeros by another way, so what is missing after its entry was read was zeros then. */
static int look_at_zeros(struct sn_session *session, uint64_t start, uint64_t *entries, uint64_t n,
			 struct snapd_page_region *regions)
{
	const uint64_t there = SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED | SNAPD_PAGE_IS_GUARD;
	int fd = atomic_load(&session->pagemap_fd);
	long found = fd < 0 ? -EBADF
			    : pagemap_scan(fd, start, start + n * PAGE, there, SNAPD_PAGE_IS_PRESENT, 0, regions,
					   n + 1, NULL);

	for (uint64_t k = 0; found < 0 && k < n; k++)
		if (entries[k] == ST_ZERO)
			entries[k] = KEPT_LEFT;
	for (long i = 0; i < found; i++)
		for (uint64_t at = regions[i].start; at < regions[i].end; at += PAGE)
			if (entries[(at - start) / PAGE] == ST_ZERO)
				entries[(at - start) / PAGE] = KEPT_LEFT;
	return found == -ENOMEM ? -ENOMEM : 0;
}

static void let_go(struct sn_store *store, const uint64_t *entries, uint64_t n)
{
	for (uint64_t k = 0; k < n; k++)
		if (reason_of(entries[k]) == SN_HELD && entries[k] != KEPT_LEFT)
			store_unhold_entry(store, entries[k]);
}

static int take_what_is_out(struct sn_keep *keep)
{
	struct sn_session *session = keep->session;
	uint64_t *room = malloc(BASE_PAGES * sizeof(*room)), at = 0, n;
	struct snapd_page_region *regions = malloc((BASE_PAGES + 1) * sizeof(*regions));
	int error = room && regions ? 0 : -ENOMEM;

	do {
		const struct table *table;

		n = 0;
		pthread_rwlock_rdlock(&session->lock);
		table = pm_table(&session->pm);
		for (long i = pm_first_at(table, at); !error && !n && i < (long)table->nrecords; i++) {
			const struct record *record = &table->records[i];

			if (record->first == NO_ENTRIES)
				continue;
			at = max_u64(record->start, at);
			n = min_u64(BASE_PAGES, record->npages - (at - record->start) / PAGE);
			for (uint64_t k = 0; k < n; k++)
				room[k] = out_before(session, record->first + (at - record->start) / PAGE + k);
			error = look_at_zeros(session, at, room, n, regions);
		}
		pthread_rwlock_unlock(&session->lock);
		if (n && !error)
			error = add(keep, at, room, n);
		if (error)
			let_go(session->store, room, n);
		at += n * PAGE;
	} while (n && !error);
	free(regions);
	free(room);
	return error;
}

struct sn_keep *sn_keep_create(struct sn_session *session)
{
	struct sn_keep *keep = calloc(1, sizeof(*keep));

	if (!keep)
		return NULL;
	keep->session = session;
	if (take_what_is_out(keep)) {
		sn_keep_free(keep);
		return NULL;
	}
	return keep;
}

void sn_keep_free(struct sn_keep *keep)
{
	let_go(keep->session->store, keep->entries, keep->nentries);
	free(keep->entries);
	free(keep->parts);
	free(keep);
}

int sn_piece_keep(struct sn_piece *piece)
{
	piece->kept = malloc(piece->npages * sizeof(*piece->kept));
	for (uint64_t page = 0; piece->kept && page < piece->npages; page++)
		piece->kept[page] = KEPT_LEFT;
	return piece->kept ? 0 : -ENOMEM;
}

void piece_forget_kept(struct sn_piece *piece)
{
	if (piece->kept)
		let_go(piece->session->store, piece->kept, piece->npages);
	free(piece->kept);
	piece->kept = NULL;
}

/* Inside the stop: what is known now. A dirty page gets its frame from packing. */
void piece_note_kept(struct sn_piece *piece, uint64_t page, uint64_t entry)
{
	uint64_t kept = entry;

	switch ((enum decision)piece->decisions[page]) {
	case PINNED: kept = KEPT_PINNED; break;
	case DIRTY: kept = KEPT_LEFT; break;
	case LEFT_ASIDE: kept = KEPT_ASIDE; break;
	default:
		if (ENTRY_STATE(entry) == ST_ASIDE)
			kept = KEPT_ASIDE;
		store_hold_entry(piece->session->store, entry);
	}
	piece->kept[page] = kept;
}

int sn_keep_take(struct sn_keep *keep, struct sn_piece *piece)
{
	int error = 0;

	for (int i = 0; i < piece->nspans && !error; i++) {
		const struct span *span = &piece->spans[i];
		uint64_t *kept = piece->kept + span->base;

		if (span->outcome != SN_MOVED)
			continue;
		error = add(keep, span->start, kept, span->npages);
		for (uint64_t k = 0; k < span->npages && !error; k++)
			kept[k] = KEPT_LEFT; /* the reference is the keep's now */
	}
	piece_forget_kept(piece);
	return error;
}

uint64_t sn_keep_parts(struct sn_keep *keep, struct sn_part *ret, uint64_t capacity)
{
	for (uint64_t i = 0; i < min_u64(keep->nparts, capacity); i++)
		ret[i] = (struct sn_part){keep->parts[i].start, keep->parts[i].npages, keep->parts[i].reason};
	return keep->nparts;
}

/* ---- copying ---- */

struct sn_copy {
	const struct sn_keep *keep;
	struct sn_store to; /* fd and id only */
	uint64_t offset;    /* where the next frame may begin */
	uint64_t from;	    /* where what is not written yet begins */
	unsigned char *segment, *source;
	uint64_t source_start, source_bytes;
};

struct sn_copy *sn_copy_create(struct sn_keep *keep, int fd, const unsigned char *id, uint64_t offset)
{
	struct sn_copy *copy = calloc(1, sizeof(*copy));

	if (!copy)
		return NULL;
	copy->segment = mmap(NULL, SEGMENT_BYTES + READ_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
			     0);
	if (copy->segment == MAP_FAILED) {
		free(copy);
		return NULL;
	}
	copy->source = copy->segment + SEGMENT_BYTES;
	copy->keep = keep;
	copy->to.fd = fd;
	store_name(&copy->to, id);
	copy->offset = copy->from = offset;
	return copy;
}

void sn_copy_free(struct sn_copy *copy)
{
	munmap(copy->segment, SEGMENT_BYTES + READ_BYTES);
	free(copy);
}

static int flush(struct sn_copy *copy)
{
	int error = FAULT_ERROR(FP_COPY_WRITE);

	if (error)
		return error;
	if (copy->offset > copy->from)
		error = store_write(&copy->to, copy->segment + copy->from % SEGMENT_BYTES, copy->offset - copy->from,
				    copy->from);
	copy->from = copy->offset;
	return error;
}

/* The frame of an entry, or NULL when it cannot be read. Frames mostly follow each other: reads go ahead. */
static const unsigned char *source_frame(struct sn_copy *copy, uint64_t entry)
{
	uint64_t offset = ENTRY_OFFSET(entry), bytes = ENTRY_BYTES(entry);

	if (offset < copy->source_start || offset + bytes > copy->source_start + copy->source_bytes) {
		ssize_t n = pread(copy->keep->session->store->fd, copy->source, READ_BYTES, (off_t)offset);

		if (n < (ssize_t)bytes) /* a bad block further on is not this frame's */
			n = pread(copy->keep->session->store->fd, copy->source, bytes, (off_t)offset);
		copy->source_start = offset;
		copy->source_bytes = n < 0 ? 0 : (uint64_t)n;
		if (copy->source_bytes < bytes)
			return NULL;
	}
	return copy->source + (offset - copy->source_start);
}

static int copy_frame(struct sn_copy *copy, uint64_t entry, uint64_t *ret)
{
	const unsigned char *frame = source_frame(copy, entry);
	uint64_t bytes = ENTRY_BYTES(entry);
	unsigned char *room;
	int error;

	*ret = ST_BAD; /* what is not right is not sealed anew */
	if (!frame || !frame_is_whole(copy->keep->session->store, ENTRY_OFFSET(entry), frame, bytes))
		return 0;
	if (copy->offset % SEGMENT_BYTES + bytes > SEGMENT_BYTES) {
		error = flush(copy);
		if (error)
			return error;
		copy->offset = copy->from = (copy->offset + SEGMENT_BYTES - 1) & ~(SEGMENT_BYTES - 1);
	}
	room = copy->segment + copy->offset % SEGMENT_BYTES;
	memcpy(room, frame, bytes);
	frame_seal(&copy->to, copy->offset, room);
	*ret = ENTRY_MAKE(ST_STORED, copy->offset, bytes);
	copy->offset += bytes;
	return copy->offset % SEGMENT_BYTES ? 0 : flush(copy);
}

int sn_copy_part(struct sn_copy *copy, uint64_t part, uint64_t skip, uint64_t npages, uint64_t *ret_entries)
{
	const struct part *from = &copy->keep->parts[part];
	int error = 0;

	if (part >= copy->keep->nparts || skip + npages > from->npages || from->reason != SN_HELD)
		return -EINVAL;
	for (uint64_t k = 0; k < npages && !error; k++) {
		uint64_t entry = copy->keep->entries[from->first + skip + k];

		if (entry_has_frame(entry))
			error = copy_frame(copy, entry, &ret_entries[k]);
		else
			ret_entries[k] = ENTRY_STATE(entry);
	}
	return error;
}

int sn_copy_finish(struct sn_copy *copy, uint64_t *ret_end)
{
	*ret_end = copy->offset;
	return flush(copy);
}
