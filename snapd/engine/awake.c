/* Wakefulness: while a program waits for us, no CPU of the machine goes to sleep.
 *
 * A CPU that has gone idle takes longer to wake up than a fill does, in a virtual machine now and then milliseconds:
 * the host has given it to somebody else. The kernel's latency limit for idle CPUs (root only; it ends with the
 * descriptor, so with the daemon at the latest) makes them look for work instead. Whoever has work takes nothing
 * from it. Knows nothing of whom it is for.
 */
#include "internal.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define DEVICE "/dev/cpu_dma_latency"
#define NO_LIMIT_US 2000000000 /* the kernel's own for nobody wants one */
#define LOOK_NS 2000000ULL	/* it is looked so seldom whether that is over */

static int device = -1;
static _Atomic uint64_t until_ns;
static unsigned int awake; /* futex: 0 or 1 */

static void set_limit(int32_t us)
{
	if (write(device, &us, sizeof(us)) < 0)
		return; /* then it is as without */
}

static void *awake_main(void *unused)
{
	(void)unused;
	for (;;) {
		const struct timespec pause = {.tv_nsec = LOOK_NS};

		if (!__atomic_load_n(&awake, __ATOMIC_SEQ_CST)) {
			syscall(SYS_futex, &awake, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
			continue;
		}
		nanosleep(&pause, NULL);
		if (now_ns() < atomic_load(&until_ns))
			continue;
		set_limit(NO_LIMIT_US);
		__atomic_store_n(&awake, 0, __ATOMIC_SEQ_CST);
		/* Who asked for more just before that saw them awake. */
		if (now_ns() < atomic_load(&until_ns))
			awake_for(0);
	}
	return NULL;
}

/* From now on for so long, and not shorter than what was asked for before. */
void awake_for(uint64_t ns)
{
	uint64_t until = now_ns() + ns, old = atomic_load(&until_ns);

	if (device < 0)
		return;
	while (old < until && !atomic_compare_exchange_weak(&until_ns, &old, until))
		;
	if (__atomic_exchange_n(&awake, 1, __ATOMIC_SEQ_CST))
		return;
	set_limit(0);
	syscall(SYS_futex, &awake, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

/* Without the device, which is root's, everything works, only more slowly. */
int awake_start(void)
{
	pthread_attr_t attributes;
	pthread_t thread;
	int error;

	device = open(DEVICE, O_WRONLY | O_CLOEXEC);
	if (device < 0)
		return 0;
	set_limit(NO_LIMIT_US); /* to open it is to ask for 0 */
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 64 << 10);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	error = pthread_create(&thread, &attributes, awake_main, NULL);
	pthread_attr_destroy(&attributes);
	return -error;
}
