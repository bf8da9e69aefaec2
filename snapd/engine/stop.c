/* The stop: all threads of the target but the agent's stand, by ptrace, for about a millisecond.
 *
 * The tracer is the calling thread; when it dies the kernel lets all go. A thread that was interrupted in a
 * blocking call goes back into it: the kernel restarts most by itself; those that it answers with EINTR are
 * restarted here where they have no time-out. Owns threads and their registers; knows nothing of memory. */
#include "internal.h"

#define SNAPD_ARCH_REGS
#include "../agent/arch.h"

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
#define PATIENCE_NS 1000000L /* waitpid wakes up this often to look at the clock */
#define PF_IO_WORKER 0x10
#define PF_USER_WORKER 0x4000
#define PF_KTHREAD 0x200000
#define PTRACE_EVENT_STOPPED 128 /* PTRACE_EVENT_STOP */
#define IO_URING_EXT_ARG 8

struct thread {
	pid_t tid;
	int signal; /* to be delivered at the end: the thread had just taken it */
	bool stopped, gone, have_regs;
	arch_regs regs;
};

struct stop {
	int nthreads;
	bool timer_set;
	timer_t timer;
	struct thread threads[MAX_THREADS];
};

struct dirent64_raw {
	uint64_t ino;
	int64_t off;
	unsigned short reclen;
	unsigned char type;
	char name[];
};

static void wake_up(int signal)
{
	(void)signal; /* its delivery ends waitpid */
}

struct stop *stop_create(void)
{
	struct sigaction action = {.sa_handler = wake_up};

	sigaction(SIGRTMIN + 9, &action, NULL);
	return calloc(1, sizeof(struct stop));
}

void stop_destroy(struct stop *stop)
{
	free(stop);
}

int stop_threads(const struct stop *stop)
{
	return stop->nthreads;
}

static void set_timer(struct stop *stop, bool on)
{
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 9};
	struct itimerspec period = {.it_interval = {0, PATIENCE_NS}, .it_value = {0, PATIENCE_NS}};

	if (on) {
		event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
		stop->timer_set = timer_create(CLOCK_MONOTONIC, &event, &stop->timer) == 0 &&
				  timer_settime(stop->timer, 0, &period, NULL) == 0;
	} else if (stop->timer_set) {
		timer_delete(stop->timer);
		stop->timer_set = false;
	}
}

static struct thread *find_thread(struct stop *stop, pid_t tid)
{
	for (int i = 0; i < stop->nthreads; i++)
		if (stop->threads[i].tid == tid)
			return &stop->threads[i];
	return NULL;
}

/* Kernel workers of io_uring and dead leaders can't be traced and touch no memory by an address of ours that is being
 * moved: a worker's copy goes through page tables and faults like any other. */
static bool may_be_left(int pid, pid_t tid)
{
	char path[64], text[512], state = 0;
	unsigned int flags = 0;
	char *after;
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/stat", pid, tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return true;
	n = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (n <= 0)
		return true;
	text[n] = 0;
	after = strrchr(text, ')');
	if (!after || sscanf(after + 1, " %c %*d %*d %*d %*d %*d %u", &state, &flags) != 2)
		return false;
	return state == 'Z' || state == 'X' || flags & (PF_IO_WORKER | PF_USER_WORKER | PF_KTHREAD);
}

/* Seizes threads that are not known yet. Returns how many, or a negative errno. */
static int seize_new(struct stop *stop, int pid, const int skip[2])
{
	char path[32], names[4096];
	int found = 0, error = 0;
	long n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/task", pid);
	fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (fd < 0)
		return -ESRCH;
	while (!error && (n = syscall(SYS_getdents64, fd, names, sizeof(names))) > 0) {
		for (long at = 0; at < n && !error;) {
			const struct dirent64_raw *entry = (const void *)(names + at);
			pid_t tid = atoi(entry->name);
			struct thread *thread;

			at += entry->reclen;
			if (tid <= 0 || tid == skip[0] || tid == skip[1] || find_thread(stop, tid))
				continue;
			if (stop->nthreads == MAX_THREADS) {
				error = -E2BIG;
				break;
			}
			if (ptrace(PTRACE_SEIZE, tid, NULL, NULL)) {
				if (errno == ESRCH || may_be_left(pid, tid))
					continue;
				error = -EPERM;
				break;
			}
			thread = &stop->threads[stop->nthreads++];
			*thread = (struct thread){.tid = tid};
			ptrace(PTRACE_INTERRUPT, tid, NULL, NULL);
			found++;
		}
	}
	close(fd);
	return error ? error : found;
}

static int wait_all(struct stop *stop, uint64_t deadline_ns)
{
	for (;;) {
		struct thread *thread;
		int status, left = 0;
		pid_t tid;

		for (int i = 0; i < stop->nthreads; i++)
			left += !stop->threads[i].stopped && !stop->threads[i].gone;
		if (!left)
			return 0;
		tid = waitpid(-1, &status, __WALL | __WNOTHREAD);
		if (tid < 0 && errno == ECHILD)
			return 0; /* all have gone */
		thread = tid > 0 ? find_thread(stop, tid) : NULL;
		if (thread && WIFSTOPPED(status)) {
			thread->stopped = true;
			if (status >> 16 != PTRACE_EVENT_STOPPED && status >> 16 == 0)
				thread->signal = WSTOPSIG(status);
		} else if (thread) {
			thread->gone = true;
		}
		if (now_ns() > deadline_ns)
			return -ETIMEDOUT;
	}
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

static void look_at_registers(struct thread *thread)
{
	long number, result;

	thread->have_regs = ptrace(PTRACE_GETREGS, thread->tid, NULL, &thread->regs) == 0;
	if (thread->have_regs && !thread->signal && arch_in_syscall(&thread->regs, &number, &result) &&
	    result == -EINTR && waits_for_ever(&thread->regs, number)) {
		arch_restart(&thread->regs);
		ptrace(PTRACE_SETREGS, thread->tid, NULL, &thread->regs);
	}
}

/* Lets all go that stand. One that does not stand yet is let go by the kernel when the calling thread ends. */
void stop_end(struct stop *stop)
{
	for (int i = 0; i < stop->nthreads; i++) {
		struct thread *thread = &stop->threads[i];

		if (!thread->stopped || thread->gone)
			continue;
		if (!thread->have_regs)
			look_at_registers(thread);
		ptrace(PTRACE_DETACH, thread->tid, NULL, (void *)(long)thread->signal);
	}
	stop->nthreads = 0;
}

int stop_begin(struct stop *stop, int pid, const int skip[2])
{
	uint64_t deadline = now_ns() + LIMIT_NS;
	int found, error = 0;

	stop->nthreads = 0;
	set_timer(stop, true);
	/* A thread may start another until it stands itself: look until a pass finds no new one. */
	do {
		found = seize_new(stop, pid, skip);
		if (found > 0)
			error = wait_all(stop, deadline);
	} while (found > 0 && !error);
	set_timer(stop, false);
	if (found >= 0 && !error) {
		for (int i = 0; i < stop->nthreads; i++)
			if (stop->threads[i].stopped && !stop->threads[i].gone)
				look_at_registers(&stop->threads[i]);
		return stop->nthreads ? SN_MOVED : SN_GONE;
	}
	if (error)
		return SN_BUSY;
	return found == -ESRCH ? SN_GONE : found == -EPERM ? SN_TRACED : SN_BUSY;
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

struct survey_job {
	struct sn_session *session;
	struct stop *stop;
	struct sn_thread *ret;
	int capacity, n, outcome;
	uint64_t stop_ns;
};

static void *survey_main(void *arg)
{
	struct survey_job *job = arg;
	uint64_t began = now_ns();

	prefer_thread();
	job->outcome = stop_begin(job->stop, atomic_load(&job->session->pid), job->session->agent_tids);
	for (int i = 0; i < job->stop->nthreads && job->n < job->capacity; i++) {
		const struct thread *thread = &job->stop->threads[i];

		if (thread->have_regs)
			job->ret[job->n++] = (struct sn_thread){thread->tid, arch_sp(&thread->regs),
				arch_tls(&thread->regs)};
	}
	stop_end(job->stop);
	job->stop_ns = now_ns() - began;
	return NULL;
}

int sn_survey(struct sn_session *session, struct sn_thread *ret, int capacity, int *ret_n, uint64_t *ret_stop_ns)
{
	struct survey_job job = {.session = session, .ret = ret, .capacity = capacity, .outcome = SN_FAILED};
	pthread_t thread;

	pthread_mutex_lock(&session->mover);
	job.stop = session_stop(session);
	if (job.stop && pthread_create(&thread, NULL, survey_main, &job) == 0)
		pthread_join(thread, NULL);
	pthread_mutex_unlock(&session->mover);
	*ret_n = job.n;
	*ret_stop_ns = job.stop_ns;
	return job.outcome;
}
