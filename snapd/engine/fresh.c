/* Fresh memory: a program that goes on using new memory gets zeros in windows that grow, not by a fault a page.
 *
 * Owns how large a window is, and what of it may be zeros: pages of which nothing is known, or that they are zeros, and
 * that are not there. Knows no frames.
 */
#include "internal.h"

#include <errno.h>

#define WINDOW_PAGES 256 /* the largest */
#define FIRST_PAGES 4
#define STEP_PAGES 128 /* of one COPY: whoever else waits for the lock or a fill does not wait long */
#define NEAR_PAGES 64  /* what is in use already between two windows may be so wide */

/* Never written: the kernel's own zero page, many times. */
static unsigned char zeros[STEP_PAGES * PAGE] __attribute__((aligned(4096)));

/* How many pages from a fault on the program is likely to want. */
static uint64_t wish(struct sn_session *session, uint64_t address)
{
	struct fresh *fresh = &session->fresh;
	uint64_t npages = 1;
	int i = 0;

	pthread_mutex_lock(&session->fresh_lock);
	while (i < FRESH_STREAMS && !(fresh->streams[i].npages && address >= fresh->streams[i].expected &&
				      address < fresh->streams[i].expected + NEAR_PAGES * PAGE))
		i++;
	if (i < FRESH_STREAMS) {
		npages = fresh->streams[i].npages;
		fresh->streams[i].npages = min_u64(4 * npages, WINDOW_PAGES);
	} else {
		i = (int)(fresh->next_victim++ % FRESH_STREAMS);
		fresh->streams[i].npages = FIRST_PAGES;
	}
	fresh->streams[i].expected = address + PAGE;
	pthread_mutex_unlock(&session->fresh_lock);
	return npages;
}

/* The window has ended elsewhere than at its first page. */
static void expect(struct sn_session *session, uint64_t address, uint64_t npages)
{
	struct fresh *fresh = &session->fresh;

	pthread_mutex_lock(&session->fresh_lock);
	for (int i = 0; i < FRESH_STREAMS; i++)
		if (fresh->streams[i].expected == address + PAGE)
			fresh->streams[i].expected = address + npages * PAGE;
	pthread_mutex_unlock(&session->fresh_lock);
}

/* How many pages in a row may become zeros that nobody has asked for; for whoever holds the lock. A page that is there,
 * a guard or a poison marker ends them: what was put there without an event only the pagemap knows. */
static uint64_t clip(struct sn_session *session, uint64_t address, uint64_t npages)
{
	const uint64_t taken = SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED | SNAPD_PAGE_IS_GUARD;
	const struct table *table = pm_table(&session->pm);
	int fd = atomic_load(&session->pagemap_fd);
	long i = pm_find(table, address), found;
	struct snapd_page_region region;
	uint64_t first, n = 1;

	if (i < 0 || fd < 0 || session->unseen)
		return 1;
	first = (address - table->records[i].start) / PAGE;
	npages = min_u64(npages, table->records[i].npages - first);
	if (table->records[i].first == NO_ENTRIES)
		n = npages;
	else
		first += table->records[i].first;
	for (; n < npages; n++) {
		uint64_t entry = session->pm.entries[first + n];

		if (entry & ENTRY_MOVING || (ENTRY_STATE(entry) != ST_NONE && ENTRY_STATE(entry) != ST_ZERO))
			break;
	}
	if (n == 1)
		return 1;
	found = pagemap_scan(fd, address + PAGE, address + n * PAGE, taken, taken, 1, &region, 1, NULL);
	if (found < 0)
		return 1;
	return found ? (region.start - address) / PAGE : n;
}

static void now_fresh(struct sn_session *session, uint64_t address, uint64_t npages)
{
	const struct table *table = pm_table(&session->pm);
	long i = pm_find(table, address);

	if (i < 0 || table->records[i].first == NO_ENTRIES)
		return;
	for (uint64_t k = 0; k < npages; k++) {
		uint64_t index = table->records[i].first + (address - table->records[i].start) / PAGE + k;
		uint64_t zero = ST_ZERO;

		atomic_compare_exchange_strong(&session->pm.entries[index], &zero, ST_NONE);
	}
}

enum uffd_result fresh_fill(struct sn_session *session, uint64_t address, bool alone)
{
	uint64_t wanted = alone ? 1 : wish(session, address), done = 0;
	uint64_t npages = wanted > 1 ? clip(session, address, wanted) : 1;
	enum uffd_result result = UFFD_DONE;

	while (done < npages && result == UFFD_DONE) {
		uint64_t bytes = 0;

		result = uffd_copy(session->uffd, address + done * PAGE, zeros,
				   min_u64(npages - done, STEP_PAGES) * PAGE, 0, &bytes);
		done += bytes / PAGE;
	}
	/* The window may cross an edge of the mapping, or find no memory: the page asked for may do neither. */
	if (!done && npages > 1 && result != UFFD_AGAIN && result != UFFD_GONE) {
		result = uffd_copy(session->uffd, address, zeros, PAGE, 0, NULL);
		done = result == UFFD_DONE;
	}
	if (done > 1) {
		now_fresh(session, address + PAGE, done - 1);
		expect(session, address, done);
	}
	return done ? UFFD_DONE : result;
}
