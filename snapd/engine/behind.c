/* Behind the writer: the page cache forgets frames that are on the disk, so that a dump frees memory and does not move
 * it from the program to the cache.
 *
 * Owns how far that has come in a store, and whether the disk took what it was given. The kernel counts a page that the
 * disk refused as clean, and says so once, to whoever waits for the file next: from then on nothing of the store is
 * forgotten any more, since the cache may have the only copy, and nothing more is stored. Knows no frames.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>

#define WRITERS_SEGMENTS 2 /* packing threads may still write to these */
#define DISK_SEGMENTS 16   /* the disk has so long to write what it was given */

/* Moves a mark up to a place; each segment in between is one caller's. */
static bool advance(_Atomic uint64_t *mark, uint64_t upto, uint64_t *ret)
{
	*ret = atomic_load(mark);
	while (*ret < upto)
		if (atomic_compare_exchange_weak(mark, ret, *ret + 1))
			return true;
	return false;
}

static int write_back(int fd, uint64_t from, uint64_t bytes)
{
	int error = FAULT_ERROR(FP_WRITE_BACK);

	if (!error && sync_file_range(fd, (off_t)from, (off_t)bytes, SYNC_FILE_RANGE_WAIT_BEFORE |
				      SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER))
		error = -errno;
	return error;
}

/* The next one waits until this one's error is noted: it would not be told of it. */
static void forget_segment(struct sn_store *store, uint64_t i)
{
	pthread_mutex_lock(&store->forgetting);
	if (write_back(store->fd, i << SEGMENT_SHIFT, SEGMENT_BYTES))
		atomic_store(&store->distrusted, true);
	if (!atomic_load(&store->distrusted))
		posix_fadvise(store->fd, (off_t)(i << SEGMENT_SHIFT), SEGMENT_BYTES, POSIX_FADV_DONTNEED);
	pthread_mutex_unlock(&store->forgetting);
}

int behind_wrote(struct sn_store *store)
{
	uint64_t now = atomic_load(&store->tail) >> SEGMENT_SHIFT, i;

	if (atomic_load(&store->distrusted))
		return -EIO;
	if (atomic_load(&store->keep_cached))
		return 0;
	while (advance(&store->begun, now > WRITERS_SEGMENTS ? now - WRITERS_SEGMENTS : 0, &i))
		sync_file_range(store->fd, (off_t)(i << SEGMENT_SHIFT), SEGMENT_BYTES, SYNC_FILE_RANGE_WRITE);
	while (advance(&store->forgotten, now > DISK_SEGMENTS ? now - DISK_SEGMENTS : 0, &i))
		forget_segment(store, i);
	return atomic_load(&store->distrusted) ? -EIO : 0;
}

void sn_store_distrust(struct sn_store *store)
{
	atomic_store(&store->distrusted, true);
}

void sn_store_keep_cached(struct sn_store *store, int keep)
{
	atomic_store(&store->keep_cached, keep);
}

int sn_store_behind(struct sn_store *store, uint64_t *ret_from, uint64_t *ret_to)
{
	uint64_t tail = atomic_load(&store->tail), to = tail >> SEGMENT_SHIFT;

	if (atomic_load(&store->keep_cached) || atomic_load(&store->distrusted))
		return 0;
	*ret_from = min_u64(atomic_load(&store->forgotten), to) << SEGMENT_SHIFT;
	*ret_to = tail;
	/* The last segment goes on growing. */
	atomic_store(&store->forgotten, to);
	atomic_store(&store->begun, to);
	return 1;
}

int sn_forget_cached(int fd, uint64_t from, uint64_t to)
{
	int error = write_back(fd, from, to - from);

	if (error)
		return error;
	return -posix_fadvise(fd, (off_t)from, (off_t)(to - from), POSIX_FADV_DONTNEED);
}
