/* A piece from its making to its drop: what is moved aside (move.c), packed (pack.c), and at last unmapped.
 *
 * Owns when the staging may go: not while a page of it has no other home. Knows no ptrace.
 */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

/* The first address not below at that is congruent with like modulo 2 MiB: huge pages stay whole there and page tables
 * move by the table. */
static uint64_t congruent(uint64_t at, uint64_t like)
{
	return at + ((like - at) & (HUGE_BYTES - 1));
}

static void place_spans(struct sn_piece *piece, const uint64_t *intervals, uint64_t hint)
{
	uint64_t aside = (hint & ~(HUGE_BYTES - 1)) + (uint64_t)piece->slot * SLOT_BYTES, staging = 0;

	piece->staging_hint = hint ? aside + SLOT_BYTES / 2 : 0;
	for (int i = 0; i < piece->nspans; i++) {
		const uint64_t *interval = &intervals[2 * (i && FAULT_ERROR(FP_LISTING) ? i - 1 : i)];
		struct span *span = &piece->spans[i];

		span->start = interval[0];
		span->npages = (interval[1] - span->start) / PAGE;
		span->base = piece->npages;
		piece->npages += span->npages;
		aside = congruent(aside, span->start);
		span->hint = hint ? aside : 0;
		aside += span_bytes(span);
		staging = congruent(staging, span->start);
		span->staging = staging; /* an offset until the staging is mapped */
		staging += span_bytes(span);
	}
	piece->staging_bytes = staging;
}

struct sn_piece *sn_piece_create(struct sn_session *session, const uint64_t *intervals, int nintervals, uint64_t hint)
{
	struct sn_piece *piece = calloc(1, sizeof(*piece));

	if (!piece)
		return NULL;
	piece->session = session;
	piece->nspans = nintervals;
	pthread_mutex_init(&piece->lock, NULL);
	pthread_cond_init(&piece->done, NULL);
	pthread_rwlock_wrlock(&session->lock);
	piece->slot = -1;
	for (int i = 0; i < MAX_INFLIGHT && piece->slot < 0; i++)
		if (!session->inflight[i]) {
			session->inflight[i] = piece;
			piece->slot = i;
		}
	pthread_rwlock_unlock(&session->lock);
	if (piece->slot >= 0 && nintervals > 0 && nintervals <= MAX_SPANS) {
		place_spans(piece, intervals, hint);
		piece->segments = calloc(MAX_SEGMENTS_OF_PIECE, sizeof(*piece->segments));
		piece->decisions = calloc(piece->npages, 1);
		piece->regions = calloc(piece->npages + 1, sizeof(*piece->regions));
	}
	if (!piece->segments || !piece->decisions || !piece->regions) {
		sn_piece_free(piece);
		return NULL;
	}
	FAULT_POINT(FP_CHOSEN);
	return piece;
}

/* With the last piece goes the hold on the target's memory, but not before the children have their copies. */
void sn_piece_free(struct sn_piece *piece)
{
	struct sn_session *session = piece->session;
	bool last = true;

	/* Nobody may read the event of an unmap that comes after the session's end. */
	if (piece->staging && piece->dropped < piece->staging_bytes)
		uffd_unregister(session->uffd, piece->staging + piece->dropped, piece->staging_bytes - piece->dropped);
	pthread_rwlock_wrlock(&session->lock);
	if (piece->slot >= 0) {
		session->inflight[piece->slot] = NULL;
		memset(&session->pm.header->intents[piece->slot * MAX_SPANS], 0, MAX_SPANS * sizeof(struct intent));
		FAULT_POINT(FP_PIECE_ENDING);
		session->pm.header->stagings[piece->slot] = (struct snapd_run){0, 0};
	}
	for (int i = 0; i < MAX_INFLIGHT; i++)
		last &= !session->inflight[i];
	pthread_rwlock_unlock(&session->lock);
	while (last && atomic_load(&session->fork_copies))
		usleep(200);
	if (last)
		hold_release(session);
	pthread_mutex_destroy(&piece->lock);
	pthread_cond_destroy(&piece->done);
	piece_forget_kept(piece);
	free(piece->segments);
	free(piece->decisions);
	free(piece->regions);
	free(piece);
}

/* A failed store: what is still aside returns to the target, by fills. -EAGAIN: some of it must wait there. */
int sn_piece_return(struct sn_piece *piece)
{
	struct sn_session *session = piece->session;
	struct filler filler;
	struct fault fault;
	int ret = filler_init(&filler);

	if (ret)
		return ret;
	for (long i = 0; i < piece->nsegments; i++)
		for (uint64_t k = 0; k < piece->segments[i].npages; k++) {
			uint64_t index = piece->segments[i].first + k, address = 0;

			pthread_rwlock_rdlock(&session->lock);
			if (ENTRY_STATE(session->pm.entries[index]) == ST_ASIDE)
				address = pm_address_of(pm_table(&session->pm), index);
			pthread_rwlock_unlock(&session->lock);
			if (!address)
				continue;
			fault = (struct fault){.address = address, .write = true, .unasked = true};
			for (int tries = 0; tries < 1000; tries++) {
				enum fill_result result = fill_page(session, &filler, &fault, false);

				if (result == FILL_GONE)
					ret = -ESRCH;
				if (result != FILL_LATER && result != FILL_TROUBLE)
					break;
				usleep(100);
			}
			if (ENTRY_STATE(session->pm.entries[index]) == ST_ASIDE && !ret)
				ret = -EAGAIN;
		}
	filler_deinit(&filler);
	return ret;
}

/* Forgets where the staging was. -EBUSY while a page of it has no other home. */
static int leave_staging(struct sn_piece *piece)
{
	struct sn_session *session = piece->session;
	uint64_t end = piece->staging + piece->staging_bytes;
	struct table *table;
	int error = 0;

	pthread_rwlock_wrlock(&session->lock);
	while (atomic_load(&session->fork_copies)) { /* a child that was forked meanwhile takes its copies first */
		pthread_rwlock_unlock(&session->lock);
		usleep(200);
		pthread_rwlock_wrlock(&session->lock);
	}
	for (long i = 0; i < piece->nsegments; i++)
		for (uint64_t k = 0; k < piece->segments[i].npages; k++)
			if (ENTRY_STATE(session->pm.entries[piece->segments[i].first + k]) == ST_ASIDE &&
			    piece->decisions[piece->segments[i].base + k] != LEFT_ASIDE)
				error = -EBUSY;
	if (!error) {
		table = pm_edit(&session->pm);
		for (uint64_t i = 0; i < table->nrecords; i++)
			if (table->records[i].aside >= piece->staging && table->records[i].aside < end)
				table->records[i].aside = 0;
		pm_join(table);
		pm_commit(&session->pm);
		FAULT_POINT(FP_STAGING_LEFT);
		piece_set_phase(piece, PHASE_DROP);
		FAULT_POINT(FP_DROPPING);
	}
	pthread_rwlock_unlock(&session->lock);
	return error;
}

/* Of an adopted piece only what is still there. */
static int unmap_slice(struct sn_piece *piece, struct snapd_run slice)
{
	struct sn_session *session = piece->session;
	int error = 0;

	pthread_mutex_lock(&session->mover);
	/* Until the mover has run after its event every COPY into the target says EAGAIN: make room for it. */
	mover_pause(session);
	if (piece->adopted) /* what it was told before is done, or it would be asked about what is not there any more */
		error = mover_ready(session);
	while (slice.length && !error) {
		struct snapd_run run = piece->adopted ? recover_ours(session, slice) : slice;
		uint64_t behind = run.start + run.length;

		if (run.length)
			error = mover_unmap(session, run);
		slice = (struct snapd_run){behind, slice.length - (behind - slice.start)};
	}
	mover_continue(session);
	pthread_mutex_unlock(&session->mover);
	return error;
}

int sn_piece_drop(struct sn_piece *piece, uint64_t slice, unsigned int breath_us)
{
	struct snapd_run runs[1 + MAX_SPANS] = {{piece->staging, piece->staging_bytes}};
	uint64_t done = 0; /* of the runs before */
	unsigned int nruns = 1;
	int error;

	if (!piece->staging)
		return 0;
	error = leave_staging(piece);
	if (error)
		return error;
	for (int i = 0; i < piece->nspans; i++) {
		const struct span *span = &piece->spans[i];

		if (span->aside && !span->keep_aside)
			runs[nruns++] = (struct snapd_run){span->aside, span_bytes(span)};
	}
	for (unsigned int i = 0; i < nruns && !error; done += runs[i++].length)
		while (piece->dropped < done + runs[i].length && !error) {
			uint64_t at = piece->dropped - done, bytes = min_u64(slice, runs[i].length - at);

			error = unmap_slice(piece, (struct snapd_run){runs[i].start + at, bytes});
			FAULT_POINT(FP_SLICE_DROPPED);
			/* A late one is carried out all the same; of an adopted piece it may be a part only. */
			if (!error || (error == MOVER_LATE && !piece->adopted))
				piece->dropped += bytes;
			if (i == 0)
				usleep(breath_us);
		}
	if (!error)
		piece->staging = 0;
	return error;
}
