/* The mover: one command, one reply, and what happens when no reply comes from an agent's socket. Without an agent it
 * is orders.c that carries it out.
 *
 * For whoever holds session->mover. Knows the wire format; no policy.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define AWAKE_NS 2000000ULL /* what nearly all stops take */
#define COMMAND_NS 10000000000ULL
#define HURRY_NS 2000000000ULL
#define STANDING_NS 20000000ULL /* nothing was moved yet: no reason to let the program stand for longer */
#define AGAIN_NS 1000000000ULL
#define SETTLE_US 500
#define TICK_US 10000 /* packing pauses for no longer wait than this */
#define STRANGERS 64
#define FULL_BYTES (32 << 10) /* of a connection, by what is queued for the agent; a command needs room as well */
#define STATUS_BYTES 8192 /* Seccomp stands behind the list of groups */

void mover_attach(struct sn_session *session, int agent_sock)
{
	struct timeval tick = {.tv_usec = TICK_US};
	char path[64];

	session->agent_sock = agent_sock;
	session->status_fd = -1;
	session->mover_owes = session->mover_ended = false;
	if (agent_sock < 0)
		return;
	setsockopt(agent_sock, SOL_SOCKET, SO_RCVTIMEO, &tick, sizeof(tick));
	snprintf(path, sizeof(path), "/proc/%d/task/%d/status", atomic_load(&session->pid), session->agent_tids[1]);
	session->status_fd = open(path, O_RDONLY | O_CLOEXEC);
}

/* A filter that the program put on all its threads may kill it for a call of its mover. */
static bool is_filtered(const struct sn_session *session)
{
	char text[STATUS_BYTES + 1];
	ssize_t n = pread(session->status_fd, text, STATUS_BYTES, 0);
	const char *line;

	text[n > 0 ? n : 0] = 0;
	line = strstr(text, "\nSeccomp:");
	return line && atoi(line + sizeof("\nSeccomp:") - 1) != 0;
}

/* A message beside all commands, which gets no reply: for whoever holds session->lock. One that finds the connection
 * full would keep a command from being sent. */
static void tell(struct sn_session *session, struct snapd_wire *message, const int *fds, unsigned int nfds)
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(2 * sizeof(int))];
	} control = {.header = {.cmsg_len = CMSG_LEN(nfds * sizeof(int)), .cmsg_level = SOL_SOCKET,
				.cmsg_type = SCM_RIGHTS}};
	struct iovec iov = {message, sizeof(*message)};
	struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1};
	int queued = 0;

	if (session->agent_sock < 0 || ioctl(session->agent_sock, SIOCOUTQ, &queued) || queued > FULL_BYTES ||
	    is_filtered(session)) /* it would die of what it was told */
		return;
	message->magic = SNAPD_WIRE_MAGIC;
	message->version = SNAPD_WIRE_VERSION;
	if (nfds) {
		memcpy(CMSG_DATA(&control.header), fds, nfds * sizeof(int));
		header.msg_control = &control;
		header.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
	}
	while (sendmsg(session->agent_sock, &header, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno == EINTR)
		;
}

/* Best effort: when daemon and keeper die together, a child without an agent has nobody else, and would read zeros. */
void mover_keep(struct sn_session *session, const struct sn_session *child)
{
	struct snapd_wire message = {.kind = SNAPD_KEEP, .value = child->number};
	int fds[2] = {child->uffd, -1};
	char path[32];

	if (session->agent_sock < 0)
		return;
	snprintf(path, sizeof(path), "/proc/self/fd/%d", child->pm.fd);
	fds[1] = open(path, O_RDONLY | O_CLOEXEC); /* an agent gets no page map that it could write to */
	if (fds[1] < 0)
		return;
	tell(session, &message, fds, 2);
	close(fds[1]);
}

void sn_session_keep(struct sn_session *session, struct sn_session *child)
{
	pthread_rwlock_rdlock(&session->lock);
	mover_keep(session, child);
	pthread_rwlock_unlock(&session->lock);
}

void sn_session_let(struct sn_session *session, uint32_t child)
{
	struct snapd_wire message = {.kind = SNAPD_LET, .value = child};

	pthread_rwlock_rdlock(&session->lock);
	tell(session, &message, NULL, 0);
	pthread_rwlock_unlock(&session->lock);
}

void mover_detach(struct sn_session *session)
{
	if (session->agent_sock >= 0)
		close(session->agent_sock);
	if (session->status_fd >= 0)
		close(session->status_fd);
}

/* Packing pauses while the target stands or its mover runs, but not for one that takes its time. */
void mover_pause(struct sn_session *session)
{
	pack_pause();
	pack_wait(session);
	awake_for(AWAKE_NS);
	session->pausing = true;
}

void mover_continue(struct sn_session *session)
{
	if (session->pausing)
		pack_continue();
	session->pausing = false;
}

/* Takes the reply to the last command. -EAGAIN: it has not come. */
static int take_reply(struct sn_session *session, struct snapd_wire *ret, int flags)
{
	for (int i = 0; i < STRANGERS; i++) {
		ssize_t n = recv(session->agent_sock, ret, sizeof(*ret), flags);

		if (n == 0)
			return -EPIPE;
		if (n < 0)
			return errno == EINTR || errno == EAGAIN ? -EAGAIN : -EPIPE;
		if (n == sizeof(*ret) && ret->seq != session->mover_seq)
			continue;
		return n != sizeof(*ret) || ret->magic != SNAPD_WIRE_MAGIC || ret->nruns > SNAPD_WIRE_RUNS ? -EPROTO
													   : 0;
	}
	return -EAGAIN;
}

/* In a stop a mover that may still carry out what it was told must not be left behind: the program would run while its
 * memory is moved. One that a signal has stopped goes on by lift.c; if not, it stands with the whole program, and is
 * waited for. */
static bool ended_in_stop(struct sn_session *session)
{
	if (!atomic_load(&session->hurry) && dismiss_is_stopped(session))
		return false;
	session->mover_ended = dismiss(session, session->agent_tids[1], false) == 0;
	return session->mover_ended;
}

static uint64_t limit_ns(const struct sn_session *session)
{
	return session->standing ? STANDING_NS : atomic_load(&session->hurry) ? HURRY_NS : COMMAND_NS;
}

static int wait_reply(struct sn_session *session, struct snapd_wire *ret)
{
	uint64_t began = now_ns(), again = 0;
	int error;

	while ((error = take_reply(session, ret, 0)) == -EAGAIN) {
		uint64_t now = now_ns();

		mover_continue(session);
		if (session->in_stop)
			lift(session);
		if (now - began < limit_ns(session) || now < again)
			continue;
		if (!session->in_stop) {
			session->mover_owes = true;
			return MOVER_LATE;
		}
		again = now + AGAIN_NS;
		if (!ended_in_stop(session))
			continue;
		error = take_reply(session, ret, MSG_DONTWAIT); /* it may have been quicker */
		return error == -EAGAIN ? MOVER_SILENT : error;
	}
	return error;
}

static int send_and_wait(struct sn_session *session, struct snapd_wire *message)
{
	ssize_t n;
	int error;

	if (session->loan)
		return orders_call(session, message);
	message->magic = SNAPD_WIRE_MAGIC;
	message->version = SNAPD_WIRE_VERSION;
	message->seq = ++session->mover_seq;
	do {
		n = send(session->agent_sock, message, sizeof(*message), MSG_NOSIGNAL | MSG_DONTWAIT);
	} while (n < 0 && errno == EINTR);
	if (n != sizeof(*message))
		return n < 0 && errno == EAGAIN ? MOVER_SILENT : -EPIPE;
	error = wait_reply(session, message);
	return error ? error : message->status;
}

static void set_dropping(struct sn_session *session, uint64_t start, uint64_t end)
{
	pthread_rwlock_wrlock(&session->lock);
	pm_set_dropping(&session->pm, (struct interval){start, end});
	pthread_rwlock_unlock(&session->lock);
}

/* The unmap's event may be read after somebody's REMAP onto the same addresses: it is known before it can come, and
 * until the reply is here. Then it was read, and taking the lock makes sure that it was applied. */
static int unmap_and_wait(struct sn_session *session, struct snapd_run run)
{
	struct snapd_wire message = {.kind = SNAPD_UNMAP, .nruns = 1, .runs = {run}};
	int ret;

	set_dropping(session, run.start, run.start + run.length);
	ret = send_and_wait(session, &message);
	if (ret != MOVER_LATE)
		set_dropping(session, 0, 0);
	return ret;
}

/* A command that was given up on is carried out some time all the same: until its reply is here there is no next one.
 * Nobody knows of a staging that came too late. */
static int settle_debt(struct sn_session *session)
{
	struct snapd_wire late;
	int error = take_reply(session, &late, MSG_DONTWAIT);

	if (error)
		return error == -EAGAIN ? MOVER_SILENT : error;
	session->mover_owes = false;
	set_dropping(session, 0, 0);
	if (late.kind == SNAPD_STAGE && !late.status)
		error = unmap_and_wait(session, (struct snapd_run){late.value, late.length});
	return error;
}

/* After MOVER_LATE in a stop that has ended: waits as long for the reply as outside of one. */
int mover_settle(struct sn_session *session)
{
	uint64_t end = now_ns() + limit_ns(session);
	int error;

	while ((error = mover_ready(session)) == MOVER_SILENT && !session->mover_ended && now_ns() < end)
		usleep(SETTLE_US);
	return error;
}

int mover_ready(struct sn_session *session)
{
	if (session->loan)
		return orders_ready(session);
	if (session->agent_sock < 0)
		return -ENOTCONN;
	if (session->mover_ended)
		return MOVER_SILENT;
	if (!session->in_stop && is_filtered(session)) /* nobody sets one in a stop */
		return MOVER_FILTERED;
	return session->mover_owes ? settle_debt(session) : 0;
}

int mover_call(struct sn_session *session, struct snapd_wire *message)
{
	int error = mover_ready(session);

	return error ? error : send_and_wait(session, message);
}

int mover_unmap(struct sn_session *session, struct snapd_run run)
{
	int error = mover_ready(session);

	return error ? error : unmap_and_wait(session, run);
}

int sn_agent_call(struct sn_session *session, void *message)
{
	int ret;

	pthread_mutex_lock(&session->mover);
	ret = mover_call(session, message);
	pthread_mutex_unlock(&session->mover);
	return ret;
}

int sn_session_answers(struct sn_session *session)
{
	int ret;

	pthread_mutex_lock(&session->mover);
	ret = mover_ready(session);
	pthread_mutex_unlock(&session->mover);
	return ret;
}

int sn_session_dismiss(struct sn_session *session)
{
	int error = 0;

	pthread_mutex_lock(&session->mover);
	for (int i = 0; i < 2 && !error && session->agent_sock >= 0; i++)
		error = dismiss(session, session->agent_tids[i], true);
	session->mover_ended |= !error;
	pthread_mutex_unlock(&session->mover);
	return error;
}

void sn_session_hurry(struct sn_session *session)
{
	atomic_store(&session->hurry, true);
}
