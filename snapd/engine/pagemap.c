/* The page map file: entries, the range table and the event ring, two of each, debts of UNMAPs to come.
 *
 * Owns the layout's consistency: a change is made in the copy that is not current, and one store of the header's
 * generation makes it current together with the other ring, in which is what is not applied. Knows nothing of
 * threads or targets.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

_Static_assert(PM_RING_OFFSET + 2 * RING_SLOTS * sizeof(struct snapd_uffd_msg) <= PM_TABLE_OFFSET, "room for rings");
_Static_assert(sizeof(struct page_map_header) <= PM_RING_OFFSET, "the header has a page");

#define VERSION 1

static const char MAGIC[8] = "HSNAPPM1";

int sn_page_map_create(void)
{
	int fd = memfd_create("heap-snapd-page-map", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (fd < 0)
		return -errno;
	/* 0600: a target that holds this file can't open it anew for writing; no shrinking: never a SIGBUS here. */
	if (fchmod(fd, 0600) || ftruncate(fd, (off_t)PM_BYTES) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)) {
		int error = errno;

		close(fd);
		return -error;
	}
	return fd;
}

void sn_page_map_format(char *ret_magic, uint32_t *ret_version)
{
	memcpy(ret_magic, MAGIC, sizeof(MAGIC));
	*ret_version = VERSION;
}

bool pm_is_ours(const struct page_map_header *header)
{
	return memcmp(header->magic, MAGIC, sizeof(MAGIC)) == 0 && header->version == VERSION &&
	       header->page_size == PAGE;
}

int pm_open(struct page_map *pm, int fd)
{
	void *base = mmap(NULL, PM_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);

	if (base == MAP_FAILED)
		return -errno;
	pm->fd = fd;
	pm->base = base;
	pm->header = base;
	pm->entries = (void *)(pm->base + PM_ENTRIES_OFFSET);
	if (!pm->header->version) {
		memcpy(pm->header->magic, MAGIC, sizeof(MAGIC));
		pm->header->page_size = PAGE;
		pm->header->version = VERSION;
	}
	pm->alloc_next = pm->header->nentries;
	pm->alloc_limit = MAX_ENTRIES;
	return 0;
}

void pm_close(struct page_map *pm)
{
	if (pm->base)
		munmap(pm->base, PM_BYTES);
	if (pm->fd >= 0)
		close(pm->fd);
	pm->base = NULL;
	pm->fd = -1;
}

static struct table *table_at(struct page_map *pm, uint64_t generation)
{
	return (void *)(pm->base + PM_TABLE_OFFSET + (generation & 1) * PM_TABLE_BYTES);
}

struct table *pm_table(struct page_map *pm)
{
	return table_at(pm, atomic_load(&pm->header->generation));
}

static struct snapd_uffd_msg *ring_at(struct page_map *pm, uint64_t generation)
{
	return (struct snapd_uffd_msg *)(void *)(pm->base + PM_RING_OFFSET) + (generation & 1) * RING_SLOTS;
}

struct snapd_uffd_msg *pm_ring(struct page_map *pm)
{
	return ring_at(pm, atomic_load(&pm->header->generation));
}

struct snapd_uffd_msg *pm_other_ring(struct page_map *pm)
{
	return ring_at(pm, atomic_load(&pm->header->generation) + 1);
}

struct table *pm_edit(struct page_map *pm)
{
	struct table *from = pm_table(pm), *to = table_at(pm, atomic_load(&pm->header->generation) + 1);

	to->nrecords = from->nrecords;
	to->ndebts = from->ndebts;
	to->dropping = from->dropping;
	memcpy(to->debts, from->debts, from->ndebts * sizeof(from->debts[0]));
	memcpy(to->records, from->records, from->nrecords * sizeof(from->records[0]));
	return to;
}

void pm_commit(struct page_map *pm)
{
	atomic_fetch_add(&pm->header->generation, 1);
}

static uint64_t record_end(const struct record *record)
{
	return record->start + record->npages * PAGE;
}

long pm_first_at(const struct table *table, uint64_t address)
{
	long low = 0, high = (long)table->nrecords;

	while (low < high) {
		long middle = (low + high) / 2;

		if (record_end(&table->records[middle]) <= address)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

long pm_find(const struct table *table, uint64_t address)
{
	long i = pm_first_at(table, address);

	return i < (long)table->nrecords && table->records[i].start <= address ? i : -1;
}

/* The part of a record in [start, end), which must overlap it. */
static struct record part(const struct record *record, uint64_t start, uint64_t end)
{
	uint64_t from = max_u64(record->start, start), to = min_u64(record_end(record), end);
	uint64_t skip = from - record->start;

	return (struct record){from, (to - from) / PAGE,
			       record->first == NO_ENTRIES ? NO_ENTRIES : record->first + skip / PAGE,
			       record->aside ? record->aside + skip : 0};
}

static bool joins(const struct record *a, const struct record *b)
{
	uint64_t bytes = a->npages * PAGE;

	if (a->first == NO_ENTRIES || b->first == NO_ENTRIES)
		return a->start + bytes == b->start && a->first == b->first;
	return a->start + bytes == b->start && a->first + a->npages == b->first &&
	       (a->aside ? b->aside == a->aside + bytes : !b->aside);
}

static int make_room(struct table *table, long at)
{
	if (table->nrecords >= MAX_RECORDS)
		return -ENOSPC;
	memmove(&table->records[at + 1], &table->records[at],
		(table->nrecords - (uint64_t)at) * sizeof(table->records[0]));
	table->nrecords++;
	return 0;
}

static void take_out(struct table *table, long at, long count)
{
	memmove(&table->records[at], &table->records[at + count],
		(table->nrecords - (uint64_t)(at + count)) * sizeof(table->records[0]));
	table->nrecords -= (uint64_t)count;
}

int pm_insert(struct table *table, struct record record)
{
	long at = pm_first_at(table, record.start);
	bool left = at > 0 && joins(&table->records[at - 1], &record);
	bool right = at < (long)table->nrecords && joins(&record, &table->records[at]);

	if (left && right) {
		table->records[at - 1].npages += record.npages + table->records[at].npages;
		take_out(table, at, 1);
	} else if (left) {
		table->records[at - 1].npages += record.npages;
	} else if (right) {
		record.npages += table->records[at].npages;
		table->records[at] = record;
	} else {
		int error = make_room(table, at);

		if (error)
			return error;
		table->records[at] = record;
	}
	return 0;
}

long pm_cut(struct table *table, uint64_t start, uint64_t end, struct record *out, long capacity)
{
	long first = pm_first_at(table, start), count = 0, kept = 0;
	struct record keep[2];

	while (first + count < (long)table->nrecords && table->records[first + count].start < end) {
		const struct record *record = &table->records[first + count];

		if (out && count < capacity)
			out[count] = part(record, start, end);
		if (record->start < start)
			keep[kept++] = part(record, record->start, start);
		if (record_end(record) > end)
			keep[kept++] = part(record, end, record_end(record));
		count++;
	}
	if (kept > count && make_room(table, first + count)) /* one record becomes two */
		return -ENOSPC;
	for (long i = 0; i < kept; i++)
		table->records[first + i] = keep[i];
	if (count > kept)
		take_out(table, first + kept, count - kept);
	return count;
}

uint64_t pm_address_of(const struct table *table, uint64_t index)
{
	for (uint64_t i = 0; i < table->nrecords; i++)
		if (table->records[i].first != NO_ENTRIES &&
		    index - table->records[i].first < table->records[i].npages)
			return table->records[i].start + (index - table->records[i].first) * PAGE;
	return 0;
}

void pm_join(struct table *table)
{
	uint64_t kept = 0;

	for (uint64_t i = 1; i < table->nrecords; i++) {
		if (joins(&table->records[kept], &table->records[i]))
			table->records[kept].npages += table->records[i].npages;
		else
			table->records[++kept] = table->records[i];
	}
	if (table->nrecords)
		table->nrecords = kept + 1;
}

void pm_add_debt(struct table *table, uint64_t start, uint64_t end)
{
	if (table->ndebts == MAX_DEBTS) { /* the oldest belong to moves that raised no UNMAP */
		memmove(table->debts, table->debts + 1, (MAX_DEBTS - 1) * sizeof(table->debts[0]));
		table->ndebts--;
	}
	table->debts[table->ndebts++] = (struct interval){start, end};
}

void pm_set_dropping(struct page_map *pm, struct interval dropping)
{
	pm_edit(pm)->dropping = dropping;
	pm_commit(pm);
}

bool pm_settle(struct table *table, uint64_t start, uint64_t end)
{
	for (uint64_t i = 0; i < table->ndebts; i++)
		if (table->debts[i].start == start && table->debts[i].end == end) {
			table->debts[i] = table->debts[--table->ndebts];
			return true;
		}
	return false;
}

int pm_blank(struct table *table, uint64_t start, uint64_t end)
{
	int error = 0;

	while (start < end && !error) {
		long i = pm_first_at(table, start);
		const struct record *next = i < (long)table->nrecords ? &table->records[i] : NULL;
		uint64_t upto = next ? min_u64(end, next->start) : end;

		if (next && next->start <= start) {
			start = record_end(next);
			continue;
		}
		error = pm_insert(table, (struct record){start, (upto - start) / PAGE, NO_ENTRIES, 0});
		start = upto;
	}
	return error;
}

int pm_alloc(struct page_map *pm, uint64_t npages, uint64_t *ret_first)
{
	if (pm->alloc_next + npages > pm->alloc_limit)
		return -ENOSPC;
	*ret_first = pm->alloc_next;
	pm->alloc_next += npages;
	pm->header->nentries = max_u64(pm->header->nentries, pm->alloc_next);
	for (uint64_t i = 0; i < npages; i++) /* they may have been another page's */
		atomic_store_explicit(&pm->entries[*ret_first + i], ST_NONE, memory_order_relaxed);
	return 0;
}

static int by_first(const void *a, const void *b)
{
	const struct record *x = a, *y = b;

	return x->first < y->first ? -1 : x->first > y->first;
}

/* Entries of no record are blank; whole pages of them take no memory. */
static void blank(struct page_map *pm, uint64_t first, uint64_t end)
{
	const uint64_t per_page = PAGE / 8;
	uint64_t from = (first + per_page - 1) / per_page * per_page, to = end / per_page * per_page;

	if (from >= to)
		return;
	fallocate(pm->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(PM_ENTRIES_OFFSET + from * 8),
		  (off_t)((to - from) * 8));
}

/* Gives the memory of entries that belong to no record back, and lets new ones come from the widest gap once half of
 * all have been given out: a session that lives long does not run out of them. */
void pm_trim(struct page_map *pm, struct record *used, uint64_t n)
{
	uint64_t free_from = 0, gap = 0, gap_end = 0;

	qsort(used, n, sizeof(*used), by_first);
	for (uint64_t i = 0; i <= n; i++) {
		uint64_t upto = i < n ? used[i].first : MAX_ENTRIES;

		blank(pm, free_from, min_u64(upto, pm->header->nentries));
		if (upto > free_from && upto - free_from > gap_end - gap) {
			gap = free_from;
			gap_end = upto;
		}
		if (i < n)
			free_from = max_u64(free_from, used[i].first + used[i].npages);
	}
	if (pm->alloc_next > PM_REUSE_FROM || pm->alloc_limit < MAX_ENTRIES) {
		pm->alloc_next = gap;
		pm->alloc_limit = gap_end;
	}
}
