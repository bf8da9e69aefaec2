/* What a stop knows of the threads that it holds: for stop.c, and for borrow.c, which lends one of them.
 */
#ifndef SN_STOP_H
#define SN_STOP_H

#include "internal.h"

#define SNAPD_ARCH_REGS
#include "../agent/arch.h"

#include <setjmp.h>
#include <signal.h>
#include <time.h>

#define MAX_CANDIDATES 16

struct thread {
	pid_t tid;
	int signal; /* to be delivered at the end: the thread had just taken it */
	int again;  /* to be sent to the process at the end, or 0 */
	int deaf;   /* ticks in a row at which it slept where no signal reaches it */
	bool stopped, gone, have_regs;
	arch_regs regs;
};

struct stop {
	int pid, nthreads, cause;
	uint64_t deadline_ns;
	uint64_t first_ns, end_ns; /* when the first thread was found standing, and all were let go */
	bool timer_set;
	bool standing; /* between the two ends of a stop */
	timer_t timer;
	volatile sig_atomic_t seizing;
	sigjmp_buf way_out;
	struct thread *lent; /* it runs what it is told, on behalf of loan; else NULL */
	struct loan *loan;
	struct thread threads[MAX_THREADS];
};

#endif
