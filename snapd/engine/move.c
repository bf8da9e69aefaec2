/* One stop: stage before it, then stop, recheck, watch, move, look, pin pass, go on. The order is docs/design.md's.
 *
 * Inside the stop nothing is allocated and nothing logged. Knows the page map and the mover; the piece's life before and
 * after is piece.c's.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define RECORD_RESERVE 4096
#define MERGE_GAP 32 /* pages that need no pin pass but cost less inside a run than a run of their own */
#define LOOK                                                                                                           \
	(SNAPD_PAGE_IS_WRITTEN | SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED | SNAPD_PAGE_IS_PFNZERO |               \
	 SNAPD_PAGE_IS_HUGE | SNAPD_PAGE_IS_GUARD)

struct files {
	int pagemap, maps;
};

static int open_files(int pid, struct files *ret)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
	ret->pagemap = open(path, O_RDONLY | O_CLOEXEC);
	snprintf(path, sizeof(path), "/proc/%d/maps", pid);
	ret->maps = open(path, O_RDONLY | O_CLOEXEC);
	if (ret->pagemap >= 0 && ret->maps >= 0)
		return 0;
	return -errno;
}

static void close_files(struct files *files)
{
	if (files->pagemap >= 0)
		close(files->pagemap);
	if (files->maps >= 0)
		close(files->maps);
}

static int stage(struct sn_piece *piece)
{
	struct sn_session *session = piece->session;
	struct snapd_wire message = {.kind = SNAPD_STAGE,
				     .length = piece_bytes(piece),
				     .dest = piece->hint + ((piece_bytes(piece) + 2 * HUGE_BYTES) & ~(HUGE_BYTES - 1))};
	int error = mover_call(session, &message);

	if (error)
		return error;
	piece->staging = message.value;
	return uffd_register(session->uffd, piece->staging, piece_bytes(piece), SNAPD_UFFDIO_REGISTER_MODE_MISSING);
}

/* The mapping is still what was chosen, and nothing in it may not move. Returns an outcome. */
static int recheck(struct sn_piece *piece, const struct files *files, struct snapd_procmap_query *vma)
{
	uint64_t end = piece->start + piece_bytes(piece);

	*vma = (struct snapd_procmap_query){.size = sizeof(*vma), .query_addr = piece->start};
	if (ioctl(files->maps, SNAPD_PROCMAP_QUERY, vma))
		return errno == ESRCH ? SN_GONE : SN_CHANGED;
	if (vma->vma_start > piece->start || vma->vma_end < end || vma->inode || vma->dev_major || vma->dev_minor ||
	    !(vma->vma_flags & SNAPD_PROCMAP_VMA_READABLE) || !(vma->vma_flags & SNAPD_PROCMAP_VMA_WRITABLE) ||
	    vma->vma_flags & SNAPD_PROCMAP_VMA_SHARED || stop_touches(piece->session->stop, piece->start, end))
		return SN_CHANGED;
	return SN_MOVED;
}

/* Registers the whole mapping: a part would split it, and the program's own mremap across the split fails. Records at
 * addresses that were not watched belong to a mapping that is gone. */
static int watch(struct sn_piece *piece, const struct files *files, const struct snapd_procmap_query *vma, int *cause)
{
	struct sn_session *session = piece->session;
	bool watched = sn_watched(files->pagemap, piece->start) == 1;
	int error = sn_uffd_register(session->uffd, vma->vma_start, vma->vma_end - vma->vma_start);

	*cause = error;
	if (error == -EBUSY)
		return SN_FOREIGN;
	if (error)
		return error == -ESRCH ? SN_GONE : error == -ENOMEM ? SN_NO_ROOM : SN_FAILED;
	if (!watched) {
		struct table *table;
		long n;

		pthread_rwlock_wrlock(&session->lock);
		table = pm_edit(&session->pm);
		n = pm_cut(table, vma->vma_start, vma->vma_end, session->scratch, MAX_RECORDS);
		for (long i = 0; i < n; i++)
			for (uint64_t k = 0; k < session->scratch[i].npages; k++)
				entry_put(session, session->scratch[i].first + k, ST_NONE);
		pm_commit(&session->pm, pm_applied(&session->pm));
		pthread_rwlock_unlock(&session->lock);
	}
	return SN_MOVED;
}

/* Gives every page of the piece an entry and marks all as moving. Debts are void: at a full stop no event is unread. */
static int claim(struct sn_piece *piece)
{
	struct sn_session *session = piece->session;
	struct page_map *pm = &session->pm;
	uint64_t at = piece->start, end = at + piece_bytes(piece), first;
	struct table *table;
	int error = 0;

	pthread_rwlock_wrlock(&session->lock);
	table = pm_edit(pm);
	table->ndebts = 0;
	if (table->nrecords > MAX_RECORDS - RECORD_RESERVE)
		error = -ENOSPC;
	while (at < end && !error) {
		long i = pm_first_at(table, at);
		const struct record *next = i < (long)table->nrecords ? &table->records[i] : NULL;

		if (next && next->start <= at) {
			at = next->start + next->npages * PAGE;
			continue;
		}
		uint64_t upto = next ? min_u64(end, next->start) : end;

		error = pm_alloc(pm, (upto - at) / PAGE, &first);
		if (!error)
			error = pm_insert(table, (struct record){at, (upto - at) / PAGE, first, 0});
		at = upto;
	}
	piece->nsegments = 0;
	for (long i = pm_first_at(table, piece->start); !error && i < (long)table->nrecords; i++) {
		const struct record *record = &table->records[i];
		uint64_t from = max_u64(record->start, piece->start);
		uint64_t to = min_u64(record->start + record->npages * PAGE, end);

		if (record->start >= end)
			break;
		if (piece->nsegments == MAX_SEGMENTS_OF_PIECE || record->aside) {
			error = record->aside ? -EBUSY : -E2BIG;
			break;
		}
		piece->segments[piece->nsegments++] =
			(struct segment){record->first + (from - record->start) / PAGE, (to - from) / PAGE, from};
	}
	if (!error) {
		piece_set_phase(piece, PHASE_MOVE);
		for (long i = 0; i < piece->nsegments; i++)
			for (uint64_t k = 0; k < piece->segments[i].npages; k++)
				atomic_fetch_or(&pm->entries[piece->segments[i].first + k], ENTRY_MOVING);
		pm_commit(pm, pm_applied(pm));
		session->in_stop = true;
		session->own_move = (struct snapd_run){piece->start, piece_bytes(piece)};
		session->own_move_to = 0;
	}
	pthread_rwlock_unlock(&session->lock);
	return error;
}

static void unclaim(struct sn_piece *piece)
{
	struct sn_session *session = piece->session;

	pthread_rwlock_wrlock(&session->lock);
	for (long i = 0; i < piece->nsegments; i++)
		for (uint64_t k = 0; k < piece->segments[i].npages; k++)
			atomic_fetch_and(&session->pm.entries[piece->segments[i].first + k], ~ENTRY_MOVING);
	session->in_stop = false;
	piece_set_phase(piece, PHASE_IDLE);
	pthread_rwlock_unlock(&session->lock);
}

static int move_back(struct sn_session *session, uint64_t from, uint64_t to, uint64_t bytes)
{
	struct snapd_wire message = {.kind = SNAPD_BACK, .addr = from, .length = bytes, .dest = to};

	return mover_call(session, &message);
}

static int move(struct sn_piece *piece, int *cause)
{
	struct sn_session *session = piece->session;
	struct snapd_wire message = {
		.kind = SNAPD_MOVE, .addr = piece->start, .length = piece_bytes(piece), .dest = piece->hint};
	uint64_t seen;
	int error;

	message.value = 0;
	error = mover_call(session, &message);
	piece->aside = message.value;
	*cause = error;
	if (error && !piece->aside) {
		switch (error) {
		case -ENOMEM: return SN_NO_ROOM;
		case -EPERM: return SN_SEALED;
		case -EFAULT: return SN_CHANGED;
		case -EPIPE: return SN_GONE;
		default: return SN_FAILED;
		}
	}
	/* mremap returned, so its event was read; taking the lock makes sure that it was applied. */
	pthread_rwlock_wrlock(&session->lock);
	seen = session->own_move_to;
	piece_set_phase(piece, PHASE_PIN);
	pthread_rwlock_unlock(&session->lock);
	if (seen == piece->aside)
		return SN_MOVED;
	/* No event: the mapping was not ours to watch. Nothing runs: it goes back as if nothing had been. */
	*cause = move_back(session, piece->aside, piece->start, piece_bytes(piece));
	piece->aside = 0;
	return SN_CHANGED;
}

static uint64_t entry_of(const struct sn_piece *piece, uint64_t page, long *segment, uint64_t *base)
{
	while (page >= *base + piece->segments[*segment].npages)
		*base += piece->segments[(*segment)++].npages;
	return piece->segments[*segment].first + (page - *base);
}

/* What the aside holds decides each page, whatever its entry said. */
static int look(struct sn_piece *piece, const struct files *files, struct sn_piece_report *ret)
{
	_Atomic uint64_t *entries = piece->session->pm.entries;
	uint64_t base = 0, index;
	long segment = 0, n;

	n = pagemap_scan(files->pagemap, piece->aside, piece->aside + piece_bytes(piece),
			 SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED | SNAPD_PAGE_IS_GUARD, LOOK, 0, piece->regions,
			 piece->npages + 1, NULL);
	if (n < 0)
		return (int)n;
	memset(piece->decisions, KEEP, piece->npages);
	for (long i = 0; i < n; i++) {
		const struct snapd_page_region *region = &piece->regions[i];
		uint64_t from = (region->start - piece->aside) / PAGE, to = (region->end - piece->aside) / PAGE;

		for (uint64_t page = from; page < to; page++) {
			enum decision decision = DIRTY;
			enum state state;

			index = entry_of(piece, page, &segment, &base);
			state = ENTRY_STATE(entries[index]);
			if (region->categories & SNAPD_PAGE_IS_GUARD)
				decision = GUARD;
			else if (state == ST_BAD && !(region->categories & SNAPD_PAGE_IS_PRESENT))
				decision = KEEP; /* a poison marker looks swapped */
			else if (region->categories & SNAPD_PAGE_IS_PFNZERO)
				decision = ZERO;
			else if (!(region->categories & SNAPD_PAGE_IS_WRITTEN) &&
				 (state == ST_STORED || state == ST_FILLED))
				decision = CLEAN;
			piece->decisions[page] = (uint8_t)decision;
			ret->present += decision != GUARD && decision != KEEP;
			ret->huge += (region->categories & SNAPD_PAGE_IS_HUGE) != 0;
		}
	}
	return 0;
}

/* Guards moved along: their addresses get new ones. They go by as many messages as it takes. */
static int install_guards(struct sn_piece *piece, struct sn_piece_report *ret)
{
	struct snapd_wire message = {.kind = SNAPD_GUARD};
	int error = 0;

	for (uint64_t page = 0; page <= piece->npages && !error; page++) {
		bool guard = page < piece->npages && piece->decisions[page] == GUARD;
		uint64_t address = piece->start + page * PAGE;
		struct snapd_run *last = message.nruns ? &message.runs[message.nruns - 1] : NULL;

		if (guard && last && last->start + last->length == address) {
			last->length += PAGE;
		} else if (guard && message.nruns < SNAPD_WIRE_RUNS) {
			message.runs[message.nruns++] = (struct snapd_run){address, PAGE};
		}
		ret->guards += guard;
		if (message.nruns && (page == piece->npages || (message.nruns == SNAPD_WIRE_RUNS &&
								 !(page + 1 < piece->npages &&
								   piece->decisions[page + 1] == GUARD)))) {
			message.kind = SNAPD_GUARD;
			error = mover_call(piece->session, &message);
			message.nruns = 0;
		}
	}
	return error;
}

static void mark(struct sn_piece *piece, uint64_t start, uint64_t bytes, enum decision decision)
{
	for (uint64_t at = start; at < start + bytes; at += PAGE) {
		uint64_t page = (at - piece->aside) / PAGE;

		if (page < piece->npages && (piece->decisions[page] == DIRTY || decision == LEFT_ASIDE))
			piece->decisions[page] = (uint8_t)decision;
	}
}

/* Sends the runs until the pass is through them; pinned pages are marked. On an error the rest counts as pinned: what
 * was not moved to the staging goes back, whatever the cause. */
static void pin_runs(struct sn_piece *piece, const struct snapd_run *runs, unsigned int nruns)
{
	struct snapd_run todo[SNAPD_WIRE_RUNS];
	unsigned int first = 0;

	memcpy(todo, runs, nruns * sizeof(runs[0]));
	while (first < nruns) {
		struct snapd_wire message = {
			.kind = SNAPD_PIN, .addr = piece->aside, .dest = piece->staging, .nruns = nruns - first};
		int error;

		memcpy(message.runs, todo + first, (nruns - first) * sizeof(todo[0]));
		message.value = 0;
		error = mover_call(piece->session, &message);
		for (unsigned int i = 0; i < message.nruns; i++)
			mark(piece, message.runs[i].start, message.runs[i].length, PINNED);
		if (error) {
			uint64_t at = message.value;

			for (; first < nruns; first++) {
				struct snapd_run *run = &todo[first];
				uint64_t end = run->start + run->length;

				if (at > run->start && at < end)
					mark(piece, at, end - at, PINNED);
				else if (at <= run->start)
					mark(piece, run->start, run->length, PINNED);
			}
			return;
		}
		if (!(message.flags & SNAPD_REPLY_MORE))
			return;
		while (first < nruns && todo[first].start + todo[first].length <= message.value)
			first++;
		if (first < nruns && message.value > todo[first].start) {
			todo[first].length -= message.value - todo[first].start;
			todo[first].start = message.value;
		}
	}
}

static void pin_pass(struct sn_piece *piece)
{
	struct snapd_run runs[SNAPD_WIRE_RUNS];
	unsigned int nruns = 0;
	uint64_t last_dirty = 0;

	for (uint64_t page = 0; page < piece->npages; page++) {
		enum decision decision = piece->decisions[page];
		uint64_t address = piece->aside + page * PAGE;
		struct snapd_run *run = nruns ? &runs[nruns - 1] : NULL;

		if (decision != DIRTY)
			continue;
		/* Guards and poison in between would fail the move; absent and clean pages do not. */
		if (run && page - last_dirty <= MERGE_GAP) {
			bool plain = true;

			for (uint64_t between = last_dirty + 1; between < page; between++)
				plain &= piece->decisions[between] == CLEAN || piece->decisions[between] == ZERO;
			if (plain) {
				run->length = address + PAGE - run->start;
				last_dirty = page;
				continue;
			}
		}
		if (nruns == SNAPD_WIRE_RUNS) {
			pin_runs(piece, runs, nruns);
			nruns = 0;
		}
		runs[nruns++] = (struct snapd_run){address, PAGE};
		last_dirty = page;
	}
	if (nruns)
		pin_runs(piece, runs, nruns);
}

/* Pinned pages return to their address, the pin with them. Where that fails they are served from the aside. */
static void return_pinned(struct sn_piece *piece, struct sn_piece_report *ret)
{
	for (uint64_t page = 0; page < piece->npages;) {
		uint64_t count = 0;

		while (page + count < piece->npages && piece->decisions[page + count] == PINNED)
			count++;
		if (count && move_back(piece->session, piece->aside + page * PAGE, piece->start + page * PAGE,
				       count * PAGE)) {
			mark(piece, piece->aside + page * PAGE, count * PAGE, LEFT_ASIDE);
			piece->keep_aside = true;
		}
		ret->pinned += count;
		page += count ? count : 1;
	}
}

/* Writes the decisions into the entries and lets faults go on. */
static void settle(struct sn_piece *piece, struct sn_piece_report *ret)
{
	struct sn_session *session = piece->session;
	_Atomic uint64_t *entries = session->pm.entries;
	uint64_t base = 0, end = piece->start + piece_bytes(piece), done;
	struct table *table;
	long segment = 0, n;

	pthread_rwlock_wrlock(&session->lock);
	for (uint64_t page = 0; page < piece->npages; page++) {
		uint64_t index = entry_of(piece, page, &segment, &base);
		uint64_t entry = entries[index] & ~ENTRY_MOVING;

		switch ((enum decision)piece->decisions[page]) {
		case KEEP: /* absent: what was filled and is not there was discarded without an event */
			if (ENTRY_STATE(entry) == ST_FILLED || ENTRY_STATE(entry) == ST_GUARD)
				entry = ST_NONE;
			break;
		case DIRTY:
		case LEFT_ASIDE:
			entry = ST_ASIDE;
			ret->aside++;
			break;
		case CLEAN:
			entry = ENTRY_WITH(entry, ST_STORED);
			ret->clean++;
			break;
		case ZERO:
			entry = ST_ZERO;
			ret->zero++;
			break;
		case GUARD:
			entry = ST_GUARD;
			break;
		case PINNED:
			entry = ST_NONE;
			break;
		}
		entry_put(session, index, entry);
	}
	/* The records of the piece say where its pages are; a page that could not go back is still in the aside. */
	table = pm_edit(&session->pm);
	n = pm_cut(table, piece->start, end, session->scratch, MAX_RECORDS);
	for (long i = 0; i < n; i++) {
		struct record record = session->scratch[i];

		for (uint64_t k = 0; k < record.npages; k += done) {
			uint64_t page = (record.start - piece->start) / PAGE + k;
			bool left = piece->decisions[page] == LEFT_ASIDE;

			done = 1;
			while (k + done < record.npages && (piece->decisions[page + done] == LEFT_ASIDE) == left)
				done++;
			pm_insert(table, (struct record){record.start + k * PAGE, done, record.first + k,
							 (left ? piece->aside : piece->staging) + page * PAGE});
		}
	}
	base = 0;
	for (long i = 0; i < piece->nsegments; i++) {
		piece->segments[i].staging = piece->staging + base * PAGE;
		base += piece->segments[i].npages;
	}
	pm_commit(&session->pm, pm_applied(&session->pm));
	session->in_stop = false;
	piece_set_phase(piece, PHASE_STORE);
	pthread_rwlock_unlock(&session->lock);
}

/* Everything between the stop's two ends. Returns an outcome; the piece is either moved whole or as it was. */
static int inside_stop(struct sn_piece *piece, const struct files *files, struct sn_piece_report *ret)
{
	struct snapd_procmap_query vma;
	int outcome = recheck(piece, files, &vma);

	if (outcome == SN_MOVED)
		outcome = watch(piece, files, &vma, &ret->cause);
	if (outcome != SN_MOVED)
		return outcome;
	ret->cause = claim(piece);
	if (ret->cause)
		return ret->cause == -EBUSY ? SN_BUSY : SN_NO_ROOM;
	outcome = move(piece, &ret->cause);
	if (outcome != SN_MOVED) {
		unclaim(piece);
		return outcome;
	}
	ret->cause = look(piece, files, ret);
	if (ret->cause) { /* not to be known: back as it was */
		if (move_back(piece->session, piece->aside, piece->start, piece_bytes(piece)) == 0)
			piece->aside = 0;
		unclaim(piece);
		return ret->cause == -ESRCH ? SN_GONE : SN_FAILED;
	}
	ret->cause = install_guards(piece, ret);
	pin_pass(piece);
	return_pinned(piece, ret);
	settle(piece, ret);
	return SN_MOVED;
}

static void move_piece(struct sn_piece *piece, struct sn_piece_report *ret)
{
	struct sn_session *session = piece->session;
	struct snapd_run staging;
	struct files files = {-1, -1};
	uint64_t began;
	int error;

	error = open_files(atomic_load(&session->pid), &files);
	if (!error)
		error = stage(piece);
	if (error) {
		ret->cause = error;
		ret->outcome = error == -ENOMEM ? SN_NO_ROOM
			       : error == -EPIPE || error == -ESRCH || error == -ENOENT ? SN_GONE : SN_FAILED;
	} else {
		pack_pause();
		began = now_ns();
		ret->outcome = stop_begin(piece->session->stop, atomic_load(&session->pid), session->agent_tids);
		ret->until_stopped_ns = now_ns() - began;
		ret->threads = stop_threads(piece->session->stop);
		if (ret->outcome == SN_MOVED)
			ret->outcome = inside_stop(piece, &files, ret);
		stop_end(piece->session->stop);
		ret->stop_ns = now_ns() - began;
		pack_continue();
	}
	if (ret->outcome != SN_MOVED && piece->staging) {
		staging = (struct snapd_run){piece->staging, piece_bytes(piece)};
		mover_unmap(session, &staging, 1, 0, 0);
		piece->staging = 0;
	}
	close_files(&files);
}

struct move_job {
	struct sn_piece *piece;
	struct sn_piece_report *ret;
};

static void *move_main(void *arg)
{
	struct move_job *job = arg;

	prefer_thread(-10);
	move_piece(job->piece, job->ret);
	return NULL;
}

/* A thread of its own is the tracer: when it ends, the kernel lets go of a thread that would not stand (it sleeps in
 * vfork or on a dead disk and can't be detached) together with all others. */
int sn_piece_move(struct sn_piece *piece, struct sn_piece_report *ret)
{
	struct move_job job = {piece, ret};
	struct sn_session *session = piece->session;
	pthread_t thread;
	int error;

	memset(ret, 0, sizeof(*ret));
	pthread_mutex_lock(&session->mover);
	error = session_stop(session) ? pthread_create(&thread, NULL, move_main, &job) : ENOMEM;
	if (error) {
		ret->outcome = SN_FAILED;
		ret->cause = -error;
	} else {
		pthread_join(thread, NULL);
	}
	pthread_mutex_unlock(&session->mover);
	return ret->outcome == SN_MOVED ? 0 : -EAGAIN;
}
