/* Wakefulness: while a program waits for us, no CPU of the machine goes to sleep.
 *
 * A CPU that has gone idle takes longer to wake up than a fill does, in a virtual machine now and then milliseconds:
 * the host has given it to somebody else. The kernel's latency limit for idle CPUs (root only; it ends with the
 * descriptor) makes them look for work instead. It costs power, so there is a budget: seconds at a time, and a small
 * part of all time, whatever the programs do. Knows nothing of whom it is for.
 */
#include "internal.h"

#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#define DEVICE "/dev/cpu_dma_latency"
#define NO_LIMIT_US 2000000000 /* the kernel's own for nobody wants one */
#define LOOK_NS 2000000L       /* it is looked so seldom whether that is over */
#define BUDGET_NS 10000000000L /* at a time */
#define BUDGET_PART 10	       /* of the time that goes by comes back */

static int device = -1;
static _Atomic uint64_t until_ns;
static atomic_bool awake;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* what follows, and the limit itself */
static pthread_cond_t begun = PTHREAD_COND_INITIALIZER;
static int64_t budget_ns = BUDGET_NS;
static uint64_t counted_ns;

static void set_limit(int32_t us)
{
	if (write(device, &us, sizeof(us)) < 0)
		return; /* then it is as without */
}

/* What was used since the last count, and what has come back. */
static void count(uint64_t now)
{
	int64_t passed = (int64_t)(now - counted_ns);

	budget_ns += passed / BUDGET_PART - (atomic_load(&awake) ? passed : 0);
	budget_ns = budget_ns > BUDGET_NS ? BUDGET_NS : budget_ns;
	counted_ns = now;
}

static void *awake_main(void *unused)
{
	const struct timespec pause = {.tv_nsec = LOOK_NS};

	(void)unused;
	pthread_mutex_lock(&lock);
	for (;;) {
		uint64_t now;

		while (!atomic_load(&awake))
			pthread_cond_wait(&begun, &lock);
		pthread_mutex_unlock(&lock);
		nanosleep(&pause, NULL);
		pthread_mutex_lock(&lock);
		now = now_ns();
		count(now);
		if (now >= atomic_load(&until_ns) || budget_ns <= 0) {
			set_limit(NO_LIMIT_US);
			atomic_store(&awake, false);
		}
	}
	return NULL;
}

/* From now on for so long, and not shorter than what was asked for before; not at all without a budget. */
void awake_for(uint64_t ns)
{
	uint64_t now = now_ns(), until = now + ns, old = atomic_load(&until_ns);

	if (device < 0)
		return;
	while (old < until && !atomic_compare_exchange_weak(&until_ns, &old, until))
		;
	/* Who holds the lock may have lost its CPU: there will be another fault. */
	if (atomic_load(&awake) || pthread_mutex_trylock(&lock))
		return;
	count(now_ns());
	if (!atomic_load(&awake) && budget_ns > 0) {
		set_limit(0);
		atomic_store(&awake, true);
		pthread_cond_signal(&begun);
	}
	pthread_mutex_unlock(&lock);
}

/* Without the device, which is root's, everything works, only more slowly. */
void awake_start(void)
{
	pthread_attr_t attributes;
	pthread_t thread;

	device = open(DEVICE, O_WRONLY | O_CLOEXEC);
	if (device < 0)
		return;
	counted_ns = now_ns();
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 64 << 10);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	if (pthread_create(&thread, &attributes, awake_main, NULL)) {
		close(device); /* nobody would end what is begun */
		device = -1;
	}
	pthread_attr_destroy(&attributes);
}
