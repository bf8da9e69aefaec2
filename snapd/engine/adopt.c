/* Adoption: a session of a daemon that is dead goes on here, by its page map, its userfaultfd and its store.
 *
 * Owns what is made of a page map before the reader starts; whether it is believed is trust.c's, and a piece that was
 * on its way recover.c's. Knows nothing of where the descriptors came from. */
#include "internal.h"
#include "keeper.h"

#include <errno.h>
#include <sys/syscall.h>
#include <unistd.h>

#define KCMP_FILE 0

int sn_same_file(int fd, int other)
{
	return syscall(SYS_kcmp, getpid(), getpid(), KCMP_FILE, fd, other) == 0;
}

int sn_page_map_look(int fd, struct sn_page_map_info *ret)
{
	struct page_map_header header;
	struct snapd_uffd_msg ring[16] = {0}; /* of the current one; the rest would say no more */

	if (!trust_file(fd) || pread(fd, &header, sizeof(header), 0) != (ssize_t)sizeof(header) ||
	    !pm_is_ours(&header))
		return -EPROTO;
	if (pread(fd, ring, sizeof(ring),
		  (off_t)(PM_RING_OFFSET + (header.generation & 1) * RING_SLOTS * sizeof(ring[0]))) < 0)
		return -EPROTO;
	*ret = (struct sn_page_map_info){
		.pid = header.pid, .uid = header.uid, .number = header.number, .store_number = header.store_number,
		.parent = header.parent, .source = header.source, .flags = header.flags, .born = header.born,
		.sentinel = header.sentinel};
	memcpy(ret->store_id, header.store_id, sizeof(ret->store_id));
	for (int i = 0; i < MAX_INFLIGHT * MAX_SPANS; i++)
		if (header.intents[i].phase <= PHASE_CUT)
			ret->phases[header.intents[i].phase]++;
	for (unsigned int i = 0; i < sizeof(ring) / sizeof(ring[0]); i++)
		ret->events += ring[i].event && ring[i].event != SNAPD_UFFD_EVENT_PAGEFAULT;
	return 0;
}

int sn_page_map_renumber(int fd)
{
	uint32_t none = 0;

	return pwrite(fd, &none, sizeof(none), offsetof(struct page_map_header, number)) == sizeof(none) ? 0 : -errno;
}

/* The numbers of descriptors that FORK events brought are those of the former daemon. */
void adopt_forks(struct sn_session *session)
{
	struct snapd_uffd_msg *ring = pm_ring(&session->pm);

	for (unsigned int i = 0; i < RING_SLOTS; i++) {
		struct snapd_uffd_msg *message = &ring[i];

		if (message->event != SNAPD_UFFD_EVENT_FORK)
			continue;
		if (!message->reserved3) /* the first who adopts it writes down what it was */
			message->reserved3 = message->arg.fork.ufd + 1;
		message->arg.fork.ufd = (uint32_t)keeper_fork(message->reserved3 - 1);
	}
}

struct sn_session *sn_session_adopt(const struct sn_target *target, struct sn_store *store, uint64_t store_bytes,
				    int *ret_error, const char **ret_what)
{
	struct sn_session *session = session_new(target, store, NULL, ret_error);
	const struct table *table;

	*ret_what = NULL;
	if (!session)
		return NULL;
	*ret_what = trust_wrong(&session->pm, store_bytes, session->scratch);
	if (*ret_what) {
		*ret_error = -EBADMSG;
		session->uffd = session->agent_sock = session->pm.fd = -1; /* still the caller's */
		session_forget(session);
		return NULL;
	}
	table = pm_table(&session->pm);
	for (uint64_t i = 0; i < table->nrecords; i++)
		for (uint64_t k = 0; table->records[i].first != NO_ENTRIES && k < table->records[i].npages; k++)
			store_hold_entry(store, session->pm.entries[table->records[i].first + k]);
	set_check(session);
	session->adopted = true;
	session->forked = true;
	*ret_error = session_hand_over(session);
	FAULT_POINT(FP_ADOPTED);
	return session;
}

void sn_session_depend(struct sn_session *session, struct sn_session *source)
{
	session->source = source;
	if (source)
		atomic_fetch_add(&source->fork_copies, 1);
}

int sn_session_resume(struct sn_session *session)
{
	int error;

	haste_end_former(&session->pm.header->haste, atomic_load(&session->pid));
	adopt_forks(session);
	recover_begin(session);
	sn_session_dumped(session); /* what is out came back to nobody yet, for all that is known */
	error = session_start(session);
	FAULT_POINT(FP_RESUMED);
	/* What is aside waits until it is open: when the process is known, or its agent comes again. */
	if (!error && atomic_load(&session->pid))
		memory_open(session);
	if (!error && session->pm.alloc_next > PM_REUSE_FROM) /* where there is room is not in the page map */
		sn_page_map_trim(session);
	return error;
}
