/* The end of a mover that does not answer, by ptrace: that thread alone, wherever it is in the program's code.
 *
 * When it has gone nobody carries out a command any more, so what the maps and the events say stays true. A thread that
 * sleeps in the kernel for a dead disk cannot be ended: the caller tries again. Knows nothing of commands.
 */
#include "internal.h"

#define SNAPD_ARCH_REGS
#include "../agent/arch.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define STAND_TRIES 100
#define END_TRIES 1000
#define TRY_US 1000

bool dismiss_is_stopped(const struct sn_session *session)
{
	char path[64], text[256];
	const char *state;
	ssize_t n;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/stat", atomic_load(&session->pid), session->agent_tids[1]);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	n = read(fd, text, sizeof(text) - 1);
	close(fd);
	text[n > 0 ? n : 0] = 0;
	state = strrchr(text, ')');
	return state && state[1] == ' ' && state[2] == 'T';
}

/* 0: it stands; -ECHILD: it is somebody else's tracee, or gone. */
static int make_stand(pid_t tid, bool unfiltered)
{
	int status;

	/* Its seccomp filter is not asked about the one call that it makes for us, where we may. It may be ours
	 * already, from the last try. */
	if (ptrace(PTRACE_SEIZE, tid, NULL, (void *)(long)PTRACE_O_SUSPEND_SECCOMP)) {
		if (unfiltered)
			return errno == ESRCH ? -ESRCH : -EPERM;
		ptrace(PTRACE_SEIZE, tid, NULL, NULL);
	}
	ptrace(PTRACE_INTERRUPT, tid, NULL, NULL);
	for (int i = 0; i < STAND_TRIES; i++) {
		pid_t got = waitpid(tid, &status, __WALL | WNOHANG);

		if (got < 0)
			return -ECHILD;
		if (got == tid)
			return WIFSTOPPED(status) ? 0 : -ESRCH;
		usleep(TRY_US);
	}
	return -EAGAIN;
}

static bool has_gone(pid_t tid)
{
	int status;

	for (int i = 0; i < END_TRIES; i++) {
		pid_t got = waitpid(tid, &status, __WALL | WNOHANG);

		if (got < 0 || (got == tid && !WIFSTOPPED(status)))
			return true;
		if (got == tid) /* a stop that the whole program takes part in */
			ptrace(PTRACE_CONT, tid, NULL, NULL);
		else
			usleep(TRY_US);
	}
	return false;
}

int dismiss(struct sn_session *session, int tid, bool unfiltered)
{
	long word = 0, number, result;
	int error = make_stand(tid, unfiltered);
	bool patched = false;
	unsigned long at;
	arch_regs regs;

	if (error == -ESRCH || (error == -ECHILD && syscall(SYS_tgkill, atomic_load(&session->pid), tid, 0)))
		return 0;
	if (error)
		return error;
	if (ptrace(PTRACE_GETREGS, tid, NULL, &regs))
		return -errno;
	at = arch_ip(&regs) - ARCH_CALL_BYTES;
	if (!arch_in_syscall(&regs, &number, &result) ||
	    !arch_is_call(ptrace(PTRACE_PEEKTEXT, tid, (void *)at, NULL))) {
		at = arch_ip(&regs);
		word = ptrace(PTRACE_PEEKTEXT, tid, (void *)at, NULL);
		patched = ptrace(PTRACE_POKETEXT, tid, (void *)at, (void *)arch_with_call(word)) == 0;
		if (!patched)
			return -EFAULT;
	}
	arch_call(&regs, at, SYS_exit);
	if (ptrace(PTRACE_SETREGS, tid, NULL, &regs) || ptrace(PTRACE_CONT, tid, NULL, NULL) || !has_gone(tid))
		return -EAGAIN;
	if (patched) {
		char path[64];
		int fd;

		snprintf(path, sizeof(path), "/proc/%d/mem", atomic_load(&session->pid));
		fd = open(path, O_RDWR | O_CLOEXEC);
		if (fd >= 0 && pwrite(fd, &word, sizeof(word), (off_t)at) < 0)
			error = -errno; /* the code of a program that spun there on purpose: it is its own to mend */
		if (fd >= 0)
			close(fd);
	}
	return 0;
}
