/* Prefetch: what a demand fill says about the next ones. A program that walks through its memory gets it in runs.
 *
 * A few streams are followed; a fault where a stream is expected to go on doubles its window. Done by the reader
 * between faults, a few pages at a time, so that a demand fill never waits for more than one step. Never waits for
 * a disk. */
#include "internal.h"

#include <stdlib.h>

#define STREAMS 8
#define FIRST_WINDOW 8
#define MAX_WINDOW 256
#define STEP_PAGES 16

struct stream {
	uint64_t expected; /* the next fault is here if the program goes on */
	uint64_t window;   /* pages */
};

struct prefetch {
	struct bulk bulk;
	struct stream streams[STREAMS];
	unsigned int next_victim;
	uint64_t at, end; /* what is being brought in */
};

struct prefetch *prefetch_create(struct sn_session *session)
{
	struct prefetch *prefetch = calloc(1, sizeof(*prefetch));

	if (prefetch && bulk_init(&prefetch->bulk, session, true)) {
		free(prefetch);
		return NULL;
	}
	return prefetch;
}

void prefetch_destroy(struct prefetch *prefetch)
{
	if (!prefetch)
		return;
	bulk_deinit(&prefetch->bulk);
	free(prefetch);
}

void prefetch_note(struct prefetch *prefetch, uint64_t address)
{
	struct stream *stream = NULL;

	for (int i = 0; i < STREAMS && !stream; i++) {
		struct stream *one = &prefetch->streams[i];

		if (one->window && address >= one->expected && address < one->expected + FIRST_WINDOW * PAGE)
			stream = one;
	}
	if (!stream) {
		prefetch->streams[prefetch->next_victim++ % STREAMS] =
			(struct stream){.expected = address + PAGE, .window = FIRST_WINDOW};
		return;
	}
	prefetch->at = address + PAGE;
	prefetch->end = prefetch->at + stream->window * PAGE;
	stream->expected = prefetch->end;
	stream->window = min_u64(2 * stream->window, MAX_WINDOW);
}

bool prefetch_step(struct prefetch *prefetch)
{
	uint64_t end = min_u64(prefetch->end, prefetch->at + STEP_PAGES * PAGE);
	struct sn_session *session = prefetch->bulk.session;
	struct run run;

	if (prefetch->at >= prefetch->end)
		return false;
	/* Without a look at the pagemap guards can't be seen. */
	while (prefetch->at < end && atomic_load(&session->pagemap_fd) >= 0 &&
	       bulk_next(session, &prefetch->at, end, &run)) {
		uint64_t good;

		if (ENTRY_STATE(run.entries[0]) != ST_STORED || run.entries[0] & ENTRY_MOVING ||
		    memory_has_guard(session, run.start, run.n))
			continue;
		good = bulk_decode(&prefetch->bulk, &run, true);
		if (bulk_copy(&prefetch->bulk, &run, prefetch->bulk.pages, good) || good < run.n) {
			prefetch->end = 0; /* not cached, or bad: the demand fill sees to it */
			return false;
		}
		resume_note(session, run.start, run.n);
	}
	prefetch->at = max_u64(prefetch->at, end);
	return prefetch->at < prefetch->end;
}
