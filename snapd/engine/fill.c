/* Fills: the answer to a missing page, from the aside, from the store, or zeros.
 *
 * A fill looks the page up and decodes it without the lock, then holds the lock shared to look again and COPY: an event
 * applied in between changes the entry, and the fill starts anew. No GIL, no allocation, no wait for Python or the
 * agent. */
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_TROUBLES 10
#define LATER_NS 30000ULL
#define LATEST_NS 2000000ULL
#define MEMORY_NS 10000000ULL
#define TROUBLE_NS 50000000ULL
#define CUT_NS 1000000ULL /* the agent has to come again first */

struct place {
	bool known, recorded, not_now, handed;
	uint64_t index, entry, aside, reused;
};

int filler_init(struct filler *filler)
{
	filler->frame = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (filler->frame == MAP_FAILED)
		return -errno;
	filler->page = filler->frame + 3 * PAGE;
	filler->opener = frame_opener_create();
	if (!filler->opener) {
		munmap(filler->frame, 4 * PAGE);
		return -ENOMEM;
	}
	return 0;
}

void filler_deinit(struct filler *filler)
{
	frame_opener_destroy(filler->opener);
	munmap(filler->frame, 4 * PAGE);
}

/* For whoever holds the lock, shared or not. */
static struct place look_up(struct sn_session *session, uint64_t address)
{
	const struct table *table = pm_table(&session->pm);
	long i = pm_find(table, address);
	struct place place = {.known = i >= 0 && table->records[i].first != NO_ENTRIES,
			      .recorded = i >= 0,
			      .reused = atomic_load(&session->store->reused)};

	if (place.known) {
		const struct record *record = &table->records[i];
		uint64_t k = (address - record->start) / PAGE;

		place.index = record->first + k;
		place.entry = session->pm.entries[place.index];
		place.aside = record->aside ? record->aside + k * PAGE : 0;
	}
	/* In a stop: the entry is decided at its end, and until the asides were looked at a page that came into one of
	 * them would pass for what the program had there. In a forked child: its copy is on the way. After a takeover:
	 * the target's memory is not open yet. */
	place.handed = session->cut && session->handing && place.known && place.entry & ENTRY_MOVING && place.aside;
	place.not_now = session->unseen || (place.known && (place.entry & ENTRY_MOVING ||
		(ENTRY_STATE(place.entry) == ST_ASIDE && (session->source || atomic_load(&session->mem_fd) < 0))));
	return place;
}

/* The same frame, unless its segment was given back and is used again: then the same entry may mean other bytes. */
static bool same_place(const struct place *a, const struct place *b)
{
	return a->known == b->known && !b->not_now &&
	       (!a->known || (a->index == b->index && a->entry == b->entry && a->aside == b->aside &&
			      a->reused == b->reused));
}

/* After a COPY: the page is present. Others may have changed the entry under the shared lock: a packing thread may
 * have published the frame of what was just copied. */
static void now_present(struct sn_session *session, const struct place *place)
{
	uint64_t old = place->entry, new;

	do {
		new = entry_has_frame(old) ? ENTRY_WITH(old, ST_FILLED) : ST_NONE;
	} while (!atomic_compare_exchange_weak(&session->pm.entries[place->index], &old, new));
	if (ENTRY_STATE(place->entry) == ST_STORED)
		COUNT(session, filled_stored);
	else
		COUNT(session, filled_aside);
}

static enum frame_error load_frame(struct sn_session *session, struct filler *filler, uint64_t entry, bool nowait)
{
	struct iovec iov = {filler->frame, ENTRY_BYTES(entry)};
	off_t offset = (off_t)ENTRY_OFFSET(entry);
	int fault = FAULT_ERROR(FP_FRAME_READ);
	ssize_t n;

	if (iov.iov_len < FRAME_HEADER || iov.iov_len > FRAME_MAX)
		return FRAME_BAD_ENTRY;
	do {
		n = preadv2(session->store->fd, &iov, 1, offset, nowait ? RWF_NOWAIT : 0);
		if (n < 0 && nowait && errno == EOPNOTSUPP) /* a file system that never says: take the wait */
			n = preadv2(session->store->fd, &iov, 1, offset, nowait = false);
	} while (n < 0 && errno == EINTR);
	if (fault) {
		errno = -fault;
		n = fault < 0 ? -1 : n / 2;
		nowait = false;
	}
	if (nowait && (n < 0 || (size_t)n < iov.iov_len))
		return FRAME_WOULD_BLOCK;
	if (n < 0)
		return errno == ENOMEM || errno == EAGAIN ? FRAME_NO_MEMORY : FRAME_NOT_READ;
	if (n != (ssize_t)iov.iov_len)
		return FRAME_BAD_READ;
	return frame_open(filler->opener, session->store, (uint64_t)offset, filler->frame, iov.iov_len, filler->page);
}

static enum fill_result result_of(struct sn_session *session, uint64_t address, enum uffd_result result)
{
	switch (result) {
	case UFFD_DONE:
		return FILL_DONE;
	case UFFD_EXISTS: /* somebody was first */
	case UFFD_UNMAPPED:
		uffd_wake(session->uffd, address, PAGE);
		return FILL_DONE;
	case UFFD_AGAIN:
		return FILL_LATER;
	case UFFD_NO_MEMORY:
		return FILL_NO_MEMORY;
	case UFFD_GONE:
		return FILL_GONE;
	default:
		notify(&(struct sn_notice){.kind = SN_NOTICE_TROUBLE, .session = session->id, .address = address,
					   .cause = errno});
		return FILL_LATER;
	}
}

/* The frame can't be had: the page raises SIGBUS when touched. Never zeros, never other data. */
static enum fill_result poison(struct sn_session *session, const struct place *place, uint64_t address, int cause)
{
	uint64_t old = place->entry;
	enum uffd_result result = uffd_poison(session->uffd, address, PAGE);

	FAULT_POINT(FP_POISONED);
	if (result == UFFD_DONE && ENTRY_STATE(old) != ST_BAD &&
	    atomic_compare_exchange_strong(&session->pm.entries[place->index], &old, ST_BAD)) {
		store_unhold_entry(session->store, old);
		COUNT(session, bad_pages);
		notify(&(struct sn_notice){.kind = SN_NOTICE_BAD_FRAME, .session = session->id, .address = address,
					   .cause = cause, .value = ENTRY_OFFSET(old)});
	}
	if (result == UFFD_DONE)
		uffd_wake(session->uffd, address, PAGE);
	return result_of(session, address, result);
}

static enum fill_result fill_zero(struct sn_session *session, const struct place *place, const struct fault *fault,
				  bool write)
{
	uint64_t address = fault->address;
	enum uffd_result result;

	/* A zero page mapped for a read is nearly free; a write to it would pay a second fault. */
	result = write ? fresh_fill(session, address, fault->unasked)
		       : uffd_zero(session->uffd, address, PAGE);
	if (result == UFFD_DONE) {
		COUNT(session, filled_zero);
		if (place->known && (write || ENTRY_STATE(place->entry) != ST_ZERO)) {
			uint64_t old = place->entry;

			if (atomic_compare_exchange_strong(&session->pm.entries[place->index], &old, ST_NONE))
				store_unhold_entry(session->store, old);
		}
	}
	return result_of(session, address, result);
}

/* What is aside. A page that is not there any more is told from one that can't be read when its place is known to be
 * the same still. */
static enum frame_error load_aside(struct sn_session *session, struct filler *filler, const struct place *place)
{
	long n = place->aside ? memory_read(session, place->aside, filler->page, PAGE) : -EIO;

	return n == (long)PAGE ? FRAME_OK : n == -ESRCH ? FRAME_GONE : FRAME_LOST_ASIDE;
}

/* For a page that could not be had, with the lock held and its place unchanged. */
static enum fill_result no_page(struct sn_session *session, const struct place *place, struct fault *fault,
				enum frame_error error)
{
	if (error == FRAME_NO_MEMORY)
		return FILL_NO_MEMORY;
	if (error == FRAME_LOST_ASIDE && place->aside && memory_is_freed(session, place->aside))
		return fill_zero(session, place, fault, true);
	/* A disk may be away for a moment, or swap, or memory for what is in it. */
	if ((error == FRAME_NOT_READ || error == FRAME_LOST_ASIDE) && fault->troubles < MAX_TROUBLES) {
		fault->troubles++;
		return FILL_TROUBLE;
	}
	return poison(session, place, fault->address, error == FRAME_NOT_READ ? FRAME_BAD_READ : (int)error);
}

/* A page that nobody has asked for may be a guard by now, which a COPY would overwrite. */
static bool became_guard(struct sn_session *session, const struct place *place, const struct fault *fault)
{
	uint64_t old = place->entry;

	if (!fault->unasked || !place->known || !memory_has_guard(session, fault->address, 1))
		return false;
	if (atomic_compare_exchange_strong(&session->pm.entries[place->index], &old, ST_GUARD))
		store_unhold_entry(session->store, old);
	return true;
}

/* For whoever holds the lock, with the page in the filler's buffer unless there was an error. */
static enum fill_result put_page(struct sn_session *session, struct filler *filler, const struct place *place,
				 struct fault *fault, enum frame_error error)
{
	enum state state = place->known ? ENTRY_STATE(place->entry) : ST_NONE;
	enum uffd_result result;

	if (became_guard(session, place, fault))
		return FILL_DONE;
	switch (state) {
	case ST_STORED:
	case ST_ASIDE:
		if (error != FRAME_OK)
			return no_page(session, place, fault, error);
		/* A page that equals its frame is write-protected: PAGEMAP_SCAN tells later whether it still does. */
		result = FAULT_ERROR(FP_FILLING)
				 ? UFFD_NO_MEMORY
				 : uffd_copy(session->uffd, fault->address, filler->page, PAGE,
					     state == ST_STORED ? SNAPD_UFFDIO_COPY_MODE_WP : 0, NULL);
		FAULT_POINT(FP_FILLED);
		filler->from_store = result == UFFD_DONE && state == ST_STORED;
		if (result == UFFD_DONE)
			now_present(session, place);
		return result_of(session, fault->address, result);
	case ST_BAD:
		return poison(session, place, fault->address, 0);
	default:
		/* Fresh memory. Also what was filled or guarded and is missing again: it was discarded by a way that
		 * raises no event (a guard, installed and removed), and such pages read as zeros. Where it is present
		 * after all (a second message of one fault), the answer is EEXIST and a wake-up. */
		filler->unknown = !place->recorded;
		return fill_zero(session, place, fault, fault->write || state == ST_FILLED);
	}
}

/* The entry stays as it is: where a page of a cut stop is found in the end is where it is served from, and one that is
 * present is not asked for. */
static enum fill_result hand_out(struct sn_session *session, struct filler *filler, const struct place *place,
				 uint64_t address)
{
	enum uffd_result result = UFFD_AGAIN;
	struct place again;
	uint64_t from;

	if (recover_find(session, place->index, place->aside, &from) || !from ||
	    memory_read(session, from, filler->page, PAGE) != (long)PAGE)
		return FILL_LATER;
	session_share(session);
	again = look_up(session, address);
	if (again.handed && again.index == place->index && again.aside == place->aside)
		result = uffd_copy(session->uffd, address, filler->page, PAGE, 0, NULL);
	pthread_rwlock_unlock(&session->lock);
	return result_of(session, address, result);
}

enum fill_result fill_page(struct sn_session *session, struct filler *filler, struct fault *fault, bool nowait)
{
	filler->from_store = filler->unknown = false;
	while (!atomic_load(&session->stopping)) {
		enum frame_error error = FRAME_OK;
		struct place place, again;
		enum fill_result ret;

		session_share(session);
		place = look_up(session, fault->address);
		pthread_rwlock_unlock(&session->lock);
		if (place.handed)
			return hand_out(session, filler, &place, fault->address);
		if (place.not_now)
			return FILL_LATER;
		if (place.known && ENTRY_STATE(place.entry) == ST_STORED)
			error = load_frame(session, filler, place.entry, nowait);
		else if (place.known && ENTRY_STATE(place.entry) == ST_ASIDE)
			error = load_aside(session, filler, &place);
		if (error == FRAME_WOULD_BLOCK)
			return FILL_WOULD_BLOCK;
		if (error == FRAME_GONE)
			return FILL_GONE;
		session_share(session);
		again = look_up(session, fault->address);
		if (same_place(&place, &again)) {
			ret = put_page(session, filler, &place, fault, error);
			pthread_rwlock_unlock(&session->lock);
			return ret;
		}
		pthread_rwlock_unlock(&session->lock);
	}
	return FILL_LATER;
}

/* What has waited for long is tried less often: these threads run at real-time priority, and hundreds of faults (each
 * signal to a thread that waits is one more) would keep the CPUs from the very thread that they wait for. */
uint64_t fill_delay_ns(const struct sn_session *session, uint64_t since_ns, enum fill_result result)
{
	if (result == FILL_NO_MEMORY || result == FILL_TROUBLE)
		return result == FILL_NO_MEMORY ? MEMORY_NS : TROUBLE_NS;
	if (session->cut)
		return CUT_NS;
	return min_u64(LATEST_NS, LATER_NS + (now_ns() - since_ns) / 4);
}

void fill_count(struct sn_session *session, uint64_t since_ns)
{
	uint64_t us = (now_ns() - since_ns) / 1000;
	unsigned int bits = us < 4 ? 0 : (unsigned int)(61 - __builtin_clzll(us)); /* us >> bits is 4 to 7 */
	unsigned int bucket = us < 4 ? (unsigned int)us : 4 * bits + (unsigned int)(us >> bits);

	__atomic_fetch_add(&session->stats.histogram[bucket < 64 ? bucket : 63], 1, __ATOMIC_RELAXED);
}

int fill_queue(struct sn_session *session, struct fault fault)
{
	int ret = 0;

	pthread_mutex_lock(&session->queue_lock);
	if (!session->nidle && session->nfillers < MAX_FILLERS && session->nfillers <= session->nqueue) {
		pthread_attr_t attributes;

		pthread_attr_init(&attributes);
		pthread_attr_setstacksize(&attributes, 128 << 10);
		if (pthread_create(&session->fillers[session->nfillers], &attributes, filler_main, session) == 0)
			session->nfillers++;
		pthread_attr_destroy(&attributes);
	}
	if (session->nqueue == MAX_FAULTS || !session->nfillers)
		ret = -EAGAIN;
	else
		session->queue[session->nqueue++] = fault;
	pthread_cond_signal(&session->queue_ready);
	pthread_mutex_unlock(&session->queue_lock);
	return ret;
}

/* Takes the fault that is due first; waits until there is one. */
static bool take(struct sn_session *session, struct fault *ret)
{
	bool found = false;

	pthread_mutex_lock(&session->queue_lock);
	session->nidle++;
	while (!found && !atomic_load(&session->stopping)) {
		int first = -1;
		uint64_t now = now_ns();

		for (int i = 0; i < session->nqueue; i++)
			if (first < 0 || session->queue[i].due_ns < session->queue[first].due_ns)
				first = i;
		if (first >= 0 && session->queue[first].due_ns <= now) {
			*ret = session->queue[first];
			session->queue[first] = session->queue[--session->nqueue];
			found = true;
		} else if (first >= 0) {
			uint64_t due = session->queue[first].due_ns;
			struct timespec until = {(time_t)(due / 1000000000ULL), (long)(due % 1000000000ULL)};

			pthread_cond_timedwait(&session->queue_ready, &session->queue_lock, &until);
		} else {
			pthread_cond_wait(&session->queue_ready, &session->queue_lock);
		}
	}
	session->nidle--;
	pthread_mutex_unlock(&session->queue_lock);
	return found;
}

void *filler_main(void *arg)
{
	struct sn_session *session = arg;
	struct filler filler;
	struct fault fault;

	if (filler_init(&filler)) {
		notify(&(struct sn_notice){.kind = SN_NOTICE_TROUBLE, .session = session->id, .cause = ENOMEM});
		return NULL;
	}
	prefer_thread();
	while (take(session, &fault)) {
		enum fill_result result = fill_page(session, &filler, &fault, false);

		if (result == FILL_DONE) {
			fill_count(session, fault.since_ns);
			if (filler.from_store)
				resume_note(session, fault.address, 1);
		} else if (result == FILL_GONE) {
			session_gone(session);
		} else {
			COUNT(session, retries);
			fault.due_ns = now_ns() + fill_delay_ns(session, fault.since_ns, result);
			if (fill_queue(session, fault))
				uffd_wake(session->uffd, fault.address, PAGE);
		}
	}
	filler_deinit(&filler);
	return NULL;
}
