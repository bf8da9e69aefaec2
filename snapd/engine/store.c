/* A store: an append-only file of frames, shared by a session and its forked children.
 *
 * Owns the tail and how many page-map entries refer to each segment of 1 MiB; a segment without any is given back to
 * the file system. It parses nothing: offsets and lengths come from entries.
 */
#include "internal.h"

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

struct sn_store *sn_store_open(int fd, const unsigned char *id, uint64_t tail)
{
	struct sn_store *store = calloc(1, sizeof(*store));

	if (!store)
		return NULL;
	store->live = calloc(MAX_SEGMENTS, sizeof(*store->live));
	store->trimmed = calloc(MAX_SEGMENTS / 8, 1);
	if (!store->live || !store->trimmed) {
		free((void *)store->live);
		free(store->trimmed);
		free(store);
		return NULL;
	}
	store->fd = fd;
	store_name(store, id);
	atomic_store(&store->references, 1);
	atomic_store(&store->tail, tail);
	pthread_mutex_init(&store->lock, NULL);
	return store;
}

void sn_store_release(struct sn_store *store)
{
	if (atomic_fetch_sub(&store->references, 1) != 1)
		return;
	close(store->fd); /* unnamed: the last close frees its blocks */
	pthread_mutex_destroy(&store->lock);
	free((void *)store->live);
	free(store->trimmed);
	free(store);
}

void store_hold(struct sn_store *store, uint64_t offset)
{
	atomic_fetch_add_explicit(&store->live[offset >> SEGMENT_SHIFT], 1, memory_order_relaxed);
}

void store_unhold(struct sn_store *store, uint64_t offset)
{
	atomic_fetch_sub_explicit(&store->live[offset >> SEGMENT_SHIFT], 1, memory_order_release);
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

/* The room is held, so that no segment of it is given back before its entries are published: the caller unholds. */
int store_reserve(struct sn_store *store, uint64_t bytes, uint64_t *ret_offset)
{
	int error = 0;

	pthread_mutex_lock(&store->lock);
	*ret_offset = atomic_load(&store->tail);
	/* No frame crosses a segment: what a segment holds lives and dies with it. The gap takes no blocks. */
	if (*ret_offset % SEGMENT_BYTES + bytes > SEGMENT_BYTES)
		*ret_offset = (*ret_offset + SEGMENT_BYTES - 1) & ~(SEGMENT_BYTES - 1);
	if (*ret_offset + bytes > MAX_SEGMENTS << SEGMENT_SHIFT) {
		error = -EFBIG;
	} else if (*ret_offset % SEGMENT_BYTES == 0 && below_floor(store)) {
		error = -ENOSPC;
	} else {
		store_hold(store, *ret_offset);
		atomic_store(&store->tail, *ret_offset + bytes);
	}
	pthread_mutex_unlock(&store->lock);
	return error;
}

int store_write(struct sn_store *store, const void *frames, uint64_t bytes, uint64_t offset)
{
	uint64_t done = 0;

	while (done < bytes) {
		ssize_t n = pwrite(store->fd, (const char *)frames + done, bytes - done, (off_t)(offset + done));

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
	uint64_t tail = atomic_load(&store->tail);

	*ret = (struct sn_store_stats){.tail = tail, .trimmed_bytes = atomic_load(&store->trimmed_bytes)};
	for (uint64_t i = 0; i < tail >> SEGMENT_SHIFT; i++) {
		uint32_t live = atomic_load_explicit(&store->live[i], memory_order_relaxed);

		ret->live_frames += live;
		ret->dead_segments += !live;
	}
}

static int punch(struct sn_store *store, uint64_t segment)
{
	uint64_t from = segment ? segment << SEGMENT_SHIFT : HEADER_BYTES; /* the first one begins with the header */
	uint64_t to = (segment + 1) << SEGMENT_SHIFT;

	if (fallocate(store->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)from, (off_t)(to - from)))
		return -errno;
	store->trimmed[segment / 8] |= (uint8_t)(1 << (segment % 8));
	atomic_fetch_add(&store->trimmed_bytes, to - from);
	return 0;
}

static bool is_dead(const struct sn_store *store, uint64_t segment)
{
	return !atomic_load_explicit(&store->live[segment], memory_order_acquire) &&
	       !(store->trimmed[segment / 8] & (1 << (segment % 8)));
}

int sn_store_trim(struct sn_store *store)
{
	uint64_t last;
	int error = 0;

	/* The segment that is being filled: when nobody needs it any more it is left behind like the others. */
	pthread_mutex_lock(&store->lock);
	last = atomic_load(&store->tail) >> SEGMENT_SHIFT;
	if (atomic_load(&store->tail) > HEADER_BYTES && is_dead(store, last))
		atomic_store(&store->tail, ++last << SEGMENT_SHIFT);
	pthread_mutex_unlock(&store->lock);
	/* A segment below the tail gains no references once it has none: frames are only appended, and a fork copies
	 * references that exist. */
	for (uint64_t i = 0; i < last && !error; i++)
		if (is_dead(store, i))
			error = punch(store, i);
	return error;
}
