/* Adoption: a session of a daemon that is dead goes on here, by its page map, its userfaultfd and its store.
 *
 * Owns what must be true of a page map before it is believed, and what is made of it before the reader starts. A piece
 * that was on its way is recover.c's. Knows nothing of where the descriptors came from. */
#include "internal.h"
#include "keeper.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ADDRESSES_END 0x7ffffffff000ULL
#define KCMP_FILE 0
#define ENTRY_RESERVED (7ULL << 5 | 3ULL << 62)

int sn_same_file(int fd, int other)
{
	return syscall(SYS_kcmp, getpid(), getpid(), KCMP_FILE, fd, other) == 0;
}

int sn_page_map_look(int fd, struct sn_page_map_info *ret)
{
	struct page_map_header header;
	struct snapd_uffd_msg ring[16] = {0}; /* of the current one; the rest would say no more */
	struct stat status;

	if (fstat(fd, &status))
		return -errno;
	if ((uint64_t)status.st_size < PM_BYTES || pread(fd, &header, sizeof(header), 0) != (ssize_t)sizeof(header) ||
	    !pm_is_ours(&header))
		return -EPROTO;
	if (pread(fd, ring, sizeof(ring),
		  (off_t)(PM_RING_OFFSET + (header.generation & 1) * RING_SLOTS * sizeof(ring[0]))) < 0)
		return -EPROTO;
	*ret = (struct sn_page_map_info){
		.pid = header.pid, .uid = header.uid, .number = header.number, .store_number = header.store_number,
		.parent = header.parent, .source = header.source, .flags = header.flags, .born = header.born,
		.sentinel = header.sentinel};
	memcpy(ret->store_id, header.store_id, sizeof(ret->store_id));
	for (int i = 0; i < MAX_INFLIGHT * MAX_SPANS; i++)
		if (header.intents[i].phase <= PHASE_CUT)
			ret->phases[header.intents[i].phase]++;
	for (unsigned int i = 0; i < sizeof(ring) / sizeof(ring[0]); i++)
		ret->events += ring[i].event && ring[i].event != SNAPD_UFFD_EVENT_PAGEFAULT;
	return 0;
}

int sn_page_map_renumber(int fd)
{
	uint32_t none = 0;

	return pwrite(fd, &none, sizeof(none), offsetof(struct page_map_header, number)) == sizeof(none) ? 0 : -errno;
}

static int by_first(const void *a, const void *b)
{
	const struct record *x = a, *y = b;

	return x->first < y->first ? -1 : x->first > y->first;
}

static const char *wrong_record(const struct record *record, uint64_t behind, uint64_t nentries)
{
	uint64_t pages = ADDRESSES_END / PAGE;

	if (record->start % PAGE || record->start < behind || !record->npages || record->npages > pages ||
	    record->start > ADDRESSES_END - record->npages * PAGE)
		return "a record's place";
	if (record->aside % PAGE || (record->aside && record->aside > ADDRESSES_END - record->npages * PAGE))
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
	    ENTRY_OFFSET(entry) > MAX_SEGMENTS << SEGMENT_SHIFT ||
	    ENTRY_OFFSET(entry) + ENTRY_BYTES(entry) > store_bytes)
		return "an entry's frame";
	return NULL;
}

/* All of a page map that is not ours alone: it may be damaged, or made by somebody. NULL when nothing is wrong. */
static const char *wrong(struct page_map *pm, uint64_t store_bytes, struct record *scratch)
{
	const struct table *table = pm_table(pm);
	uint64_t nentries = pm->header->nentries, behind = 0, n = 0;

	if (nentries > MAX_ENTRIES)
		return "how many entries it has";
	if (table->nrecords > MAX_RECORDS || table->ndebts > MAX_DEBTS)
		return "the length of its range table";
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
	for (uint64_t i = 0; i < n; i++) {
		if (i && scratch[i].first < scratch[i - 1].first + scratch[i - 1].npages)
			return "entries of two records";
		for (uint64_t k = 0; k < scratch[i].npages; k++) {
			const char *what = wrong_entry(pm->entries[scratch[i].first + k], store_bytes);

			if (what)
				return what;
		}
	}
	return NULL;
}

/* The numbers of descriptors that FORK events brought are those of the former daemon. */
void adopt_forks(struct sn_session *session)
{
	struct snapd_uffd_msg *ring = pm_ring(&session->pm);

	for (unsigned int i = 0; i < RING_SLOTS; i++) {
		struct snapd_uffd_msg *message = &ring[i];

		if (message->event != SNAPD_UFFD_EVENT_FORK)
			continue;
		if (!message->reserved3) /* the first who adopts it writes down what it was */
			message->reserved3 = message->arg.fork.ufd + 1;
		message->arg.fork.ufd = (uint32_t)keeper_fork(message->reserved3 - 1);
	}
}

struct sn_session *sn_session_adopt(const struct sn_target *target, struct sn_store *store, uint64_t store_bytes,
				    int *ret_error, const char **ret_what)
{
	struct sn_session *session = session_new(target, store, NULL, ret_error);
	const struct table *table;

	*ret_what = NULL;
	if (!session)
		return NULL;
	*ret_what = wrong(&session->pm, store_bytes, session->scratch);
	if (*ret_what) {
		*ret_error = -EBADMSG;
		session->uffd = session->agent_sock = session->pm.fd = -1; /* still the caller's */
		session_forget(session);
		return NULL;
	}
	table = pm_table(&session->pm);
	for (uint64_t i = 0; i < table->nrecords; i++)
		for (uint64_t k = 0; table->records[i].first != NO_ENTRIES && k < table->records[i].npages; k++)
			store_hold_entry(store, session->pm.entries[table->records[i].first + k]);
	set_check(session);
	session->adopted = true;
	session->forked = true;
	*ret_error = session_hand_over(session);
	FAULT_POINT(FP_ADOPTED);
	return session;
}

void sn_session_depend(struct sn_session *session, struct sn_session *source)
{
	session->source = source;
	if (source)
		atomic_fetch_add(&source->fork_copies, 1);
}

int sn_session_resume(struct sn_session *session)
{
	int error;

	haste_end_former(&session->pm.header->haste, atomic_load(&session->pid));
	adopt_forks(session);
	recover_begin(session);
	sn_session_dumped(session); /* what is out came back to nobody yet, for all that is known */
	error = session_start(session);
	FAULT_POINT(FP_RESUMED);
	/* What is aside waits until it is open: when the process is known, or its agent comes again. */
	if (!error && atomic_load(&session->pid))
		memory_open(session);
	if (!error && session->pm.alloc_next > PM_REUSE_FROM) /* where there is room is not in the page map */
		sn_page_map_trim(session);
	return error;
}
