/* A mover that a signal has stopped in a stop, with its whole program: by ptrace it alone goes on, and finishes what it
 * was told. So a stop ends though nobody continues the program.
 *
 * When it is let go again the kernel stops it as before, if the program still is stopped. For the tracer of the stop;
 * when that ends first the kernel does the same. Knows nothing of commands.
 */
#include "internal.h"

#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

#define STAND_TRIES 100
#define TRY_US 1000

/* The tracer's own: it is a thread for one stop. */
static _Thread_local pid_t lifted;

/* What stops it again, a SIGSTOP or a SIGCONT for the program, is as if it had done its part. */
void lift(const struct sn_session *session)
{
	pid_t tid = session->agent_tids[1];
	int status;

	if (!lifted && (!dismiss_is_stopped(session) || ptrace(PTRACE_SEIZE, tid, NULL, NULL)))
		return;
	lifted = tid;
	while (waitpid(tid, &status, __WALL | WNOHANG) == tid && WIFSTOPPED(status))
		ptrace(PTRACE_CONT, tid, NULL, (void *)(long)(status >> 16 ? 0 : WSTOPSIG(status)));
}

void lift_end(void)
{
	pid_t tid = lifted;

	lifted = 0;
	if (!tid || ptrace(PTRACE_INTERRUPT, tid, NULL, NULL))
		return;
	for (int tries = 0; tries < STAND_TRIES; tries++) {
		int status;
		pid_t got = waitpid(tid, &status, __WALL | WNOHANG);

		if (got == tid && WIFSTOPPED(status))
			ptrace(PTRACE_DETACH, tid, NULL, (void *)(long)(status >> 16 ? 0 : WSTOPSIG(status)));
		if (got)
			return;
		usleep(TRY_US);
	}
}
