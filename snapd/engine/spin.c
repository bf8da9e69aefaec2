/* Spinning: after a fill a reader looks for the next fault for a moment before it sleeps, since to wake a CPU that has
 * gone idle takes several times as long as a fill.
 *
 * It stops where it does not pay: after a few looks in vain it wants to see faults come soon after one another first,
 * each time more of them; while more threads want to run than there are CPUs it takes one from a program; and only so
 * many readers spin that a CPU is left for those who touch. Knows nothing of fills.
 */
#include "internal.h"

#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <unistd.h>

#define MISSES 3              /* looks in vain in a row */
#define SOON 4                /* a sleep of so many limits would have been a hit: the wake-ups are in it */
#define MOST_DEBT 4096        /* faults that must come soon before the next try */
#define HITS_TO_FORGIVE 32    /* in a row; they halve what the next misses cost */
#define BURST_NS 1000000ULL    /* faults that follow one another sooner are a burst, */
#define BURST_FAULTS 4         /* when there are so many */
#define CROWD_NS 2000000ULL   /* how long a look at the machine's load is good for */

static _Atomic uint64_t limit_ns;
static atomic_int spinners, helpers;
static int loadavg_fd = -1;

void sn_set_busy_poll(uint32_t us)
{
	if (loadavg_fd < 0)
		loadavg_fd = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
	atomic_store(&limit_ns, loadavg_fd < 0 ? 0 : us * 1000ULL);
}

/* More threads are running or ready, with this one and the one that was just filled, than there are CPUs. */
static bool is_crowded(struct spin *spin, uint64_t now)
{
	char text[128];
	ssize_t n;
	int running = 0;

	if (now - spin->looked_ns < CROWD_NS)
		return spin->crowded;
	n = pread(loadavg_fd, text, sizeof(text) - 1, 0);
	text[n > 0 ? n : 0] = 0;
	spin->looked_ns = now;
	spin->crowded = sscanf(text, "%*s %*s %*s %d/", &running) != 1 || running > spin->cpus;
	return spin->crowded;
}

void spin_init(struct spin *spin)
{
	*spin = (struct spin){.cpus = cpus(), .price = 1};
}

static void note_miss(struct spin *spin)
{
	spin->hits = 0;
	if (++spin->misses < MISSES)
		return;
	spin->misses = 0;
	spin->debt = spin->price;
	spin->price = spin->price < MOST_DEBT ? 2 * spin->price : MOST_DEBT;
}

static void note_hit(struct spin *spin)
{
	spin->misses = 0;
	if (++spin->hits < HITS_TO_FORGIVE)
		return;
	spin->hits = 0;
	spin->price = spin->price > 1 ? spin->price / 2 : 1;
}

/* A thread that fills ahead of the program begins or ends: whoever spins meanwhile takes its CPU from it. */
void spin_yield(bool begins)
{
	atomic_fetch_add(&helpers, begins ? 1 : -1);
}

/* Faults that come soon after one another: the program's CPU and ours stay awake between them. */
void spin_filled(struct spin *spin)
{
	uint64_t now = now_ns();

	spin->burst = now - spin->filled_ns < BURST_NS ? spin->burst + 1 : 0;
	if (spin->burst >= BURST_FAULTS && atomic_load(&limit_ns))
		awake_for(BURST_NS);
	spin->filled_ns = now;
}

bool spin_for(struct spin *spin, struct pollfd *fds, unsigned int nfds)
{
	uint64_t limit = atomic_load(&limit_ns), began = now_ns();
	int found = 0;

	if (!limit || spin->debt || spin->cpus < 2 || atomic_load(&helpers) || is_crowded(spin, began))
		return false;
	if (atomic_fetch_add(&spinners, 1) < spin->cpus / 2) {
		while (!(found = poll(fds, nfds, 0)) && now_ns() - began < limit)
			;
		if (found > 0)
			note_hit(spin);
		else
			note_miss(spin);
	}
	atomic_fetch_sub(&spinners, 1);
	return found > 0;
}

void spin_slept(struct spin *spin, uint64_t ns)
{
	if (spin->debt && ns < SOON * atomic_load(&limit_ns))
		spin->debt--;
}
