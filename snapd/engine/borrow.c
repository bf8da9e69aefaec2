/* A borrowed thread: one of the target's own that stands is made to carry out batches of system calls, and then is put
 * back as it was.
 *
 * It runs a few lines of code that are mapped in the target (ARCH_STUB) and talks with the tracer over a page that both
 * share. The tracer may die at any instant: so whatever the thread has to be put back to lies in that page before its
 * registers change, and the word that it looks at before each call is one that the kernel itself clears when the tracer
 * dies, before it lets go of any thread. From then on the code moves nothing more and puts the thread back by itself.
 * Knows no commands and no session.
 */
#include "borrow.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHANGED FUTEX_OWNER_DIED /* a bit that the kernel does not look at when it asks whose a word is */
#define TICK_NS 10000000L
#define GET_RSEQ 0x420f /* PTRACE_GET_RSEQ_CONFIGURATION, newer than some headers */
#define GET_DISPATCH 0x4210 /* PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG */
#define GET_FILTER 0x420c /* PTRACE_SECCOMP_GET_FILTER */
#define EVENT_STOP 128

struct rseq_config {
	uint64_t at;
	uint32_t size, signature, flags, unused;
};
struct dispatch_config {
	uint64_t mode, selector, offset, length;
};
struct section { /* struct rseq_cs of the kernel */
	uint32_t version, flags;
	uint64_t start, length, abort;
};

static struct robust_head {
	void *next;
	long offset;
	void *pending;
} *robust_of(struct loan *loan)
{
	static _Thread_local struct robust_head head;

	head = (struct robust_head){&head, 0, loan ? &loan->control->word : NULL};
	return &head;
}

static int peek(pid_t tid, uint64_t at, void *to, size_t bytes)
{
	for (size_t i = 0; i < bytes; i += sizeof(long)) {
		long word;

		errno = 0;
		word = ptrace(PTRACE_PEEKDATA, tid, (void *)(at + i), NULL);
		if (errno)
			return -errno;
		memcpy((char *)to + i, &word, sizeof(word));
	}
	return 0;
}

/* Inside a restartable sequence a thread that is stopped goes on at the sequence's abort. The kernel sees to that when
 * it lets the thread go, but not for one whose registers point elsewhere by then. */
static int leave_sequence(struct thread *thread)
{
	struct rseq_config config = {0};
	struct section section;
	uint64_t at = 0;
	int error;

	if (ptrace(GET_RSEQ, thread->tid, (void *)sizeof(config), &config) < 0 || !config.at)
		return 0;
	error = peek(thread->tid, config.at + 8, &at, sizeof(at));
	if (error || !at)
		return error;
	error = peek(thread->tid, at, &section, sizeof(section));
	if (!error && arch_ip(&thread->regs) - section.start < section.length)
		arch_go(&thread->regs, section.abort);
	return error;
}

/* Where its own seccomp filter would be asked, nothing is called. */
int borrow_ready(struct stop *stop, struct thread *thread)
{
	struct dispatch_config dispatch = {0};

	if (!thread->stopped || thread->gone || thread->signal || !thread->have_regs)
		return -EAGAIN;
	if (!arch_is_64(&thread->regs))
		return -ENOEXEC;
	if (ptrace(PTRACE_SETOPTIONS, thread->tid, NULL,
		   (void *)(long)(PTRACE_O_TRACESYSGOOD | PTRACE_O_SUSPEND_SECCOMP))) {
		if (task_is_filtered(stop->pid, thread->tid))
			return MOVER_FILTERED;
		ptrace(PTRACE_SETOPTIONS, thread->tid, NULL, (void *)(long)PTRACE_O_TRACESYSGOOD);
	}
	if (ptrace(GET_DISPATCH, thread->tid, (void *)sizeof(dispatch), &dispatch) == 0 && dispatch.mode)
		return -EOPNOTSUPP;
	return leave_sequence(thread);
}

static long get_mask(struct thread *thread, uint64_t *ret)
{
	return ptrace(PTRACE_GETSIGMASK, thread->tid, (void *)sizeof(*ret), ret);
}

static void set_mask(struct thread *thread, uint64_t mask)
{
	ptrace(PTRACE_SETSIGMASK, thread->tid, (void *)sizeof(mask), &mask);
}

/* Without CAP_SYS_ADMIN the kernel does not say, but then no filtered thread is lent. */
static bool is_filtered(const struct stop *stop, const struct thread *thread)
{
	long n = ptrace(GET_FILTER, thread->tid, NULL, NULL);

	return n >= 0 || (errno != EINVAL && task_is_filtered(stop->pid, thread->tid));
}

/* It goes before others as long as it is lent. A filter might kill it for what it would call when we die: then the next
 * daemon does that. */
static void hasten(const struct stop *stop, struct loan *loan)
{
	struct control *control = loan->control;
	uint64_t attr = loan->code + CODE_BYTES + offsetof(struct control, sched);

	control->nundo = 0;
	haste_begin(stop->lent->tid, loan->haste);
	if (!atomic_load(&loan->haste->tid) || is_filtered(stop, stop->lent))
		return;
	control->sched = loan->haste->was;
	control->undo[0] = (struct call){.number = SYS_sched_setattr, .args = {0, attr, 0}};
	control->undo[1] = (struct call){.number = SYS_prctl, .args = {PR_SET_TIMERSLACK, loan->haste->slack_ns}};
	control->nundo = 2;
}

/* Chooses a thread of those that stand. It goes on standing until the first batch. */
int borrow_begin(struct stop *stop, struct loan *loan)
{
	int error = -EAGAIN;

	for (int i = 0; i < stop->nthreads && error; i++) {
		struct thread *thread = &stop->threads[i];

		error = borrow_ready(stop, thread);
		if (!error && get_mask(thread, &loan->mask))
			error = -ESRCH;
		if (!error)
			stop->lent = thread;
	}
	if (error)
		return error;
	loan->control->mask = loan->mask;
	loan->control->regs = stop->lent->regs;
	arch_as_resumed(&loan->control->regs);
	atomic_store(&loan->control->word, 0);
	loan->ncalls = 0;
	loan->stands = true;
	stop->loan = loan;
	hasten(stop, loan);
	return 0;
}

void borrow_call(struct loan *loan, unsigned int rules, long number, const uint64_t args[6])
{
	struct call *call = &loan->control->calls[loan->ncalls++];

	*call = (struct call){.number = (uint64_t)number, .result = -ECANCELED, .rule = rules};
	memcpy(call->args, args, sizeof(call->args));
}

static long futex(_Atomic uint32_t *word, int operation, uint32_t value, const struct timespec *time)
{
	return syscall(SYS_futex, word, operation, value, time, NULL, 0);
}

/* In this order: whenever the tracer dies the thread has its own registers, or runs the code that puts all back. */
static int start(struct stop *stop, struct loan *loan)
{
	arch_regs regs = stop->lent->regs;

	syscall(SYS_get_robust_list, 0, &loan->robust_head, &loan->robust_bytes);
	syscall(SYS_set_robust_list, robust_of(loan), sizeof(struct robust_head));
	arch_go(&regs, loan->code);
	if (ptrace(PTRACE_SETREGS, stop->lent->tid, NULL, &regs))
		return -EPIPE;
	set_mask(stop->lent, ~0ULL);
	if (ptrace(PTRACE_CONT, stop->lent->tid, NULL, NULL))
		return -EPIPE;
	loan->stands = false;
	return 0;
}

/* What waitpid has to say of the lent thread: 0: it stands as it was told to, or with its process; -EAGAIN: it goes on;
 * -EPIPE: it has ended; -EFAULT: it stands at a fault of its own. */
static int take_in(struct thread *thread, int status)
{
	if (!WIFSTOPPED(status)) {
		thread->gone = true;
		return -EPIPE;
	}
	if (status >> 16 == EVENT_STOP)
		return 0;
	if (WSTOPSIG(status) == SIGSTOP) { /* cannot be blocked: the process has it afterwards */
		thread->again = SIGSTOP;
		ptrace(PTRACE_CONT, thread->tid, NULL, NULL);
		return -EAGAIN;
	}
	return -EFAULT;
}

int borrow_run(struct stop *stop)
{
	static const struct timespec tick = {.tv_nsec = TICK_NS};
	struct loan *loan = stop->loan;
	struct control *control = loan->control;
	uint32_t before = atomic_load(&control->word), word;
	int error = 0;

	if (stop->lent->gone || (before && loan->stands))
		return stop->lent->gone ? -EPIPE : -EFAULT;
	word = ((uint32_t)syscall(SYS_gettid) & FUTEX_TID_MASK) | FUTEX_WAITERS | (~before & CHANGED);
	control->ncalls = (uint32_t)loan->ncalls;
	control->nran = 0;
	loan->ncalls = 0;
	atomic_store(&control->done, ~word);
	atomic_store(&control->word, word);
	if (before)
		futex(&control->word, FUTEX_WAKE, 1, NULL);
	else
		error = start(stop, loan);
	while (!error && atomic_load(&control->done) != word) {
		int status;

		futex(&control->done, FUTEX_WAIT, ~word, &tick);
		if (atomic_load(&control->done) == word)
			break;
		if (waitpid(stop->lent->tid, &status, __WALL | __WNOTHREAD | WNOHANG) == stop->lent->tid) {
			error = take_in(stop->lent, status);
			if (!error) /* its process is stopped: it joins that when it is let go */
				ptrace(PTRACE_CONT, stop->lent->tid, NULL, NULL);
			else if (error == -EAGAIN)
				error = 0;
			else
				loan->stands = true;
		}
	}
	return error;
}

/* The thread is what it was again, and stands. */
void borrow_end(struct stop *stop)
{
	struct loan *loan = stop->loan;
	struct thread *thread = stop->lent;
	int status, error = -EAGAIN;

	stop->lent = NULL;
	if (!atomic_load(&loan->control->word)) { /* it was never set going */
		haste_end(loan->haste);
		return;
	}
	if (!loan->stands)
		ptrace(PTRACE_INTERRUPT, thread->tid, NULL, NULL);
	while (!loan->stands && error == -EAGAIN) {
		pid_t tid = waitpid(thread->tid, &status, __WALL | __WNOTHREAD);

		if (tid == thread->tid)
			error = take_in(thread, status);
		else if (tid < 0 && errno != EINTR)
			break;
	}
	if (!thread->gone) {
		set_mask(thread, loan->mask);
		ptrace(PTRACE_SETREGS, thread->tid, NULL, &thread->regs);
	}
	haste_end(loan->haste);
	syscall(SYS_set_robust_list, loan->robust_head, loan->robust_bytes);
	atomic_store(&loan->control->word, 0);
}
