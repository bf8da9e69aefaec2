/* The mover without an agent: the commands of wire.h as batches of system calls that a borrowed thread carries out.
 *
 * In a stop that is one of the threads that stand, lent from the first command to the stop's end. Outside of one it is
 * a thread that is stopped for this one command, while the others run on. The replies are those of agent.c, so that
 * whoever sends commands sees no difference. Knows no ptrace.
 */
#include "borrow.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PATIENCE_NS 10000000000ULL
#define HURRY_NS 2000000000ULL
#define AGAIN_US 2000
#define SINGLES (MAX_CALLS / 3) /* pages that are moved one by one in a batch */

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
static int each_run(struct stop *stop, struct loan *loan, unsigned int rule, long number, const struct snapd_wire *m,
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

/* A place in a pin pass: a page of a pair's run. */
struct place {
	unsigned int pair;
	uint64_t at;
};

static void move_call(struct loan *loan, unsigned int rule, unsigned int slot, const struct snapd_wire *m,
		      struct place from, uint64_t bytes)
{
	const struct snapd_run *run = &m->runs[2UL * from.pair];
	uint64_t to = m->runs[2UL * from.pair + 1].start + (from.at - run->start);

	loan->control->moves[slot] = (struct snapd_uffd_move){
		.dst = to, .src = from.at, .len = bytes, .mode = SNAPD_UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES};
	borrow_call(loan, rule, SYS_ioctl, ARGS((uint64_t)loan->uffd, SNAPD_UFFDIO_MOVE, control_in_target(loan) +
		    offsetof(struct control, moves) + slot * sizeof(loan->control->moves[0])));
}

/* All pairs from a place on. Returns how many were moved whole; ret: what the next one's move came to, bytes or a
 * negative errno. */
static int move_pairs(struct stop *stop, struct loan *loan, const struct snapd_wire *m, struct place from, int64_t *ret)
{
	unsigned int n = 0, npairs = m->nruns / 2;
	int error;

	for (struct place place = from; place.pair < npairs; n++) {
		const struct snapd_run *run = &m->runs[2UL * place.pair];

		move_call(loan, UNTIL_ERROR, n, m, place, run->start + run->length - place.at);
		if (++place.pair < npairs)
			place.at = m->runs[2UL * place.pair].start;
	}
	error = borrow_run(stop);
	if (error)
		return error;
	for (unsigned int k = 0; k < n; k++) {
		int64_t result = result_of(loan, (int)k), moved = loan->control->moves[k].move;

		if (!result)
			continue;
		*ret = moved ? moved : result;
		return (int)k;
	}
	return (int)n;
}

/* Whether there is a page at the place, or behind it. */
static bool find_page(const struct snapd_wire *m, struct place *place)
{
	while (place->pair < m->nruns / 2 &&
	       place->at >= m->runs[2UL * place->pair].start + m->runs[2UL * place->pair].length)
		if (++place->pair < m->nruns / 2)
			place->at = m->runs[2UL * place->pair].start;
	return place->pair < m->nruns / 2;
}

/* Moves the next pages one by one; one that is shared is made the program's own and tried again. No page behind one
 * that failed otherwise is tried: what was moved must not be moved again. Returns how many calls were queued. */
static unsigned int move_singly(struct loan *loan, const struct snapd_wire *m, struct place place, unsigned int limit)
{
	unsigned int n = 0;

	for (; n < limit && find_page(m, &place); n++, place.at += PAGE) {
		move_call(loan, UNTIL_ERROR | BUSY_IS_NONE, n, m, place, PAGE);
		borrow_call(loan, AFTER_BUSY, SYS_madvise, ARGS(place.at, PAGE, SNAPD_MADV_POPULATE_WRITE));
		move_call(loan, UNTIL_ERROR | BUSY_IS_NONE | AFTER_BUSY_2, n, m, place, PAGE);
	}
	return n;
}

struct pinned {
	struct snapd_run runs[SNAPD_WIRE_RUNS];
	unsigned int n;
};

static void add_pinned(struct pinned *pinned, uint64_t at)
{
	struct snapd_run *last = &pinned->runs[pinned->n - 1];

	if (pinned->n && last->start + last->length == at)
		last->length += PAGE;
	else
		pinned->runs[pinned->n++] = (struct snapd_run){at, PAGE};
}

static bool stays(int64_t result)
{
	return result == -EBUSY || result == -EEXIST || result == -ENOENT;
}

/* A batch of single pages. place: behind the last that was moved or stays. Returns 1 when the last of them was shared,
 * as the next one may be, 0, or a negative errno. */
static int pin_singly(struct stop *stop, struct loan *loan, const struct snapd_wire *m, struct place *place,
		      struct pinned *pinned)
{
	unsigned int n = move_singly(loan, m, *place, (unsigned int)min_u64(SINGLES, SNAPD_WIRE_RUNS - pinned->n));
	int error = borrow_run(stop), shared = 0;

	for (unsigned int k = 0; k < n && !error && find_page(m, place); k++) {
		int64_t result = result_of(loan, (int)(3 * k));

		shared = result == -EBUSY;
		if (shared)
			result = result_of(loan, (int)(3 * k + 2));
		if (result == -EAGAIN || result == -ECANCELED)
			return shared;
		if (stays(result))
			add_pinned(pinned, place->at);
		else if (result)
			return (int)result;
		place->at += PAGE;
	}
	return error ? error : shared;
}

/* As pin_pass() in agent.c. */
static int pin_pass(struct stop *stop, struct loan *loan, struct snapd_wire *m)
{
	struct place place = {0, m->runs[0].start};
	struct pinned pinned = {.n = 0};
	bool singly = false;
	int ret = 0;

	while (ret >= 0 && find_page(m, &place)) {
		int64_t done = 0;

		m->dest = place.pair;
		m->value = place.at;
		if (pinned.n == SNAPD_WIRE_RUNS) {
			m->flags = SNAPD_REPLY_MORE;
			break;
		}
		if (singly) {
			ret = pin_singly(stop, loan, m, &place, &pinned);
			m->dest = min_u64(place.pair, m->nruns / 2 - 1);
			m->value = place.at;
			singly = ret > 0;
			continue;
		}
		ret = move_pairs(stop, loan, m, place, &done);
		if (ret > 0) {
			place.pair += (unsigned int)ret;
			if (place.pair < m->nruns / 2)
				place.at = m->runs[2UL * place.pair].start;
		}
		m->dest = min_u64(place.pair, m->nruns / 2 - 1);
		m->value = place.at;
		if (done >= (int64_t)PAGE) {
			place.at += PAGE_DOWN((uint64_t)done);
		} else if (done == -EBUSY) {
			singly = true;
		} else if (stays(done)) {
			add_pinned(&pinned, place.at);
			place.at += PAGE;
		} else if (done && done != -EAGAIN) {
			ret = (int)done;
		}
	}
	memcpy(m->runs, pinned.runs, pinned.n * sizeof(pinned.runs[0]));
	m->nruns = pinned.n;
	return ret < 0 ? ret : 0;
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
	int outcome = own ? stop_begin_one(stop, atomic_load(&session->pid)) : SN_MOVED;
	int error = outcome == SN_MOVED ? 0 : meaning(outcome);

	if (!error && !stop->lent) {
		error = loan_find_code(session);
		if (!error)
			error = borrow_begin(stop, session->loan);
		if (error && error != MOVER_FILTERED)
			error = error == -ESRCH || error == -EPIPE ? -EPIPE : MOVER_SILENT;
	}
	order->ret = error ? error : carry_out(session, order->message);
	if (own && outcome == SN_MOVED) {
		stop_finish(stop);
		note(&session->borrows, stop_lasted_ns(stop));
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
	int error = lent ? 0 : loan_find_code(session);

	return !atomic_load(&session->pid) ? -ENOTCONN : error && error != -EPIPE ? MOVER_SILENT : error;
}

void sn_session_borrows(struct sn_session *session, struct sn_borrows *ret)
{
	pthread_mutex_lock(&session->mover);
	*ret = session->borrows;
	session->borrows = (struct sn_borrows){0};
	pthread_mutex_unlock(&session->mover);
}
