/* The mover without an agent: the commands of wire.h as batches of system calls that a borrowed thread carries out.
 *
 * In a stop that is one of the threads that stand, lent from the first command to the stop's end. Outside of one it is
 * a thread that is stopped for this one command, while the others run on. The replies are those of agent.c, so that
 * whoever sends commands sees no difference. Knows no ptrace.
 */
#include "borrow.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PATIENCE_NS 10000000000ULL
#define HURRY_NS 2000000000ULL
#define AGAIN_US 2000

#define ARGS(...) ((const uint64_t[6]){__VA_ARGS__})

static uint64_t control_in_target(const struct loan *loan)
{
	return loan->code + CODE_BYTES;
}

static bool is_error(int64_t result)
{
	return result < 0 && result > -4096;
}

static int64_t result_of(const struct loan *loan, int call)
{
	return ((const volatile struct control *)loan->control)->calls[call].result;
}

static int move_aside(struct stop *stop, struct loan *loan, struct snapd_wire *m)
{
	int error;

	for (unsigned int i = 0; i + 1 < m->nruns; i += 2) {
		borrow_call(loan, CHAIN, SYS_mremap, ARGS(m->runs[i].start, m->runs[i].length, m->runs[i].length,
			    SNAPD_MREMAP_MAYMOVE | SNAPD_MREMAP_DONTUNMAP, m->runs[i + 1].start));
		borrow_call(loan, GO_ON, SYS_madvise, ARGS(0, m->runs[i].length, SNAPD_MADV_DONTFORK));
	}
	error = borrow_run(stop);
	for (unsigned int i = 0; i + 1 < m->nruns && !error; i += 2) {
		int64_t at = result_of(loan, (int)i);

		m->runs[i + 1] = is_error(at) ? (struct snapd_run){0, (uint64_t)-at}
					      : (struct snapd_run){(uint64_t)at, 0};
	}
	return error;
}

static int stage(struct stop *stop, struct loan *loan, struct snapd_wire *m)
{
	int64_t at;
	int error;

	borrow_call(loan, CHAIN, SYS_mmap, ARGS(m->dest, m->length, PROT_READ | PROT_WRITE,
		    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, (uint64_t)-1, 0));
	borrow_call(loan, GO_ON, SYS_madvise, ARGS(0, m->length, SNAPD_MADV_DONTFORK));
	error = borrow_run(stop);
	at = error ? error : result_of(loan, 0);
	if (is_error(at))
		return (int)at;
	m->value = (uint64_t)at;
	return (int)result_of(loan, 1);
}

static int bring_back(struct stop *stop, struct loan *loan, const struct snapd_wire *m)
{
	int64_t result;
	int error;

	borrow_call(loan, UNTIL_ERROR, SYS_madvise, ARGS(m->addr, m->length, SNAPD_MADV_DOFORK));
	borrow_call(loan, UNTIL_ERROR, SYS_mremap,
		    ARGS(m->addr, m->length, m->length, SNAPD_MREMAP_MAYMOVE | SNAPD_MREMAP_FIXED, m->dest));
	error = borrow_run(stop);
	result = error ? error : result_of(loan, 0);
	if (!is_error(result))
		result = result_of(loan, 1);
	return is_error(result) ? (int)result : 0;
}

/* The same call for all runs; the first error is the reply. */
static int each_run(struct stop *stop, struct loan *loan, enum rule rule, long number, const struct snapd_wire *m,
		    uint64_t last)
{
	int error, first = 0;

	for (unsigned int i = 0; i < m->nruns; i++)
		borrow_call(loan, rule, number, ARGS(m->runs[i].start, m->runs[i].length, last));
	error = borrow_run(stop);
	for (unsigned int i = 0; i < m->nruns && !error && !first; i++)
		if (is_error(result_of(loan, (int)i)))
			first = (int)result_of(loan, (int)i);
	return error ? error : first;
}

static int populate(struct stop *stop, struct loan *loan, uint64_t page)
{
	int error;

	borrow_call(loan, GO_ON, SYS_madvise, ARGS(page, PAGE, SNAPD_MADV_POPULATE_WRITE));
	error = borrow_run(stop);
	return error ? error : (int)result_of(loan, 0);
}

/* The pairs from one on, the first of them from an address on. Returns how many were moved whole; ret: what the next
 * one's move came to, bytes or a negative errno. */
static int move_pairs(struct stop *stop, struct loan *loan, const struct snapd_wire *m, unsigned int pair, uint64_t at,
		      int64_t *ret)
{
	struct control *control = loan->control;
	unsigned int n = 0, npairs = m->nruns / 2;
	int error;

	for (unsigned int k = pair; k < npairs; k++, n++) {
		const struct snapd_run *from = &m->runs[2UL * k];
		uint64_t skip = k == pair ? at - from->start : 0;

		control->moves[n] = (struct snapd_uffd_move){.dst = m->runs[2UL * k + 1].start + skip,
							     .src = from->start + skip, .len = from->length - skip,
							     .mode = SNAPD_UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES};
		borrow_call(loan, UNTIL_ERROR, SYS_ioctl, ARGS((uint64_t)loan->uffd, SNAPD_UFFDIO_MOVE,
			    control_in_target(loan) + offsetof(struct control, moves) + n * sizeof(control->moves[0])));
	}
	error = borrow_run(stop);
	if (error)
		return error;
	for (unsigned int k = 0; k < n; k++) {
		int64_t result = result_of(loan, (int)k), moved = control->moves[k].move;

		if (!result)
			continue;
		*ret = moved ? moved : result;
		return (int)k;
	}
	return (int)n;
}

/* As pin_pass() in agent.c. */
static int pin_pass(struct stop *stop, struct loan *loan, struct snapd_wire *m)
{
	struct snapd_run pinned[SNAPD_WIRE_RUNS];
	unsigned int npinned = 0, npairs = m->nruns / 2, i = 0;
	uint64_t at = m->runs[0].start, tried = 0;
	int ret = 0;

	while (i < npairs) {
		uint64_t end = m->runs[2UL * i].start + m->runs[2UL * i].length;
		int64_t done = 0;
		int whole;

		if (at >= end) {
			at = ++i < npairs ? m->runs[2UL * i].start : 0;
			continue;
		}
		whole = move_pairs(stop, loan, m, i, at, &done);
		if (whole < 0) {
			ret = whole;
			break;
		}
		if (whole) {
			i += (unsigned int)whole;
			at = i < npairs ? m->runs[2UL * i].start : 0;
			if (!done)
				continue;
		}
		m->dest = i;
		if (done >= (int64_t)PAGE) {
			at += PAGE_DOWN((uint64_t)done);
			continue;
		}
		if (done == -EAGAIN)
			continue;
		if (done == -EBUSY && tried != at) {
			tried = at;
			if (populate(stop, loan, at) == 0)
				continue;
		}
		if (done != -EBUSY && done != -EEXIST && done != -ENOENT) {
			m->value = at;
			ret = (int)done;
			break;
		}
		if (npinned && pinned[npinned - 1].start + pinned[npinned - 1].length == at) {
			pinned[npinned - 1].length += PAGE;
		} else if (npinned < SNAPD_WIRE_RUNS) {
			pinned[npinned++] = (struct snapd_run){at, PAGE};
		} else {
			m->value = at;
			m->flags = SNAPD_REPLY_MORE;
			break;
		}
		at += PAGE;
	}
	memcpy(m->runs, pinned, npinned * sizeof(pinned[0]));
	m->nruns = npinned;
	return ret;
}

/* A program may unmap what it did not map, and close what it did not open. */
static bool has_code(struct sn_session *session)
{
	struct snapd_procmap_query vma = {.size = sizeof(vma), .query_addr = session->loan->code};

	return ioctl(atomic_load(&session->maps_fd), SNAPD_PROCMAP_QUERY, &vma) == 0 &&
	       vma.vma_start == session->loan->code && vma.inode;
}

static int carry_out(struct sn_session *session, struct snapd_wire *m)
{
	struct stop *stop = session->stop;
	struct loan *loan = session->loan;

	m->flags = 0;
	if (m->nruns > SNAPD_WIRE_RUNS)
		return -EINVAL;
	switch (m->kind) {
	case SNAPD_STAGE:
		return stage(stop, loan, m);
	case SNAPD_MOVE:
		return move_aside(stop, loan, m);
	case SNAPD_GUARD:
		return each_run(stop, loan, UNTIL_ERROR, SYS_madvise, m, SNAPD_MADV_GUARD_INSTALL);
	case SNAPD_PIN:
		m->value = m->nruns ? m->runs[0].start : 0;
		return !m->nruns ? 0 : sn_session_has_uffd(session) ? pin_pass(stop, loan, m) : -EBADF;
	case SNAPD_BACK:
		return bring_back(stop, loan, m);
	case SNAPD_UNMAP:
		return each_run(stop, loan, GO_ON, SYS_munmap, m, 0);
	case SNAPD_ADVISE:
		return each_run(stop, loan, GO_ON, SYS_madvise, m, m->value);
	case SNAPD_PING:
		return 0;
	default:
		return -ENOSYS;
	}
}

struct order {
	struct sn_session *session;
	struct snapd_wire *message;
	int ret;
};

static int meaning(int outcome)
{
	return outcome == SN_GONE ? -EPIPE : MOVER_SILENT;
}

static void note(struct sn_borrows *borrows, uint64_t ns)
{
	borrows->stops++;
	borrows->sum_ns += ns;
	borrows->longest_ns = max_u64(borrows->longest_ns, ns);
}

static void order_main(void *arg)
{
	struct order *order = arg;
	struct sn_session *session = order->session;
	struct stop *stop = session->stop;
	bool own = !stop_stands(stop);
	uint64_t began = now_ns();
	int outcome = own ? stop_begin_one(stop, atomic_load(&session->pid)) : SN_MOVED;
	int error = outcome == SN_MOVED ? 0 : meaning(outcome);

	if (!error && !stop->lent) {
		error = has_code(session) ? borrow_begin(stop, session->loan) : -EFAULT;
		if (error && error != MOVER_FILTERED)
			error = error == -ESRCH ? -EPIPE : MOVER_SILENT;
	}
	order->ret = error ? error : carry_out(session, order->message);
	if (own && outcome == SN_MOVED) {
		stop_finish(stop);
		note(&session->borrows, now_ns() - began);
	}
}

/* Nothing was sent yet when no thread stands, so it may be tried again. */
static void try_on(struct order *order, bool spawn)
{
	struct sn_session *session = order->session;
	uint64_t began = now_ns();

	for (;;) {
		int error = spawn ? stop_run(session->stop, order_main, order) : 0;

		if (!spawn)
			order_main(order);
		if (error)
			order->ret = MOVER_SILENT;
		if (order->ret != MOVER_SILENT || stop_stands(session->stop) ||
		    now_ns() - began > (atomic_load(&session->hurry) ? HURRY_NS : PATIENCE_NS))
			return;
		if (!sn_session_alive(session)) {
			order->ret = -EPIPE;
			return;
		}
		mover_continue(session);
		usleep(AGAIN_US);
	}
}

int orders_call(struct sn_session *session, struct snapd_wire *message)
{
	struct order order = {session, message, MOVER_SILENT};

	if (message->kind == SNAPD_PING) /* nobody is in the middle of anything */
		return 0;
	if (!session_stop(session))
		return -ENOMEM;
	try_on(&order, !stop_is_mine(session->stop));
	message->status = order.ret;
	return order.ret;
}

int orders_ready(struct sn_session *session)
{
	bool lent = session->stop && session->stop->lent;

	return !atomic_load(&session->pid) ? -ENOTCONN : lent || has_code(session) ? 0 : MOVER_SILENT;
}

void sn_session_borrows(struct sn_session *session, struct sn_borrows *ret)
{
	pthread_mutex_lock(&session->mover);
	*ret = session->borrows;
	session->borrows = (struct sn_borrows){0};
	pthread_mutex_unlock(&session->mover);
}
