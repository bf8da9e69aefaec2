/* Whether a session's reader gets on: what a watchdog may ask at any time, from any thread but always the same.
 *
 * A reader that comes round its loop gets on, and so does one that waits for messages while there are none. Fill
 * threads are not asked: one that waits for a dead disk is no fault of ours, and no successor could end it.
 */
#include "internal.h"

#include <poll.h>

void pulse_wait(struct sn_session *session)
{
	atomic_fetch_add(&session->rounds, 1);
	atomic_store(&session->waiting, true);
}

void pulse_go_on(struct sn_session *session)
{
	atomic_store(&session->waiting, false);
}

int sn_session_gets_on(struct sn_session *session)
{
	uint64_t rounds = atomic_load(&session->rounds);
	struct pollfd unread = {.fd = session->uffd, .events = POLLIN};
	bool moved = rounds != session->rounds_seen;

	session->rounds_seen = rounds;
	return moved || (atomic_load(&session->waiting) && poll(&unread, 1, 0) == 0);
}
