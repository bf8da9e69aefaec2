/* The stop: all threads of the target but the agent's stand, by ptrace, for about a millisecond.
 *
 * The tracer is a thread of its own; when it ends the kernel lets all go. A thread that was interrupted in a
 * blocking call goes back into it: the kernel restarts most by itself; those that it answers with EINTR are
 * restarted here where they have no time-out. Owns threads and their registers; knows nothing of memory. */
#include "internal.h"
#include "stop.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LIMIT_NS 10000000ULL
#define QUICK_NS 700000ULL	   /* for a stop that may as well be later */
#define LIMIT_A_THREAD_NS 30000ULL /* each thread that is found gives all of them so much more */
#define LINGER_NS 1000000000ULL
#define TICK_NS 500000L /* the tracer looks at the clock this often */
#define ONE_NS 3000000ULL /* so long one thread may take to stand before the next one is asked */
#define DEAF_TICKS 6
#define TICK_SIGNAL (SIGRTMIN + 9)
#define IO_URING_EXT_ARG 8

static _Thread_local const struct stop *mine; /* of the thread that is its tracer */

struct dirent64_raw {
	uint64_t ino;
	int64_t off;
	unsigned short reclen;
	unsigned char type;
	char name[];
};

/* Its delivery ends waitpid, but not PTRACE_SEIZE: the kernel repeats that whatever a handler does, so the only way
 * out of it is a jump. */
static void tick(int signal, siginfo_t *info, void *context)
{
	struct stop *stop = info->si_value.sival_ptr;

	(void)signal;
	(void)context;
	if (info->si_code == SI_TIMER && stop->seizing && now_ns() > stop->deadline_ns) {
		stop->seizing = 0;
		siglongjmp(stop->way_out, 1);
	}
}

struct stop *stop_create(void)
{
	/* SA_NODEFER: after the jump the signal is as open as before. */
	struct sigaction action = {.sa_sigaction = tick, .sa_flags = SA_SIGINFO | SA_NODEFER};

	sigaction(TICK_SIGNAL, &action, NULL);
	return calloc(1, sizeof(struct stop));
}

void stop_destroy(struct stop *stop)
{
	free(stop);
}

/* For how long a thread stood: until one does, all go on. */
uint64_t stop_lasted_ns(const struct stop *stop)
{
	return stop->first_ns ? stop->end_ns - stop->first_ns : 0;
}

int stop_threads(const struct stop *stop)
{
	return stop->nthreads;
}

int stop_cause(const struct stop *stop)
{
	return stop->cause;
}

pid_t stop_thread(const struct stop *stop, int index)
{
	const struct thread *thread = &stop->threads[index];

	return thread->stopped && !thread->gone ? thread->tid : 0;
}

bool stop_is_mine(const struct stop *stop)
{
	return stop && mine == stop;
}

bool stop_stands(const struct stop *stop)
{
	return stop->standing;
}

static void timer_end(struct stop *stop)
{
	if (stop->timer_set)
		timer_delete(stop->timer);
	stop->timer_set = false;
}

static int timer_begin(struct stop *stop)
{
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = TICK_SIGNAL,
		.sigev_value.sival_ptr = stop};
	struct itimerspec period = {.it_interval = {0, TICK_NS}, .it_value = {0, TICK_NS}};
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, TICK_SIGNAL);
	pthread_sigmask(SIG_UNBLOCK, &set, NULL);
	event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
	if (timer_create(CLOCK_MONOTONIC, &event, &stop->timer))
		return -errno;
	stop->timer_set = true;
	return timer_settime(stop->timer, 0, &period, NULL) ? -errno : 0;
}

static struct thread *find_thread(struct stop *stop, pid_t tid)
{
	for (int i = 0; i < stop->nthreads; i++)
		if (stop->threads[i].tid == tid)
			return &stop->threads[i];
	return NULL;
}

static struct thread *add_thread(struct stop *stop, pid_t tid)
{
	struct thread *thread = &stop->threads[stop->nthreads];

	if (stop->nthreads == MAX_THREADS)
		return NULL;
	stop->nthreads++;
	stop->deadline_ns += LIMIT_A_THREAD_NS;
	*thread = (struct thread){.tid = tid};
	return thread;
}

/* Returns 0 or an errno; ETIMEDOUT at the deadline. An execve of the target holds the lock that PTRACE_SEIZE takes
 * until the other threads are gone, and those that are traced must be waited for by their tracer: both would wait for
 * ever. */
static int seize(struct stop *stop, pid_t tid)
{
	int error;

	if (sigsetjmp(stop->way_out, 0))
		return ETIMEDOUT;
	stop->seizing = 1;
	error = ptrace(PTRACE_SEIZE, tid, NULL, NULL) ? errno : 0;
	stop->seizing = 0;
	return error;
}

/* Seizes threads that are not known yet and interrupts them. Returns how many, or a negative errno. */
static int seize_new(struct stop *stop, int tasks, const int skip[2])
{
	char names[4096];
	int found = 0;
	long n;

	lseek(tasks, 0, SEEK_SET);
	while ((n = syscall(SYS_getdents64, tasks, names, sizeof(names))) > 0) {
		for (long at = 0; at < n;) {
			const struct dirent64_raw *entry = (const void *)(names + at);
			pid_t tid = atoi(entry->name);
			int error;

			at += entry->reclen;
			if (tid <= 0 || tid == skip[0] || tid == skip[1] || find_thread(stop, tid))
				continue;
			if (stop->nthreads == MAX_THREADS)
				return -E2BIG;
			if (FAULT_ERROR(FP_THREAD_FOUND))
				continue;
			error = seize(stop, tid);
			if (error == ESRCH || (error == EPERM && task_may_be_left(stop->pid, tid)))
				continue;
			if (error == EPERM)
				return task_is_traced(stop->pid, tid) ? -EPERM : -EAGAIN;
			/* At the deadline nobody knows whether it was seized just then; if not, this fails. */
			if (ptrace(PTRACE_INTERRUPT, tid, NULL, NULL) == 0 || !error)
				add_thread(stop, tid);
			if (error)
				return -error;
			found++;
		}
	}
	return n < 0 ? -ESRCH : found;
}

/* Takes in what waitpid said of a thread. One that nobody knows is an execve's: it went on under its leader's id. */
static void take_in(struct stop *stop, pid_t tid, int status)
{
	struct thread *thread = find_thread(stop, tid);

	if (!thread && WIFSTOPPED(status))
		thread = add_thread(stop, tid);
	if (thread && WIFSTOPPED(status)) {
		if (!stop->first_ns)
			stop->first_ns = now_ns();
		thread->stopped = true;
		thread->gone = false;
		if (status >> 16 == 0) /* it had just taken a signal; else it stands because it was told to */
			thread->signal = WSTOPSIG(status);
	} else if (thread) {
		thread->gone = true;
	}
}

/* Those of whom waitpid may still have something to say. */
static int left(const struct stop *stop)
{
	int n = 0;

	for (int i = 0; i < stop->nthreads; i++)
		n += !stop->threads[i].stopped && !stop->threads[i].gone;
	return n;
}

/* An execve ends threads without a word: its own old id, and the leader's before that becomes its own. */
static void forget_ended(struct stop *stop)
{
	for (int i = 0; i < stop->nthreads; i++) {
		struct thread *thread = &stop->threads[i];

		if (!thread->stopped && syscall(SYS_tgkill, stop->pid, thread->tid, 0) && errno == ESRCH)
			thread->gone = true;
	}
}

static int wait_all(struct stop *stop)
{
	while (left(stop)) {
		int status;
		pid_t tid = waitpid(-1, &status, __WALL | __WNOTHREAD);

		if (tid > 0)
			take_in(stop, tid, status);
		else if (errno == ECHILD)
			return 0; /* all have gone */
		else
			forget_ended(stop);
		if (left(stop) && now_ns() > stop->deadline_ns)
			return -ETIMEDOUT;
	}
	return 0;
}

/* Calls that the kernel answers with EINTR after any stop: repeated by the kernel's own rule (a handler still gets its
 * EINTR) when they would otherwise have waited for ever. */
static bool waits_for_ever(const arch_regs *regs, long number)
{
	switch (number) {
	case SYS_epoll_wait:
	case SYS_epoll_pwait:
		return (int)arch_arg(regs, 3) < 0;
	case SYS_epoll_pwait2:
	case SYS_semtimedop:
		return !arch_arg(regs, 3);
	case SYS_semop:
		return true;
	case SYS_rt_sigtimedwait:
		return !arch_arg(regs, 2);
	case SYS_io_getevents:
	case SYS_io_pgetevents:
		return !arch_arg(regs, 4);
	case SYS_io_uring_enter:
		return !(arch_arg(regs, 3) & IO_URING_EXT_ARG);
	default:
		return false;
	}
}

/* Whatever comes with it: the kernel makes an EINTR of it where a handler is about to run, and repeats the call where
 * not, as it does when nobody traces. (Only a traced thread is woken by a signal that is ignored.) */
static void look_at_registers(struct thread *thread)
{
	long number, result;

	thread->have_regs = ptrace(PTRACE_GETREGS, thread->tid, NULL, &thread->regs) == 0;
	if (thread->have_regs && arch_in_syscall(&thread->regs, &number, &result) && result == -EINTR &&
	    waits_for_ever(&thread->regs, number)) {
		arch_restart(&thread->regs);
		ptrace(PTRACE_SETREGS, thread->tid, NULL, &thread->regs);
	}
}

/* Lets all go that stand; those that do not stay in the table. */
void stop_end(struct stop *stop)
{
	int kept = 0;

	if (stop->lent)
		borrow_end(stop);
	stop->standing = false;
	for (int i = 0; i < stop->nthreads; i++) {
		struct thread *thread = &stop->threads[i];

		if (thread->gone)
			continue;
		if (thread->stopped && !thread->have_regs)
			look_at_registers(thread);
		if (thread->stopped && ptrace(PTRACE_DETACH, thread->tid, NULL, (void *)(long)thread->signal) == 0) {
			if (thread->again) /* it came while the thread was lent */
				syscall(SYS_kill, stop->pid, thread->again);
			continue;
		}
		thread->stopped = false; /* it was killed as it stood: its end is still to be waited for */
		if (kept != i)
			stop->threads[kept] = *thread;
		kept++;
	}
	if (!stop->end_ns)
		stop->end_ns = now_ns();
	stop->nthreads = kept;
}

static bool all_deaf(struct stop *stop)
{
	bool ret = true;

	for (int i = 0; i < stop->nthreads; i++) {
		struct thread *thread = &stop->threads[i];

		thread->deaf = task_is_deaf(stop->pid, thread->tid) ? thread->deaf + 1 : 0;
		ret &= thread->deaf >= DEAF_TICKS;
	}
	return ret;
}

/* After a stop that was given up: who does not stand yet was interrupted all the same, and would return from its call
 * with EINTR if it were let go half way. So each is waited for while the others run, but one that sleeps where no
 * signal reaches it (vfork, a dead disk); that one is let go by the kernel when the tracer ends. */
static void see_off(struct stop *stop)
{
	uint64_t until = now_ns() + LINGER_NS;

	while (stop->nthreads && now_ns() < until) {
		int status;
		pid_t tid = waitpid(-1, &status, __WALL | __WNOTHREAD);

		if (tid > 0) {
			take_in(stop, tid, status);
		} else if (errno == ECHILD) {
			stop->nthreads = 0;
		} else {
			forget_ended(stop);
			if (all_deaf(stop))
				break;
		}
		stop_end(stop);
	}
}

static int stop_all(struct stop *stop, const int skip[2])
{
	char path[32];
	int found, tasks, error;

	snprintf(path, sizeof(path), "/proc/%d/task", stop->pid);
	tasks = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (tasks < 0)
		return -ESRCH;
	error = timer_begin(stop); /* without it nothing would limit the wait */
	/* A thread may start another until it stands itself: look until a pass finds no new one. */
	do {
		found = error ? error : seize_new(stop, tasks, skip);
		if (found > 0)
			error = wait_all(stop);
	} while (found > 0 && !error);
	close(tasks);
	return error ? error : found;
}

/* For a tracer. After any outcome but SN_MOVED all that stand have been let go again. An impatient one lets them go
 * soon when another does not get a CPU to stand on. */
int stop_begin(struct stop *stop, int pid, const int skip[2], bool patient)
{
	stop->pid = pid;
	stop->nthreads = 0;
	stop->first_ns = stop->end_ns = 0;
	stop->deadline_ns = now_ns() + (patient ? LIMIT_NS : QUICK_NS);
	stop->cause = stop_all(stop, skip);
	if (!stop->cause) {
		timer_end(stop);
		for (int i = 0; i < stop->nthreads; i++)
			if (stop->threads[i].stopped && !stop->threads[i].gone)
				look_at_registers(&stop->threads[i]);
		stop->standing = stop->nthreads > 0;
		return stop->nthreads ? SN_MOVED : SN_GONE;
	}
	stop_end(stop);
	return stop->cause == -ESRCH ? SN_GONE : stop->cause == -EPERM ? SN_TRACED : SN_BUSY;
}

static bool one_stands(struct stop *stop)
{
	for (int i = 0; i < stop->nthreads; i++)
		if (stop->threads[i].stopped && !stop->threads[i].gone && !stop->threads[i].signal)
			return true;
	return false;
}

/* Asks one thread after the other until one stands; those that were asked and do not are seen off at the end. */
static int stop_any(struct stop *stop)
{
	pid_t tids[MAX_CANDIDATES];
	int n = task_candidates(stop->pid, tids, MAX_CANDIDATES), error;

	if (n <= 0)
		return n ? n : -EAGAIN;
	error = timer_begin(stop);
	for (int i = 0; i < n && !error; i++) {
		error = seize(stop, tids[i]);
		if (error == ESRCH || error == EPERM) {
			error = error == EPERM && task_is_traced(stop->pid, tids[i]) ? -EPERM : 0;
			continue;
		}
		if (ptrace(PTRACE_INTERRUPT, tids[i], NULL, NULL) == 0 || !error)
			add_thread(stop, tids[i]);
		if (error)
			return -error;
		for (uint64_t until = now_ns() + ONE_NS; left(stop) && now_ns() < until;) {
			int status;
			pid_t tid = waitpid(-1, &status, __WALL | __WNOTHREAD);

			if (tid > 0)
				take_in(stop, tid, status);
			else
				forget_ended(stop);
			if (one_stands(stop))
				return 0;
		}
	}
	return error ? error : -EAGAIN;
}

/* For a tracer: one thread that can be lent stands, the others run on. As stop_begin else. */
int stop_begin_one(struct stop *stop, int pid)
{
	stop->pid = pid;
	stop->nthreads = 0;
	stop->first_ns = stop->end_ns = 0;
	stop->deadline_ns = now_ns() + LIMIT_NS;
	stop->cause = stop_any(stop);
	if (!stop->cause) {
		timer_end(stop);
		for (int i = 0; i < stop->nthreads; i++)
			if (stop->threads[i].stopped && !stop->threads[i].gone)
				look_at_registers(&stop->threads[i]);
		stop->standing = true;
		return SN_MOVED;
	}
	stop_finish(stop);
	return stop->cause == -ESRCH ? SN_GONE : stop->cause == -EPERM ? SN_TRACED : SN_BUSY;
}

/* For a tracer that has another stop to come: lets all go, also those that do not stand yet. */
void stop_finish(struct stop *stop)
{
	stop_end(stop);
	if (stop->nthreads && !stop->timer_set)
		timer_begin(stop);
	if (stop->timer_set)
		see_off(stop);
	timer_end(stop);
}

struct tracer {
	struct stop *stop;
	void (*run)(void *arg);
	void *arg;
	pid_t tid;
};

static void *tracer_main(void *arg)
{
	struct tracer *tracer = arg;

	tracer->tid = (pid_t)syscall(SYS_gettid);
	mine = tracer->stop;
	prefer_thread();
	tracer->run(tracer->arg);
	stop_finish(tracer->stop);
	return NULL;
}

/* Runs something that stops the target in a thread of its own, which is the tracer: when it ends, the kernel lets go of
 * a thread that would not stand and so can't be detached. Returns 0 or an errno. */
int stop_run(struct stop *stop, void (*run)(void *arg), void *arg)
{
	struct tracer tracer = {stop, run, arg, 0};
	pthread_t thread;
	int error = pthread_create(&thread, NULL, tracer_main, &tracer);

	if (error)
		return error;
	pthread_join(thread, NULL);
	/* It can be joined before the kernel has let its tracees go: the next stop would take it for a debugger. */
	while (syscall(SYS_tgkill, getpid(), tracer.tid, 0) == 0)
		usleep(20);
	stop->nthreads = 0;
	return 0;
}

int stop_places(const struct stop *stop, struct sn_thread *ret, int capacity)
{
	int n = 0;

	for (int i = 0; i < stop->nthreads && n < capacity; i++) {
		const struct thread *thread = &stop->threads[i];

		if (thread->have_regs)
			ret[n++] = (struct sn_thread){thread->tid, arch_sp(&thread->regs), arch_tls(&thread->regs)};
	}
	return n;
}

bool stop_touches(const struct stop *stop, uint64_t start, uint64_t end)
{
	for (int i = 0; i < stop->nthreads; i++) {
		const struct thread *thread = &stop->threads[i];
		uint64_t sp, tls;

		if (!thread->have_regs)
			continue;
		sp = arch_sp(&thread->regs);
		tls = PAGE_DOWN(arch_tls(&thread->regs));
		if ((sp >= start && sp < end) || (tls + 2 * PAGE > start && tls < end + PAGE))
			return true;
	}
	return false;
}
