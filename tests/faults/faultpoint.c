/* What happens at a fault point, as the plan says: a file that the environment variable SNAPD_FAULT names, which a test
 * and all daemons that follow each other have mapped. Linked into the tests' own build of the engine, and no other.
 *
 * The plan is steps, one after the other: at a point, after so many passes, an action, so many times. A daemon that is
 * to be killed has taken its step before it is: the next one goes on with the plan. A plan that is disarmed ends a wait
 * at once. */
#include "../../snapd/engine/internal.h"

#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum action { ACTION_KILL = 1, ACTION_STOP, ACTION_DELAY, ACTION_SHORT, ACTION_ERROR };
#define MAX_STEPS 8
#define PAUSE_US 1000

struct step {
	uint32_t point, action, value, skip, times; /* value: an errno, or milliseconds */
};
struct plan {
	_Atomic uint32_t at; /* the step that is next */
	struct step steps[MAX_STEPS];
	_Atomic uint32_t passes[FP_COUNT]; /* how often each point was come to */
};

static struct plan *plan;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void open_plan(void)
{
	const char *path = getenv("SNAPD_FAULT");
	int fd = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
	void *at;

	if (fd < 0)
		return;
	at = mmap(NULL, sizeof(*plan), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (at != MAP_FAILED)
		plan = at;
}

static struct step take_step(enum fault_point point)
{
	struct step taken = {0}, *step;
	uint32_t at;

	pthread_mutex_lock(&lock);
	at = atomic_load(&plan->at);
	step = &plan->steps[at < MAX_STEPS ? at : 0];
	if (at < MAX_STEPS && step->point == (uint32_t)point && step->times && (!step->skip || !step->skip--)) {
		taken = *step;
		if (!--step->times)
			atomic_store(&plan->at, at + 1);
	}
	pthread_mutex_unlock(&lock);
	return taken;
}

/* For the daemon's Python too. */
__attribute__((visibility("default"))) int fault_point(enum fault_point point)
{
	struct step step;

	if (!plan || point >= FP_COUNT)
		return 0;
	atomic_fetch_add(&plan->passes[point], 1);
	step = take_step(point);
	switch (step.action) {
	case ACTION_KILL:
		kill(getpid(), SIGKILL);
		for (;;)
			pause();
	case ACTION_STOP:
		kill(getpid(), SIGSTOP);
		return 0;
	case ACTION_DELAY:
		for (uint32_t i = 0; i < step.value && atomic_load(&plan->at) < MAX_STEPS; i++)
			usleep(PAUSE_US);
		return 0;
	case ACTION_SHORT:
		return FAULT_SHORT;
	case ACTION_ERROR:
		return -(int)step.value;
	default:
		return 0;
	}
}
