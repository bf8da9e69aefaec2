/* Behind the writer: the page cache forgets frames that are on the disk, so that a dump frees memory and does not move
 * it from the program to the cache.
 *
 * Owns how far that has come in a store. What is not written yet stays in the cache: nothing depends on it being
 * forgotten. Knows no frames.
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

void behind_wrote(struct sn_store *store)
{
	uint64_t now = atomic_load(&store->tail) >> SEGMENT_SHIFT, i;

	if (atomic_load(&store->keep_cached))
		return;
	while (advance(&store->begun, now > WRITERS_SEGMENTS ? now - WRITERS_SEGMENTS : 0, &i))
		sync_file_range(store->fd, (off_t)(i << SEGMENT_SHIFT), SEGMENT_BYTES, SYNC_FILE_RANGE_WRITE);
	while (advance(&store->forgotten, now > DISK_SEGMENTS ? now - DISK_SEGMENTS : 0, &i))
		posix_fadvise(store->fd, (off_t)(i << SEGMENT_SHIFT), SEGMENT_BYTES, POSIX_FADV_DONTNEED);
}

void sn_store_keep_cached(struct sn_store *store, int keep)
{
	atomic_store(&store->keep_cached, keep);
}

int sn_store_behind(struct sn_store *store, uint64_t *ret_from, uint64_t *ret_to)
{
	uint64_t tail = atomic_load(&store->tail), to = tail >> SEGMENT_SHIFT;

	if (atomic_load(&store->keep_cached))
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
	if (sync_file_range(fd, (off_t)from, (off_t)(to - from),
			    SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER))
		return -errno;
	return -posix_fadvise(fd, (off_t)from, (off_t)(to - from), POSIX_FADV_DONTNEED);
}
