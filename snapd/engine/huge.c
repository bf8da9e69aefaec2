/* Huge pages: what a stop saw of them, and making them anew when everything is back.
 *
 * Owns the list of places. Nothing of it is needed for any byte: a place that has changed is left as it is.
 */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_PLACES 4096
#define COLLAPSE_TRIES 3

struct huge {
	int n;
	struct interval places[MAX_PLACES];
};

struct huge *huge_create(void)
{
	return calloc(1, sizeof(struct huge));
}

void huge_destroy(struct huge *huge)
{
	free(huge);
}

void huge_note(struct huge *huge, uint64_t start, uint64_t end)
{
	for (int i = huge->n - 1; i >= 0; i--) {
		struct interval *place = &huge->places[i];

		if (start > place->end || end < place->start)
			continue;
		place->start = min_u64(place->start, start);
		place->end = max_u64(place->end, end);
		return;
	}
	if (huge->n < MAX_PLACES)
		huge->places[huge->n++] = (struct interval){start, end};
}

static int collapse(struct sn_session *session, int pidfd, uint64_t start)
{
	struct iovec block = {(void *)(uintptr_t)start, HUGE_BYTES};
	struct snapd_wire message = {.kind = SNAPD_ADVISE, .value = SNAPD_MADV_COLLAPSE, .nruns = 1,
				     .runs = {{start, HUGE_BYTES}}};
	int error;

	if (syscall(SYS_process_madvise, pidfd, &block, 1, SNAPD_MADV_COLLAPSE, 0) >= 0)
		return 0;
	if (errno != EPERM)
		return -errno;
	pthread_mutex_lock(&session->mover); /* a plain user asks the agent */
	error = mover_call(session, &message);
	pthread_mutex_unlock(&session->mover);
	return error;
}

/* All of it is there, in small pages, and not watched: what was thrown away since is not brought back, and what is
 * watched may be missing because it is out. */
static bool is_small(struct sn_session *session, uint64_t start)
{
	const uint64_t there = SNAPD_PAGE_IS_PRESENT, look = there | SNAPD_PAGE_IS_HUGE | SNAPD_PAGE_IS_WPALLOWED;
	struct snapd_page_region region;
	long n = pagemap_scan(atomic_load(&session->pagemap_fd), start, start + HUGE_BYTES, there, look, 0, &region, 1,
			      NULL);

	return n == 1 && region.start == start && region.end == start + HUGE_BYTES && region.categories == there;
}

/* The process that the session's descriptors of /proc are of, or none. */
static int open_process(struct sn_session *session)
{
	int pidfd = (int)syscall(SYS_pidfd_open, atomic_load(&session->pid), 0);

	if (pidfd < 0)
		return -errno;
	if (faccessat(atomic_load(&session->process_fd), "stat", F_OK, 0)) {
		close(pidfd);
		return -ESRCH;
	}
	return pidfd;
}

int sn_session_collapse(struct sn_session *session, uint64_t *ret_bytes)
{
	struct huge *seen;
	int pidfd, error = 0;

	*ret_bytes = 0;
	pthread_mutex_lock(&session->mover);
	seen = session->huge;
	session->huge = NULL;
	pthread_mutex_unlock(&session->mover);
	if (!seen)
		return 0;
	pidfd = open_process(session);
	for (int i = 0; i < seen->n && pidfd >= 0; i++) {
		uint64_t start = (seen->places[i].start + HUGE_BYTES - 1) & ~(HUGE_BYTES - 1);

		for (; start + HUGE_BYTES <= seen->places[i].end; start += HUGE_BYTES) {
			for (int tries = 0; tries < COLLAPSE_TRIES && is_small(session, start); tries++) {
				error = collapse(session, pidfd, start);
				if (!error)
					*ret_bytes += HUGE_BYTES;
				if (error != -EAGAIN && error != -EBUSY)
					break;
			}
			if (error == -ENOMEM || error == -ESRCH || error == -EPIPE || error == MOVER_SILENT ||
			    error == MOVER_LATE || error == MOVER_FILTERED)
				goto out; /* there is no room for more, or nobody */
		}
	}
out:
	if (pidfd >= 0)
		close(pidfd);
	huge_destroy(seen);
	return pidfd < 0 ? pidfd : error == -ESRCH || error == -EPIPE ? -ESRCH : 0;
}
