/* Sessions: creation, forked children, closing.
 *
 * Owns what belongs to one target's mm: three fds, the lock, the threads. Knows no policy and no pid but to read from.
 */
#include "internal.h"
#include "keeper.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static _Atomic uint64_t next_id = 1;

uint64_t now_ns(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000ULL + (uint64_t)time.tv_nsec;
}

/* A target stands or waits while these threads work. A nice value alone does not help where each login session is a
 * scheduling group of its own. */
void prefer_thread(void)
{
	struct sched_param param = {.sched_priority = 1};

	if (sched_setscheduler(0, SCHED_FIFO | SCHED_RESET_ON_FORK, &param))
		setpriority(PRIO_PROCESS, (id_t)syscall(SYS_gettid), -10);
}

bool start_thread(pthread_t *thread, void *(*run)(void *), void *arg)
{
	pthread_attr_t attributes;
	int error;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 128 << 10);
	error = pthread_create(thread, &attributes, run, arg);
	pthread_attr_destroy(&attributes);
	return !error;
}

struct sn_session *session_new(const struct sn_target *target, struct sn_store *store, struct sn_session *source,
			       int *ret_error)
{
	struct sn_session *session = calloc(1, sizeof(*session));
	pthread_rwlockattr_t attributes;
	pthread_condattr_t monotonic;

	*ret_error = -ENOMEM;
	if (!session)
		return NULL;
	session->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (session->wake_fd < 0) {
		*ret_error = -errno;
		free(session);
		return NULL;
	}
	session->pm.fd = -1;
	session->scratch = calloc(2 * MAX_RECORDS, sizeof(*session->scratch));
	session->moving = session->scratch + MAX_RECORDS;
	*ret_error = session->scratch ? pm_open(&session->pm, target->page_map) : -ENOMEM;
	if (*ret_error) {
		free(session->scratch);
		close(session->wake_fd);
		free(session);
		return NULL;
	}
	session->id = atomic_fetch_add(&next_id, 1);
	session->end.what = (struct sn_notice){.kind = SN_NOTICE_GONE, .session = session->id};
	atomic_store(&session->pid, target->pid);
	session->uffd = target->uffd;
	session->maps_fd = session->pagemap_fd = session->mem_fd = session->process_fd = -1;
	session->sentinel = target->sentinel;
	memcpy(session->agent_tids, target->agent_tids, sizeof(session->agent_tids));
	mover_attach(session, target->agent_sock);
	session->source = source;
	session->store = store;
	atomic_fetch_add(&store->references, 1);
	session->number = session->pm.header->number;
	if (!session->number)
		session->number = session->pm.header->number = keeper_number();
	session->pm.header->store_number = store->number;
	session->pm.header->pid = target->pid;
	session->pm.header->sentinel = target->sentinel;
	memcpy(session->pm.header->store_id, store->id, sizeof(store->id));
	pthread_mutex_init(&session->mover, NULL);
	pthread_mutex_init(&session->queue_lock, NULL);
	pthread_mutex_init(&session->fresh_lock, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&session->queue_ready, &monotonic);
	pthread_condattr_destroy(&monotonic);
	/* The reader must not starve behind a stream of fills. */
	pthread_rwlockattr_init(&attributes);
	pthread_rwlockattr_setkind_np(&attributes, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
	pthread_rwlock_init(&session->lock, &attributes);
	pthread_rwlockattr_destroy(&attributes);
	return session;
}

struct stop *session_stop(struct sn_session *session)
{
	if (!session->stop)
		session->stop = stop_create();
	if (!session->robust)
		session->robust = robust_create();
	if (!session->huge)
		session->huge = huge_create();
	return session->robust && session->huge ? session->stop : NULL;
}

int session_start(struct sn_session *session)
{
	pthread_attr_t attributes;
	int error;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 128 << 10);
	error = pthread_create(&session->reader, &attributes, reader_main, session);
	pthread_attr_destroy(&attributes);
	return -error;
}

/* The page map last: with it the session is whole. */
int session_hand_over(struct sn_session *session)
{
	int error = sn_hand_over(KEEP_USERFAULTFD, session->number, session->uffd);

	FAULT_POINT(FP_HALF_HANDED);
	return error ? error : sn_hand_over(KEEP_PAGE_MAP, session->number, session->pm.fd);
}

static void session_withhold(struct sn_session *session)
{
	sn_withhold(KEEP_PAGE_MAP, session->number);
	sn_withhold(KEEP_USERFAULTFD, session->number);
}

/* Frees what is the session's; a descriptor that is -1 by now is the caller's. */
void session_forget(struct sn_session *session)
{
	notice_forget(&session->birth);
	notice_forget(&session->end);
	if (session->uffd >= 0) {
		session_withhold(session);
		close(session->uffd);
	}
	mover_detach(session);
	loan_forget(session);
	hold_release(session);
	memory_close(session);
	close(session->wake_fd);
	free(session->scratch);
	stop_destroy(session->stop);
	robust_destroy(session->robust);
	huge_destroy(session->huge);
	resume_destroy(session->resume);
	pm_close(&session->pm);
	sn_store_release(session->store);
	pthread_mutex_destroy(&session->mover);
	pthread_mutex_destroy(&session->queue_lock);
	pthread_mutex_destroy(&session->fresh_lock);
	pthread_cond_destroy(&session->queue_ready);
	pthread_rwlock_destroy(&session->lock);
	free(session);
}

static void session_free(struct sn_session *session)
{
	struct table *table = pm_table(&session->pm);

	for (uint64_t i = 0; i < table->nrecords; i++)
		for (uint64_t k = 0; table->records[i].first != NO_ENTRIES && k < table->records[i].npages; k++)
			store_unhold_entry(session->store, session->pm.entries[table->records[i].first + k]);
	session_forget(session);
}

/* Ends the session's threads, and waits for children that still read its memory. */
static void session_quiet(struct sn_session *session)
{
	uint64_t one = 1;

	atomic_store(&session->stopping, true);
	while (write(session->wake_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
	pthread_join(session->reader, NULL);
	pthread_mutex_lock(&session->queue_lock);
	pthread_cond_broadcast(&session->queue_ready);
	pthread_mutex_unlock(&session->queue_lock);
	for (int i = 0; i < session->nfillers; i++)
		pthread_join(session->fillers[i], NULL);
	replay_end(session);
	flood_end(session);
	while (atomic_load(&session->fork_copies)) /* a child still reads our staging: it ends soon */
		usleep(1000);
}

struct sn_session *sn_session_create(const struct sn_target *target, struct sn_store *store, int *ret_error)
{
	struct sn_session *session = session_new(target, store, NULL, ret_error);

	if (!session)
		return NULL;
	FAULT_POINT(FP_SESSION_BEGINNING);
	*ret_error = session_hand_over(session);
	/* With something to watch a fork waits until its event is read: only from now on somebody would. (An agent's
	 * sentinel is watched already. The next daemon has it make another userfaultfd, which ends the first.) */
	if (!*ret_error && target->sentinel)
		*ret_error = sn_uffd_register(session->uffd, target->sentinel, PAGE);
	if (!*ret_error)
		*ret_error = session_start(session);
	if (!*ret_error && target->pid) {
		*ret_error = memory_open(session);
		/* A plain user may not look into every program of its own: then it is served, and not dumped. */
		if (*ret_error == -EACCES || *ret_error == -EPERM)
			*ret_error = 0;
		if (*ret_error)
			session_quiet(session);
	}
	if (*ret_error) {
		session_withhold(session);
		session->uffd = session->agent_sock = session->pm.fd = -1; /* still the caller's */
		session_free(session);
		return NULL;
	}
	FAULT_POINT(FP_UNTOLD);
	return session;
}

void sn_session_close(struct sn_session *session)
{
	session_quiet(session);
	session_free(session);
}

void session_gone(struct sn_session *session)
{
	if (!atomic_exchange(&session->gone, true))
		notice_post(&session->end);
}

int sn_session_is_gone(struct sn_session *session)
{
	return atomic_load(&session->gone);
}

/* For the reader inside a FORK event, with the lock held: the parent runs on only after this. The child gets the
 * table and entries as they are at the fork, and refers to the same frames. */
int session_fork(struct sn_session *session, const struct table *from, int uffd)
{
	struct sn_target target = {.pid = 0, .uffd = uffd, .agent_sock = -1, .sentinel = session->sentinel};
	struct table *to;
	/* A child that forks before it has its copies: they still are where its own were. */
	struct sn_session *source = session->source ? session->source : session;
	struct sn_session *child;
	bool aside = false;
	int error;

	if (uffd < 0) /* of a former daemon, and the child has its session */
		return 0;
	target.page_map = sn_page_map_create();
	if (target.page_map < 0)
		return target.page_map;
	child = session_new(&target, session->store, source, &error);
	if (!child) {
		close(target.page_map);
		return error;
	}
	/* Where pages of a cut stop are the parent does not know yet. */
	aside = session->cut;
	child->cut = aside;
	to = pm_edit(&child->pm);
	to->nrecords = from->nrecords;
	memcpy(to->records, from->records, from->nrecords * sizeof(from->records[0]));
	for (uint64_t i = 0; i < from->nrecords; i++) {
		const struct record *record = &from->records[i];

		if (record->first == NO_ENTRIES)
			continue;
		aside |= record->aside != 0;
		for (uint64_t k = record->first; k < record->first + record->npages; k++) {
			uint64_t entry = session->pm.entries[k]; /* packing may publish a frame just now */

			child->pm.entries[k] = entry;
			store_hold_entry(session->store, entry);
		}
	}
	child->pm.header->nentries = session->pm.header->nentries;
	child->pm.alloc_next = session->pm.alloc_next;
	child->pm.alloc_limit = session->pm.alloc_limit;
	pm_commit(&child->pm);
	if (aside)
		atomic_fetch_add(&source->fork_copies, 1);
	else
		child->source = NULL;
	session->forked = child->forked = true;
	child->pm.header->parent = session->number;
	child->pm.header->source = aside ? source->number : 0;
	child->pm.header->uid = session->pm.header->uid;
	child->pm.header->flags = session->pm.header->flags & FLAG_FORK_EVENTS;
	error = session_hand_over(child);
	if (!error) {
		keeper_fork_is_applied(uffd);
		error = session_start(child);
	}
	if (error) {
		if (aside)
			atomic_fetch_sub(&source->fork_copies, 1);
		session_withhold(child);
		child->uffd = -1;
		session_free(child);
		return error;
	}
	FAULT_POINT(FP_UNTOLD);
	mover_keep(session, child);
	child->birth.what = (struct sn_notice){.kind = SN_NOTICE_CHILD, .session = session->id, .child = child};
	notice_post(&child->birth);
	return 0;
}

void entry_put(struct sn_session *session, uint64_t index, uint64_t entry)
{
	uint64_t old = atomic_exchange(&session->pm.entries[index], entry);

	if (entry_has_frame(old) && (old & ENTRY_FRAME_MASK) != (entry & ENTRY_FRAME_MASK))
		store_unhold_entry(session->store, old);
}

void sn_session_note(struct sn_session *session, int uid, uint64_t born, uint32_t flags)
{
	struct page_map_header *header = session->pm.header;

	header->uid = uid;
	header->flags = flags;
	header->born = born;
}

uint32_t sn_session_number(struct sn_session *session)
{
	return session->number;
}

uint64_t sn_session_id(struct sn_session *session)
{
	return session->id;
}

int sn_session_pid(struct sn_session *session)
{
	return atomic_load(&session->pid);
}

int sn_session_set_pid(struct sn_session *session, int pid)
{
	int error;

	atomic_store(&session->pid, pid);
	error = memory_open(session);
	if (error == -EACCES || error == -EPERM)
		error = 0;
	if (error)
		atomic_store(&session->pid, 0);
	else
		session->pm.header->pid = pid;
	return error;
}

void sn_session_bind(struct sn_session *session, int agent_sock, const int *tids)
{
	pthread_mutex_lock(&session->mover);
	pthread_rwlock_wrlock(&session->lock); /* the reader tells the agent of children */
	mover_detach(session);
	session->agent_tids[0] = tids[0];
	session->agent_tids[1] = tids[1];
	mover_attach(session, agent_sock);
	pthread_rwlock_unlock(&session->lock);
	pthread_mutex_unlock(&session->mover);
}

int sn_session_page_map(struct sn_session *session)
{
	return session->pm.fd;
}

int sn_session_store_fd(struct sn_session *session)
{
	return session->store->fd;
}

int sn_session_uffd(struct sn_session *session)
{
	return session->uffd;
}

int sn_session_take_forked(struct sn_session *session)
{
	return atomic_exchange(&session->forked, false);
}

void sn_session_set_forked(struct sn_session *session)
{
	atomic_store(&session->forked, true);
}

struct sn_store *sn_session_store(struct sn_session *session)
{
	return session->store;
}

void sn_session_stats(struct sn_session *session, struct sn_stats *ret)
{
	const uint64_t *from = (const uint64_t *)&session->stats;
	uint64_t *to = (uint64_t *)ret;

	_Static_assert(sizeof(session->stats) % sizeof(*from) == 0, "counters and nothing else");
	for (size_t i = 0; i < sizeof(session->stats) / sizeof(*from); i++)
		to[i] = __atomic_load_n(&from[i], __ATOMIC_RELAXED);
}

void sn_session_counts(struct sn_session *session, struct sn_counts *ret)
{
	uint64_t *by_state[ST_COUNT] = {&ret->none, &ret->aside, &ret->stored, &ret->filled,
					&ret->zero, &ret->guard, &ret->bad};
	struct table *table;

	memset(ret, 0, sizeof(*ret));
	pthread_rwlock_rdlock(&session->lock);
	table = pm_table(&session->pm);
	ret->ranges = table->nrecords;
	for (uint64_t i = 0; i < table->nrecords; i++)
		for (uint64_t k = 0; table->records[i].first != NO_ENTRIES && k < table->records[i].npages; k++) {
			uint64_t e = session->pm.entries[table->records[i].first + k];

			if (e & ENTRY_MOVING)
				ret->moving++;
			if (ENTRY_STATE(e) < ST_COUNT)
				++*by_state[ENTRY_STATE(e)];
			if (entry_has_frame(e))
				ret->frame_bytes += ENTRY_BYTES(e);
		}
	pthread_rwlock_unlock(&session->lock);
}

uint64_t sn_session_regions(struct sn_session *session, struct sn_region *ret, uint64_t capacity)
{
	struct table *table;
	uint64_t n = 0;

	pthread_rwlock_rdlock(&session->lock);
	table = pm_table(&session->pm);
	for (uint64_t i = 0; i < table->nrecords; i++) {
		const struct record *record = &table->records[i];

		if (record->first == NO_ENTRIES)
			continue;
		if (n < capacity)
			ret[n] = (struct sn_region){record->start, record->npages, record->first, record->aside};
		n++;
	}
	pthread_rwlock_unlock(&session->lock);
	return n;
}

/* The sentinel page is never filled. Write-protected or not, which the pagemap shows, it tells whose it is. */
int sn_session_mark(struct sn_session *session, int on)
{
	switch (uffd_protect(session->uffd, session->sentinel, PAGE, on)) {
	case UFFD_DONE: return 0;
	case UFFD_AGAIN: return -EAGAIN;
	case UFFD_GONE: return -ESRCH;
	case UFFD_NO_MEMORY: return -ENOMEM;
	default: return -ENOENT;
	}
}

/* Without an agent no connection says so. */
static bool has_executed(struct sn_session *session)
{
	return session->pm.header->attached.length && atomic_load(&session->pid) &&
	       loan_find_code(session) == -EPIPE;
}

/* A held address space outlives its program: then the program is asked for itself. */
int sn_session_alive(struct sn_session *session)
{
	return !atomic_load(&session->gone) && uffd_wake(session->uffd, session->sentinel, PAGE) != UFFD_GONE &&
	       uffd_zero(session->uffd, 0, PAGE) != UFFD_GONE &&
	       !(atomic_load(&session->hold) && (memory_is_ending(session) || has_executed(session)));
}
