/* The mover over an agent's socket: one command, one reply.
 *
 * For whoever holds session->mover. Knows the wire format; no policy.
 */
#include "internal.h"

#include <errno.h>
#include <sys/socket.h>

int mover_call(struct sn_session *session, struct snapd_wire *message)
{
	uint32_t seq = ++session->mover_seq;
	ssize_t n;

	if (session->agent_sock < 0)
		return -ENOTCONN;
	message->magic = SNAPD_WIRE_MAGIC;
	message->version = SNAPD_WIRE_VERSION;
	message->seq = seq;
	do {
		n = send(session->agent_sock, message, sizeof(*message), MSG_NOSIGNAL);
	} while (n < 0 && errno == EINTR);
	if (n != sizeof(*message))
		return -EPIPE;
	/* No time limit: a mover that sleeps does so because the whole target does (SIGSTOP, a frozen cgroup), and a
	 * command that was sent can't be taken back. A dead target ends the wait. */
	do {
		n = recv(session->agent_sock, message, sizeof(*message), 0);
		if (n == 0)
			return -EPIPE;
	} while ((n < 0 && errno == EINTR) || (n == sizeof(*message) && message->seq != seq));
	if (n != sizeof(*message) || message->magic != SNAPD_WIRE_MAGIC || message->nruns > SNAPD_WIRE_RUNS)
		return n < 0 ? -EPIPE : -EPROTO;
	return message->status;
}

/* The unmap's event may be read after somebody's REMAP onto the same addresses: it is owed before it can come. */
int mover_unmap(struct sn_session *session, const struct snapd_run *runs, unsigned int nruns)
{
	struct snapd_wire message = {.kind = SNAPD_UNMAP, .nruns = nruns};
	struct table *table;

	memcpy(message.runs, runs, nruns * sizeof(runs[0]));
	pthread_rwlock_wrlock(&session->lock);
	table = pm_edit(&session->pm);
	for (unsigned int i = 0; i < nruns; i++)
		pm_add_debt(table, runs[i].start, runs[i].start + runs[i].length);
	pm_commit(&session->pm, pm_applied(&session->pm));
	pthread_rwlock_unlock(&session->lock);
	return mover_call(session, &message);
}

int sn_agent_call(struct sn_session *session, void *message)
{
	int ret;

	pthread_mutex_lock(&session->mover);
	ret = mover_call(session, message);
	pthread_mutex_unlock(&session->mover);
	return ret;
}
