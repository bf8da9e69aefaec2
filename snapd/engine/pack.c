/* Packing threads: read moved pages, compress each to a frame, append, publish.
 *
 * They run beside the program at low priority. A page that was filled, discarded or unmapped meanwhile keeps its newer
 * state: the entry changes from ASIDE to STORED by compare-and-swap only. Knows nothing of stops or the agent.
 */
#include "internal.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define BATCH_PAGES 248 /* the frames of a batch, all raw, fit a segment */
#define MAX_JOBS 65536
#define MAX_PACKERS 64
#define READ_TRIES 20
#define ROOM_NS 20000000
#define READING_NS 5000000ULL /* a stop waits so long for a read that was begun */

_Static_assert(BATCH_PAGES * FRAME_MAX <= SEGMENT_BYTES, "a batch fits a segment");

struct job {
	struct sn_piece *piece;
	uint64_t first, npages, staging, base;
};

static struct {
	pthread_mutex_t lock;
	pthread_cond_t ready, room;
	struct job jobs[MAX_JOBS];
	unsigned int head, count;
} queue = {.lock = PTHREAD_MUTEX_INITIALIZER, .ready = PTHREAD_COND_INITIALIZER, .room = PTHREAD_COND_INITIALIZER};

struct batch {
	uint64_t index[BATCH_PAGES], page[BATCH_PAGES]; /* the entry, and which page of the piece it is */
	uint32_t bytes[BATCH_PAGES];
	int n;
	uint64_t used;
	unsigned char *frames, *pages;
};

static unsigned int stops; /* futex: how many stops are under way */

/* A target stands and waits for a CPU to be stopped on, moved by and let go: packing makes room meanwhile. */
void pack_pause(void)
{
	__atomic_fetch_add(&stops, 1, __ATOMIC_SEQ_CST);
}

void pack_continue(void)
{
	if (__atomic_sub_fetch(&stops, 1, __ATOMIC_SEQ_CST) == 0)
		syscall(SYS_futex, &stops, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

/* A packer that loses its CPU while it reads keeps the lock of the target's memory, which the mover and the kernel's
 * look want in the stop: what it has begun ends before the target stands. */
void pack_wait(struct sn_session *session)
{
	const struct timespec pause = {.tv_nsec = 100000};

	for (uint64_t until = now_ns() + READING_NS; atomic_load(&session->reading) && now_ns() < until;)
		nanosleep(&pause, NULL);
}

/* A target that does not let go holds nobody else up. */
static void make_room(void)
{
	const struct timespec limit = {.tv_nsec = ROOM_NS};
	unsigned int n = __atomic_load_n(&stops, __ATOMIC_SEQ_CST);

	for (uint64_t until = n ? now_ns() + ROOM_NS : 0; n && now_ns() < until;
	     n = __atomic_load_n(&stops, __ATOMIC_SEQ_CST))
		syscall(SYS_futex, &stops, FUTEX_WAIT_PRIVATE, n, &limit, NULL, 0);
}

/* Not while a target stands; when one does not let go, all the same. */
static long read_between_stops(struct sn_session *session, uint64_t from, void *to, uint64_t bytes)
{
	long n;

	make_room();
	atomic_fetch_add(&session->reading, 1);
	if (__atomic_load_n(&stops, __ATOMIC_SEQ_CST)) { /* it may not have seen us */
		atomic_fetch_sub(&session->reading, 1);
		make_room();
		atomic_fetch_add(&session->reading, 1);
	}
	n = memory_read(session, from, to, bytes);
	atomic_fetch_sub(&session->reading, 1);
	return n;
}

static bool is_zero(const unsigned char *page)
{
	const uint64_t *words = (const uint64_t *)page;
	uint64_t any = 0;

	for (unsigned int i = 0; i < PAGE / 8; i += 8) {
		any |= words[i] | words[i + 1] | words[i + 2] | words[i + 3] | words[i + 4] | words[i + 5] |
		       words[i + 6] | words[i + 7];
		if (any)
			return false;
	}
	return true;
}

static bool publish(struct sn_session *session, uint64_t index, uint64_t entry)
{
	uint64_t old = ST_ASIDE;

	return atomic_compare_exchange_strong(&session->pm.entries[index], &old, entry);
}

static int write_batch(struct sn_piece *piece, struct batch *batch, struct sn_pack_report *report)
{
	struct sn_session *session = piece->session;
	struct sn_store *store = session->store;
	uint64_t offset, at;
	int error;

	if (!batch->n)
		return 0;
	error = store_reserve(store, batch->used, true, &offset);
	if (error)
		return error;
	at = 0;
	for (int i = 0; i < batch->n; i++) {
		frame_seal(store, offset + at, batch->frames + at);
		at += batch->bytes[i];
	}
	error = store_write(store, batch->frames, batch->used, offset);
	FAULT_POINT(FP_FRAMES_WRITTEN);
	at = offset;
	for (int i = 0; i < batch->n && !error; i++) {
		uint64_t entry = ENTRY_MAKE(ST_STORED, at, batch->bytes[i]);

		if (piece->kept) {
			store_hold_entry(store, entry);
			piece->kept[batch->page[i]] = entry;
		}
		store_hold_entry(store, entry);
		FAULT_POINT(FP_PUBLISHING);
		if (publish(session, batch->index[i], entry)) {
			report->stored_pages++;
			report->stored_bytes += batch->bytes[i];
		} else {
			store_unhold_entry(store, entry);
			report->lost_races++;
		}
		at += batch->bytes[i];
	}
	store_unhold(store, offset, batch->used);
	return error ? error : behind_wrote(store);
}

/* A page that can't be read is zeros when it was freed lazily and taken by the kernel. Otherwise its memory or the swap
 * that it is in may be there again in a moment. */
static int read_hard_page(struct sn_session *session, uint64_t from, void *page)
{
	for (int tries = 0; tries < READ_TRIES; tries++) {
		long n = read_between_stops(session, from, page, PAGE);

		if (n == (long)PAGE || n == -ESRCH)
			return n < 0 ? (int)n : 0;
		if (memory_is_freed(session, from)) {
			memset(page, 0, PAGE);
			return 0;
		}
		usleep(10000);
	}
	return -EIO;
}

/* Reads the batch's pages from the staging, neighbours at once. */
static int read_batch(const struct job *job, struct batch *batch)
{
	struct sn_session *session = job->piece->session;
	int upto, error = 0;

	for (int i = 0; i < batch->n && !error; i = upto) {
		uint64_t from = job->staging + (batch->page[i] - job->base) * PAGE;
		unsigned char *to = batch->pages + (uint64_t)i * PAGE;
		long n;

		for (upto = i + 1; upto < batch->n && batch->page[upto] == batch->page[upto - 1] + 1; upto++)
			;
		n = read_between_stops(session, from, to, (uint64_t)(upto - i) * PAGE);
		if (n < (long)PAGE)
			error = n == -ESRCH ? -ESRCH : read_hard_page(session, from, to);
		upto = i + (int)max_u64(n > 0 ? (uint64_t)n / PAGE : 0, 1);
	}
	return error;
}

static int pack_job(const struct job *job, struct frame_packer *packer, struct batch *batch,
	struct sn_pack_report *report)
{
	struct sn_session *session = job->piece->session;
	int kept = 0, error;

	if (memory_is_ending(session)) /* what is held of it is in nobody's way for longer than it must be */
		return -ESRCH;
	batch->n = 0;
	batch->used = 0;
	for (uint64_t k = 0; k < job->npages; k++) {
		/* What could not go back to its address is not in the staging, and served from where it is. A snapshot
		 * wants the page as the stop found it, also when the program has it back by now. */
		if (job->piece->decisions[job->base + k] != DIRTY ||
		    (ENTRY_STATE(session->pm.entries[job->first + k]) != ST_ASIDE && !job->piece->kept))
			continue;
		batch->page[batch->n] = job->base + k;
		batch->index[batch->n++] = job->first + k;
	}
	error = read_batch(job, batch);
	if (error)
		return error;
	FAULT_POINT(FP_PACK_READ);
	for (int i = 0; i < batch->n; i++) {
		const unsigned char *page = batch->pages + (uint64_t)i * PAGE;

		make_room();
		if (is_zero(page)) {
			if (publish(session, batch->index[i], ST_ZERO))
				report->zero_pages++;
			if (job->piece->kept)
				job->piece->kept[batch->page[i]] = ST_ZERO;
			continue;
		}
		batch->bytes[kept] = frame_pack(packer, job->piece->level, page, batch->frames + batch->used);
		batch->used += batch->bytes[kept];
		batch->page[kept] = batch->page[i];
		batch->index[kept++] = batch->index[i];
	}
	batch->n = kept;
	return write_batch(job->piece, batch, report);
}

static void *pack_main(void *unused)
{
	struct frame_packer *packer = frame_packer_create();
	struct batch batch = {.n = 0};

	(void)unused;
	setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), 10);
	batch.pages = mmap(NULL, BATCH_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	batch.frames = mmap(NULL, BATCH_PAGES * FRAME_MAX + PAGE, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!packer || batch.pages == MAP_FAILED || batch.frames == MAP_FAILED) {
		notify(&(struct sn_notice){.kind = SN_NOTICE_TROUBLE, .cause = ENOMEM});
		return NULL;
	}
	for (;;) {
		struct sn_pack_report report = {0};
		struct job job;
		bool failed;
		int error;

		pthread_mutex_lock(&queue.lock);
		while (!queue.count)
			pthread_cond_wait(&queue.ready, &queue.lock);
		job = queue.jobs[queue.head];
		queue.head = (queue.head + 1) % MAX_JOBS;
		queue.count--;
		pthread_cond_signal(&queue.room);
		pthread_mutex_unlock(&queue.lock);

		pthread_mutex_lock(&job.piece->lock);
		failed = job.piece->cause != 0;
		pthread_mutex_unlock(&job.piece->lock);
		error = failed ? 0 : pack_job(&job, packer, &batch, &report);
		pthread_mutex_lock(&job.piece->lock);
		if (error && !job.piece->cause)
			job.piece->cause = error;
		job.piece->packed.stored_pages += report.stored_pages;
		job.piece->packed.stored_bytes += report.stored_bytes;
		job.piece->packed.zero_pages += report.zero_pages;
		job.piece->packed.lost_races += report.lost_races;
		if (--job.piece->jobs_left == 0)
			pthread_cond_signal(&job.piece->done);
		pthread_mutex_unlock(&job.piece->lock);
	}
	return NULL;
}

int pack_start(int nthreads)
{
	for (int i = 0; i < nthreads && i < MAX_PACKERS; i++) {
		pthread_attr_t attributes;
		pthread_t thread;
		int error;

		pthread_attr_init(&attributes);
		pthread_attr_setstacksize(&attributes, 128 << 10);
		pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
		error = pthread_create(&thread, &attributes, pack_main, NULL);
		pthread_attr_destroy(&attributes);
		if (error)
			return -error;
	}
	return 0;
}

static void enqueue(struct job job)
{
	pthread_mutex_lock(&job.piece->lock);
	job.piece->jobs_left++;
	pthread_mutex_unlock(&job.piece->lock);
	pthread_mutex_lock(&queue.lock);
	while (queue.count == MAX_JOBS)
		pthread_cond_wait(&queue.room, &queue.lock);
	queue.jobs[(queue.head + queue.count++) % MAX_JOBS] = job;
	pthread_cond_signal(&queue.ready);
	pthread_mutex_unlock(&queue.lock);
}

int sn_piece_pack(struct sn_piece *piece, int level)
{
	piece->level = level;
	for (long i = 0; i < piece->nsegments; i++) {
		const struct segment *segment = &piece->segments[i];

		for (uint64_t k = 0; k < segment->npages; k += BATCH_PAGES)
			enqueue((struct job){piece, segment->first + k, min_u64(BATCH_PAGES, segment->npages - k),
					     segment->staging + k * PAGE, segment->base + k});
	}
	return 0;
}

int sn_piece_wait(struct sn_piece *piece, struct sn_pack_report *ret)
{
	pthread_mutex_lock(&piece->lock);
	while (piece->jobs_left)
		pthread_cond_wait(&piece->done, &piece->lock);
	*ret = piece->packed;
	ret->cause = piece->cause;
	pthread_mutex_unlock(&piece->lock);
	return piece->cause;
}
