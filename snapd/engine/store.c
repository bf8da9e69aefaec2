/* A store: an append-only file of frames, shared by a session and its forked children.
 *
 * Owns the tail and how many page-map entries refer to each segment of 1 MiB; a segment without any is given back to
 * the file system. It parses nothing: offsets and lengths come from entries.
 */
#include "internal.h"
#include "keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/statvfs.h>
#include <unistd.h>

void store_name(struct sn_store *store, const unsigned char *id)
{
	memcpy(store->id, id, sizeof(store->id));
	store->id_crc = frame_crc(0, id, sizeof(store->id));
}

/* What a former daemon has written is counted by segment; what it gave back is a hole. */
static void count_written(struct sn_store *store, uint64_t end)
{
	for (uint64_t at = HEADER_BYTES; at < end;) {
		off_t from = lseek(store->fd, (off_t)at, SEEK_DATA), to;

		if (from < 0)
			break;
		to = lseek(store->fd, from, SEEK_HOLE);
		if (to < 0)
			to = (off_t)end;
		for (at = (uint64_t)from; at < (uint64_t)to; at = (at | (SEGMENT_BYTES - 1)) + 1)
			if (at >> SEGMENT_SHIFT < MAX_SEGMENTS)
				store->written[at >> SEGMENT_SHIFT] +=
					(uint32_t)(min_u64((uint64_t)to, (at | (SEGMENT_BYTES - 1)) + 1) - at);
	}
}

struct sn_store *sn_store_open(int fd, const unsigned char *id, uint64_t tail, uint64_t limit, uint32_t number)
{
	struct sn_store *store = calloc(1, sizeof(*store));

	if (!store)
		return NULL;
	store->live = calloc(MAX_SEGMENTS, sizeof(*store->live));
	store->written = calloc(MAX_SEGMENTS, sizeof(*store->written));
	if (!store->live || !store->written) {
		free((void *)store->live);
		free((void *)store->written);
		free(store);
		return NULL;
	}
	store->fd = fd;
	store->number = number ? number : keeper_number();
	if (sn_hand_over(KEEP_STORE, store->number, fd)) {
		free((void *)store->live);
		free((void *)store->written);
		free(store);
		return NULL;
	}
	store_name(store, id);
	atomic_store(&store->references, 1);
	atomic_store(&store->tail, tail);
	atomic_store(&store->end, (tail + SEGMENT_BYTES - 1) >> SEGMENT_SHIFT);
	atomic_store(&store->begun, tail >> SEGMENT_SHIFT);
	atomic_store(&store->forgotten, tail >> SEGMENT_SHIFT);
	store->limit = limit ? min_u64(limit, MAX_SEGMENTS) : MAX_SEGMENTS;
	count_written(store, tail);
	pthread_mutex_init(&store->lock, NULL);
	pthread_mutex_init(&store->forgetting, NULL);
	return store;
}

void sn_store_release(struct sn_store *store)
{
	if (atomic_fetch_sub(&store->references, 1) != 1)
		return;
	sn_withhold(KEEP_STORE, store->number);
	close(store->fd); /* unnamed: the last close frees its blocks */
	pthread_mutex_destroy(&store->lock);
	pthread_mutex_destroy(&store->forgetting);
	free((void *)store->live);
	free((void *)store->written);
	free(store);
}

/* What an entry says is in shared memory: nothing outside is written to for it. */
static bool is_in(uint64_t offset)
{
	return offset >> SEGMENT_SHIFT < MAX_SEGMENTS;
}

void store_hold(struct sn_store *store, uint64_t offset, uint64_t bytes)
{
	if (is_in(offset))
		atomic_fetch_add_explicit(&store->live[offset >> SEGMENT_SHIFT], bytes, memory_order_relaxed);
}

void store_unhold(struct sn_store *store, uint64_t offset, uint64_t bytes)
{
	if (is_in(offset))
		atomic_fetch_sub_explicit(&store->live[offset >> SEGMENT_SHIFT], bytes, memory_order_release);
}

void sn_store_set_floor(struct sn_store *store, uint64_t free_bytes)
{
	atomic_store(&store->floor, free_bytes);
}

/* Looked at once a segment: what others on the file system need stays theirs. */
static bool below_floor(struct sn_store *store)
{
	uint64_t floor = atomic_load(&store->floor);
	struct statvfs there;

	return floor && fstatvfs(store->fd, &there) == 0 && (uint64_t)there.f_bavail * there.f_frsize < floor;
}

static bool is_free(const struct sn_store *store, uint64_t segment)
{
	return !atomic_load_explicit(&store->live[segment], memory_order_acquire) && !store->written[segment];
}

/* For whoever holds the lock: the offset of a segment to begin. A store that has had all its segments begun uses those
 * again that were given back: whoever read one of them before has to look again. */
static int next_segment(struct sn_store *store, uint64_t *ret_offset)
{
	if (store->end < store->limit) {
		*ret_offset = store->end++ << SEGMENT_SHIFT;
		return 0;
	}
	for (uint64_t i = 1; i < store->limit; i++)
		if (is_free(store, i)) {
			atomic_fetch_add(&store->reused, 1);
			*ret_offset = i << SEGMENT_SHIFT;
			return 0;
		}
	return -EFBIG;
}

/* The room is held, so that no segment of it is given back before its entries are published: the caller unholds. */
int store_reserve(struct sn_store *store, uint64_t bytes, bool keep_floor, uint64_t *ret_offset)
{
	int error = FAULT_ERROR(FP_RESERVE);

	if (error)
		return error;
	pthread_mutex_lock(&store->lock);
	*ret_offset = atomic_load(&store->tail);
	/* No frame crosses a segment: what a segment holds lives and dies with it. The gap takes no blocks. */
	if (*ret_offset % SEGMENT_BYTES == 0 || *ret_offset % SEGMENT_BYTES + bytes > SEGMENT_BYTES)
		error = keep_floor && below_floor(store) ? -ENOSPC : next_segment(store, ret_offset);
	if (!error) {
		store_hold(store, *ret_offset, bytes);
		store->written[*ret_offset >> SEGMENT_SHIFT] += (uint32_t)bytes;
		/* A full segment's end is no place: the next one may be another's. */
		atomic_store(&store->tail, *ret_offset + bytes);
	}
	pthread_mutex_unlock(&store->lock);
	return error;
}

int store_write(struct sn_store *store, const void *frames, uint64_t bytes, uint64_t offset)
{
	uint64_t done = 0;

	while (done < bytes) {
		int fault = FAULT_ERROR(FP_FRAMES_WRITE);
		size_t some = fault == FAULT_SHORT ? (bytes - done + 1) / 2 : bytes - done;
		ssize_t n;

		if (fault < 0)
			return fault;
		n = pwrite(store->fd, (const char *)frames + done, some, (off_t)(offset + done));
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		done += (uint64_t)n;
	}
	return 0;
}

void sn_store_stats(struct sn_store *store, struct sn_store_stats *ret)
{
	uint64_t end = atomic_load(&store->end);

	*ret = (struct sn_store_stats){.tail = atomic_load(&store->tail),
				       .trimmed_bytes = atomic_load(&store->trimmed_bytes)};
	for (uint64_t i = 0; i < end; i++) {
		ret->live_bytes += atomic_load_explicit(&store->live[i], memory_order_relaxed);
		ret->written_bytes += atomic_load_explicit(&store->written[i], memory_order_relaxed);
	}
}

/* For whoever holds the lock, so that the segment is not begun anew meanwhile. */
static int punch(struct sn_store *store, uint64_t segment)
{
	uint64_t from = segment ? segment << SEGMENT_SHIFT : HEADER_BYTES; /* the first one begins with the header */
	uint64_t to = (segment + 1) << SEGMENT_SHIFT;

	int error = FAULT_ERROR(FP_PUNCH);

	if (error)
		return error;
	if (fallocate(store->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)from, (off_t)(to - from)))
		return -errno;
	FAULT_POINT(FP_PUNCHED);
	atomic_fetch_add(&store->trimmed_bytes, store->written[segment]);
	store->written[segment] = 0;
	return 0;
}

int sn_store_trim(struct sn_store *store)
{
	uint64_t end = atomic_load(&store->end);
	int error = 0;

	/* A segment gains no references once it has none: frames are only appended, and a fork copies references that
	 * exist. What is reserved is referred to. */
	for (uint64_t i = 0; i < end && !error; i++) {
		if (atomic_load_explicit(&store->live[i], memory_order_acquire) || !store->written[i])
			continue;
		pthread_mutex_lock(&store->lock);
		if (!atomic_load_explicit(&store->live[i], memory_order_acquire)) {
			if (atomic_load(&store->tail) >> SEGMENT_SHIFT == i) /* also the one that is being filled */
				atomic_store(&store->tail, (i + 1) << SEGMENT_SHIFT);
			error = punch(store, i);
		}
		pthread_mutex_unlock(&store->lock);
	}
	return error;
}
