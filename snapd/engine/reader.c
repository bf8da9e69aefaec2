/* The reader: one thread a session that reads the userfaultfd, applies events in order, and fills what it can at once.
 *
 * It waits for nobody: not for the agent, not for Python, not for a disk. A fill that would block goes to the session's
 * fill threads. Events are read into the page map's ring, so that a successor finds what a dying daemon had read.
 */
#include "internal.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <unistd.h>

#define MAX_PENDING 1024
#define WAIT_NS 5000000000ULL
#define PAUSE_US 20 /* the thread that is in the call may need this very CPU */
#define FIRST_PROBE_NS 4000000ULL /* most forked children end soon, and each holds descriptors */
#define PROBE_NS 500000000ULL
#define COPY_TRIES 20
#define SOURCE_NS 2000000ULL
#define RING_TRIES 5000
#define RING_PAUSE_US 200
#define WAKE_START 0x10000ULL /* all that a program can map */
#define WAKE_END 0x7ffffffff000ULL

struct pending {
	struct fault faults[MAX_PENDING];
	int n;
};

static void add_pending(struct sn_session *session, struct pending *pending, const struct snapd_uffd_msg *message)
{
	uint64_t now = now_ns();
	struct fault fault = {.address = PAGE_DOWN(message->arg.fault.address),
			      .since_ns = now,
			      .due_ns = now,
			      .write = message->arg.fault.flags & SNAPD_UFFD_PAGEFAULT_WRITE};

	COUNT(session, faults);
	if (pending->n < MAX_PENDING)
		pending->faults[pending->n++] = fault;
	else if (fill_queue(session, fault)) /* full: the thread is woken and asks again */
		uffd_wake(session->uffd, fault.address, PAGE);
}

/* A message stays where it was read: a copy of it would be an event more for a successor. */
static void take(struct events *events, const struct snapd_uffd_msg *message, struct pending *pending)
{
	if (message->event == SNAPD_UFFD_EVENT_PAGEFAULT) {
		add_pending(events->session, pending, message);
		events->n++;
	} else {
		if (!events->session->in_stop)
			FAULT_POINT(FP_EVENT_READ);
		if (!events->session->in_stop && FAULT_ERROR(FP_EVENT_TAKEN))
			events->n++;
		else
			events_take(events);
	}
}

/* Reads one message, into the ring: what a dying daemon had read its successor finds there. Never several at once: the
 * caller of an event goes on as soon as it is copied out, so a read with room for more could show a thread's next event
 * too. Then it would be too late to ask what the thread's call was, and whose place it took. */
static bool read_event(struct sn_session *session, struct events *events, struct pending *pending)
{
	struct snapd_uffd_msg *slot = &pm_ring(&session->pm)[events->n];
	ssize_t bytes;

	do {
		bytes = read(session->uffd, slot, sizeof(*slot));
	} while (bytes < 0 && errno == EINTR);
	if (bytes < 0 && errno != EAGAIN) {
		/* EMFILE and the like: a FORK event stays queued until there is room for its fd. */
		notify(&(struct sn_notice){.kind = SN_NOTICE_TROUBLE, .session = session->id, .cause = errno});
		usleep(10000);
	}
	if (bytes != sizeof(*slot))
		return false;
	take(events, slot, pending);
	return true;
}

/* What the former daemon had read and not applied; slots behind are clear. What it had applied is in the other ring, if
 * it died before that was clear. */
static void take_what_is_left(struct events *events, struct pending *pending)
{
	struct page_map *pm = &events->session->pm;

	memset(pm_other_ring(pm), 0, RING_SLOTS * sizeof(struct snapd_uffd_msg));
	while (events->n < RING_SLOTS && pm_ring(pm)[events->n].event)
		take(events, &pm_ring(pm)[events->n], pending);
}

static bool made_room(struct events *events)
{
	if (events->n < RING_SLOTS)
		return true;
	if (!events->nwaiting)
		return false;
	while (events->nwaiting == RING_SLOTS)
		events_force(events);
	events_compact(events);
	return true;
}

/* Somebody's memory is where another's is, by what was read so far. */
static void wait_for_earlier(struct sn_session *session, struct events *events, bool any, uint64_t deadline)
{
	struct interval need = events_need(events);

	if (!callers_await(atomic_load(&session->pid), need, (void *)session->moving) || now_ns() > deadline ||
	    (!any && !uffd_changing(session->uffd)))
		events_force(events);
	else if (!any)
		usleep(PAUSE_US);
}

/* Reads and applies all that there is. Faults are handed out before older events, so none is filled before the events
 * are applied; nor while an event waits for one that happened before it and is not read yet. */
static void drain(struct sn_session *session, struct pending *pending)
{
	uint64_t deadline = now_ns() + WAIT_NS;
	struct events events;
	bool got = true, locked = false;

	for (int looks = 0; looks < LOCK_LOOKS && !locked; looks++) {
		locked = pthread_rwlock_trywrlock(&session->lock) == 0;
		if (!locked)
			__builtin_ia32_pause();
	}
	if (!locked)
		pthread_rwlock_wrlock(&session->lock);
	events_begin(&events, session);
	if (session->adopted)
		take_what_is_left(&events, pending); /* it may be a full ring */
	while ((got || events.nwaiting) && made_room(&events)) {
		got = read_event(session, &events, pending);
		if (events.nwaiting)
			wait_for_earlier(session, &events, got, deadline);
	}
	events_end(&events, !uffd_changing(session->uffd));
	pthread_rwlock_unlock(&session->lock);
}

/* Faults that the former daemon had read are answered by nobody: all that wait ask again. */
static void take_over(struct sn_session *session, struct pending *pending)
{
	FAULT_POINT(FP_RING_LEFT);
	drain(session, pending);
	FAULT_POINT(FP_RING_APPLIED);
	session->adopted = false;
	keeper_ring_is_read(session->number);
	uffd_wake(session->uffd, WAKE_START, WAKE_END - WAKE_START);
}

bool ring_is_applied(const struct sn_session *session)
{
	for (int tries = 0; session->adopted && tries < RING_TRIES && !atomic_load(&session->stopping); tries++)
		usleep(RING_PAUSE_US);
	return !session->adopted;
}

/* A fault where there is no record: the mapping has grown in place. */
static void learn(struct sn_session *session, uint64_t address)
{
	pthread_rwlock_wrlock(&session->lock);
	events_cover(session, pm_edit(&session->pm), address);
	pm_commit(&session->pm);
	pthread_rwlock_unlock(&session->lock);
}

/* Serves what is due; what must wait stays. Returns when the next one is due, or 0 for none. */
static uint64_t serve(struct sn_session *session, struct filler *filler, struct prefetch *prefetch,
		      struct pending *pending)
{
	uint64_t now = now_ns(), next = 0;
	int kept = 0;

	for (int i = 0; i < pending->n; i++) {
		struct fault fault = pending->faults[i];
		enum fill_result result = FILL_LATER;

		if (fault.due_ns <= now) {
			/* Several at once: the other CPU takes a share. */
			if (i && (i & 1) && fill_queue(session, fault) == 0)
				continue;
			result = fill_page(session, filler, &fault, true);
			if (result == FILL_DONE) {
				fill_count(session, fault.since_ns);
				if (filler->from_store) {
					prefetch_note(prefetch, fault.address);
					resume_note(session, fault.address, 1);
				}
				if (filler->unknown)
					learn(session, fault.address);
				continue;
			}
			if (result == FILL_GONE) {
				session_gone(session);
				continue;
			}
			if (result == FILL_WOULD_BLOCK) {
				if (fill_queue(session, fault))
					uffd_wake(session->uffd, fault.address, PAGE);
				continue;
			}
			COUNT(session, retries);
			fault.due_ns = now_ns() + fill_delay_ns(session, fault.since_ns, result);
		}
		if (!next || fault.due_ns < next)
			next = fault.due_ns;
		pending->faults[kept++] = fault;
	}
	pending->n = kept;
	return next;
}

enum copy { COPY_PAGE, COPY_NOTHING, COPY_POISON };

static void give_page(struct sn_session *session, uint64_t index, const void *page, enum copy copy,
		      struct pending *pending)
{
	for (;;) {
		enum uffd_result result = UFFD_DONE;
		uint64_t address, entry;

		pthread_rwlock_rdlock(&session->lock);
		address = pm_address_of(pm_table(&session->pm), index);
		entry = session->pm.entries[index];
		if (!address || !(ENTRY_STATE(entry) == ST_ASIDE || entry & ENTRY_MOVING)) {
			pthread_rwlock_unlock(&session->lock);
			return;
		}
		if (copy != COPY_NOTHING)
			result = copy == COPY_POISON ? uffd_poison(session->uffd, address, PAGE)
						     : uffd_copy(session->uffd, address, page, PAGE, 0, NULL);
		if (result != UFFD_AGAIN && result != UFFD_NO_MEMORY)
			entry_put(session, index, copy == COPY_POISON ? ST_BAD : ST_NONE);
		pthread_rwlock_unlock(&session->lock);
		if (result == UFFD_GONE)
			session_gone(session);
		if (result == UFFD_DONE && copy == COPY_POISON)
			notify(&(struct sn_notice){.kind = SN_NOTICE_BAD_FRAME, .session = session->id,
				.address = address, .cause = FRAME_LOST_ASIDE});
		if (result != UFFD_AGAIN && result != UFFD_NO_MEMORY)
			return;
		drain(session, pending);
		usleep(50);
	}
}

/* What was freed lazily and taken by the kernel stays missing in the child, which reads as zeros. What can't be read
 * for another reason raises SIGBUS there: never zeros, never other data. */
static enum copy take_page(struct sn_session *source, uint64_t from, void *page)
{
	for (int tries = 0; tries < COPY_TRIES; tries++) {
		if (memory_read(source, from, page, PAGE) == (long)PAGE)
			return COPY_PAGE;
		if (memory_is_freed(source, from))
			return COPY_NOTHING;
		if (memory_is_ending(source)) /* the kernel takes its memory: no try brings it back */
			break;
		usleep(10000);
	}
	return COPY_POISON;
}

/* Whether what the source knows of its pages is final. */
static bool may_copy(const struct sn_session *source)
{
	return !source || (!source->cut && atomic_load(&source->mem_fd) >= 0) ||
	       atomic_load(&source->gone) || atomic_load(&source->stopping);
}

/* One page that may be aside in the source; it may also be nowhere, when its stop was cut. */
static void copy_page(struct sn_session *session, uint64_t index, uint64_t from, unsigned char *page,
		      struct pending *pending)
{
	struct sn_session *source = session->source;
	uint64_t entry = session->pm.entries[index];

	if (entry & ENTRY_MOVING) {
		bool known = source && !source->cut && recover_find(source, index, from, &from) == 0;

		from = known ? from : 0;
		if (known && !from && ENTRY_STATE(entry) != ST_ASIDE) {
			bool there = ENTRY_STATE(entry) == ST_FILLED || ENTRY_STATE(entry) == ST_GUARD;

			pthread_rwlock_wrlock(&session->lock);
			if (session->pm.entries[index] == entry)
				entry_put(session, index, there ? ST_NONE : entry & ~ENTRY_MOVING);
			pthread_rwlock_unlock(&session->lock);
			return;
		}
	} else if (ENTRY_STATE(entry) != ST_ASIDE) {
		return;
	}
	FAULT_POINT(FP_CHILD_COPYING);
	give_page(session, index, page, source && from ? take_page(source, from, page) : COPY_POISON, pending);
}

/* A fork in the middle of a dump: pages that are aside in the parent come to the child before any answer to its
 * faults. Their memory is held meanwhile, also when the parent exits. */
static void copy_aside(struct sn_session *session, struct pending *pending)
{
	struct table *table = malloc(sizeof(*table));
	unsigned char *page = malloc(PAGE);
	struct sn_session *source = session->source;

	if (table && page) {
		pthread_rwlock_rdlock(&session->lock);
		table->nrecords = pm_table(&session->pm)->nrecords;
		memcpy(table->records, pm_table(&session->pm)->records, table->nrecords * sizeof(struct record));
		pthread_rwlock_unlock(&session->lock);
		for (uint64_t i = 0; i < table->nrecords; i++) {
			const struct record *record = &table->records[i];

			for (uint64_t k = 0; record->first != NO_ENTRIES && (record->aside || session->cut) &&
					     k < record->npages; k++)
				copy_page(session, record->first + k, record->aside ? record->aside + k * PAGE : 0,
					  page, pending);
		}
	}
	free(table);
	free(page);
	pthread_rwlock_wrlock(&session->lock);
	table = pm_edit(&session->pm);
	for (uint64_t i = 0; i < table->nrecords; i++)
		table->records[i].aside = 0;
	pm_commit(&session->pm);
	session->cut = false;
	session->source = NULL;
	session->pm.header->source = 0;
	pthread_rwlock_unlock(&session->lock);
	if (source)
		atomic_fetch_sub(&source->fork_copies, 1);
}

void *reader_main(void *arg)
{
	struct sn_session *session = arg;
	struct pending *pending = calloc(1, sizeof(*pending));
	struct prefetch *prefetch = prefetch_create(session);
	struct filler filler = {0};
	struct spin spin;
	uint64_t next = 0, probe = FIRST_PROBE_NS;
	bool ahead = false, filled = false, due;

	if (!pending || !prefetch || filler_init(&filler)) {
		notify(&(struct sn_notice){.kind = SN_NOTICE_TROUBLE, .session = session->id, .cause = ENOMEM});
		prefetch_destroy(prefetch);
		free(pending);
		return NULL;
	}
	spin_init(&spin);
	prefer_thread();
	if (session->adopted)
		take_over(session, pending);
	due = session->source || session->pm.header->source;
	next = serve(session, &filler, prefetch, pending); /* what was asked for meanwhile */
	while (!atomic_load(&session->stopping)) {
		struct pollfd fds[2] = {{.fd = session->uffd, .events = POLLIN},
					{.fd = session->wake_fd, .events = POLLIN}};
		uint64_t now = now_ns(), wait = session->agent_sock < 0 ? probe : ~0ULL;
		struct timespec timeout;

		if (due && may_copy(session->source)) {
			copy_aside(session, pending);
			due = false;
		}
		if (due)
			wait = min_u64(wait, SOURCE_NS);
		if (ahead)
			wait = 0;
		else if (next)
			wait = min_u64(wait, next > now ? next - now : 0);
		timeout = (struct timespec){(time_t)(wait / 1000000000ULL), (long)(wait % 1000000000ULL)};
		pulse_wait(session);
		if (!filled || next || ahead || due || !spin_for(&spin, fds, 2)) {
			uint64_t slept = now_ns();

			if (ppoll(fds, 2, wait == ~0ULL ? NULL : &timeout, NULL) == 0 && !next && !ahead) {
				probe = min_u64(2 * probe, PROBE_NS);
				if (!sn_session_alive(session))
					session_gone(session);
			}
			if (fds[0].revents)
				spin_slept(&spin, now_ns() - slept);
		}
		pulse_go_on(session);
		if (fds[1].revents & POLLIN) {
			uint64_t count;

			if (read(session->wake_fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
				break;
		}
		if (fds[0].revents)
			drain(session, pending);
		filled = pending->n > 0;
		if (filled)
			spin_filled(&spin);
		next = serve(session, &filler, prefetch, pending);
		ahead = prefetch_step(prefetch);
	}
	prefetch_destroy(prefetch);
	filler_deinit(&filler);
	free(pending);
	return NULL;
}
