/* The daemon's side of the keeper: making one, and writing down which descriptors the next daemon needs.
 *
 * Owns the registry while this daemon lives. Knows sessions and stores by number and descriptor only; without a
 * keeper (in tests, in tools) all of it does nothing.
 */
#include "internal.h"
#include "keeper.h"

#include "../agent/arch.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <linux/sched.h>
#include <link.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define START_NS 5000000000ULL
#define TLS_PAGES 2 /* on both sides of the thread pointer: the kernel writes to the rseq area in there */

static const char MAGIC[8] = "HSNAPKR1";
static struct registry *registry;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Atomic uint32_t numbers; /* without a registry */

int sn_keeper_open(int fd)
{
	void *at;
	int error;

	if (fd < 0) {
		fd = memfd_create("heap-snapd-registry", MFD_CLOEXEC);
		if (fd < 0)
			return -errno;
		if (ftruncate(fd, sizeof(*registry))) {
			error = -errno;
			close(fd);
			return error;
		}
	}
	at = mmap(NULL, sizeof(*registry), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (at == MAP_FAILED)
		return -errno;
	registry = at;
	if (!registry->magic[0]) {
		memcpy(registry->magic, MAGIC, sizeof(MAGIC));
		sn_hand_over(KEEP_REGISTRY, 0, fd);
	} else if (memcmp(registry->magic, MAGIC, sizeof(MAGIC)) != 0) {
		registry = NULL;
		munmap(at, sizeof(*registry));
		return -EPROTO;
	}
	return fd;
}

void sn_keeper_format(char *ret_magic)
{
	memcpy(ret_magic, MAGIC, sizeof(MAGIC));
}

uint32_t keeper_number(void)
{
	return atomic_fetch_add(registry ? &registry->numbers : &numbers, 1) + 1;
}

static struct keeper_slot *find(uint32_t letter, uint32_t number)
{
	for (uint32_t i = 0; i < registry->nslots; i++)
		if (registry->slots[i].letter == letter && registry->slots[i].number == number)
			return &registry->slots[i];
	return NULL;
}

int sn_hand_over(int letter, uint32_t number, int fd)
{
	struct keeper_slot *slot;
	uint32_t i = 0;

	if (!registry)
		return 0;
	pthread_mutex_lock(&lock);
	slot = find((uint32_t)letter, number);
	if (slot) {
		atomic_store(&slot->fd, fd);
	} else {
		while (i < registry->nslots && registry->slots[i].letter)
			i++;
		if (i < KEEPER_SLOTS) {
			slot = &registry->slots[i];
			slot->number = number;
			slot->scanned = 0;
			atomic_store(&slot->fd, fd);
			if (i == registry->nslots)
				atomic_store(&registry->nslots, i + 1);
			atomic_store(&slot->letter, (uint32_t)letter);
		}
	}
	pthread_mutex_unlock(&lock);
	return slot ? 0 : -ENOSPC;
}

int sn_withhold(int letter, uint32_t number)
{
	struct keeper_slot *slot;
	int fd = -1;

	if (!registry)
		return -1;
	pthread_mutex_lock(&lock);
	slot = find((uint32_t)letter, number);
	if (slot) {
		fd = atomic_load(&slot->fd);
		atomic_store(&slot->letter, 0);
	}
	pthread_mutex_unlock(&lock);
	return fd;
}

uint32_t sn_handed_over(uint32_t *ret, uint32_t room)
{
	uint32_t n = 0;

	if (!registry)
		return 0;
	pthread_mutex_lock(&lock);
	for (uint32_t i = 0; i < registry->nslots; i++) {
		if (!registry->slots[i].letter)
			continue;
		if (n < room) {
			ret[2 * n] = registry->slots[i].letter;
			ret[2 * n + 1] = registry->slots[i].number;
		}
		n++;
	}
	pthread_mutex_unlock(&lock);
	return n;
}

/* Whoever closes a descriptor withholds it first: under the lock its number is still its own. */
int sn_duplicate(int letter, uint32_t number)
{
	struct keeper_slot *slot;
	int fd = -ENOENT;

	if (!registry)
		return -ENOENT;
	pthread_mutex_lock(&lock);
	slot = find((uint32_t)letter, number);
	if (slot) {
		fd = fcntl(slot->fd, F_DUPFD_CLOEXEC, 0);
		if (fd < 0)
			fd = -errno;
	}
	pthread_mutex_unlock(&lock);
	return fd;
}

/* systemd keeps no registry: what it hands over has numbers of one that is gone. */
void sn_keeper_numbers_from(uint32_t last)
{
	uint32_t now = atomic_load(&registry->numbers);

	while (now < last && !atomic_compare_exchange_weak(&registry->numbers, &now, last))
		;
}

int sn_keeper_pid(void)
{
	return registry ? atomic_load(&registry->keeper) : 0;
}

void sn_keeper_ending(int ending)
{
	if (registry)
		atomic_store(&registry->ending, (uint32_t)ending);
}

uint64_t sn_keeper_serving(void)
{
	uint64_t died;

	if (!registry)
		return 0;
	FAULT_POINT(FP_SERVING);
	died = atomic_exchange(&registry->died_ns, 0);
	atomic_store(&registry->serving_ns, now_ns());
	if (!died)
		return 0;
	atomic_fetch_add(&registry->takeovers, 1);
	return registry->serving_ns - died;
}

/* What the rings said when the former daemon died is applied: its numbers are no longer those of descriptors. */
void keeper_ring_is_read(uint32_t number)
{
	struct keeper_slot *slot;

	if (!registry)
		return;
	pthread_mutex_lock(&lock);
	slot = find(KEEP_PAGE_MAP, number);
	if (slot)
		slot->scanned = 0;
	pthread_mutex_unlock(&lock);
}

/* The userfaultfd that a FORK in a ring brought; -1: the child has its session, or nobody kept it. */
int keeper_fork(uint32_t ufd)
{
	struct keeper_slot *slot;
	int fd = -1;

	if (!registry)
		return -1;
	pthread_mutex_lock(&lock);
	slot = find(KEEP_FORK, ufd);
	if (slot)
		fd = atomic_load(&slot->fd);
	pthread_mutex_unlock(&lock);
	return fd;
}

void keeper_fork_is_applied(int fd)
{
	if (!registry)
		return;
	pthread_mutex_lock(&lock);
	for (uint32_t i = 0; i < registry->nslots; i++)
		if (registry->slots[i].letter == KEEP_FORK && registry->slots[i].fd == fd)
			atomic_store(&registry->slots[i].letter, 0);
	pthread_mutex_unlock(&lock);
}

static int note_object(struct dl_phdr_info *info, size_t size, void *ret)
{
	struct keeper *keeper = ret;
	unsigned long start = ~0UL, end = 0;

	(void)size;
	for (int i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *part = &info->dlpi_phdr[i];

		if (part->p_type != PT_LOAD)
			continue;
		start = min_u64(start, info->dlpi_addr + part->p_vaddr);
		end = max_u64(end, info->dlpi_addr + part->p_vaddr + part->p_memsz);
	}
	if ((unsigned long)keeper_main < start || (unsigned long)keeper_main >= end)
		return 0;
	keeper->stays[0].start = PAGE_DOWN(start);
	keeper->stays[0].end = PAGE_DOWN(end + PAGE - 1);
	return 1;
}

static int by_start(const void *a, const void *b)
{
	const unsigned long *x = a, *y = b;

	return *x < *y ? -1 : *x > *y;
}

static void note_what_stays(struct keeper *keeper, size_t bytes)
{
	unsigned long tls = PAGE_DOWN((unsigned long)pthread_self());

	dl_iterate_phdr(note_object, keeper);
	keeper->stays[1].start = (unsigned long)keeper;
	keeper->stays[1].end = (unsigned long)keeper + bytes;
	keeper->stays[2].start = (unsigned long)registry;
	keeper->stays[2].end = (unsigned long)registry + PAGE_DOWN(sizeof(*registry) + PAGE - 1);
	keeper->stays[3].start = tls - TLS_PAGES * PAGE;
	keeper->stays[3].end = tls + (TLS_PAGES + 1) * PAGE;
	qsort(keeper->stays, 4, sizeof(keeper->stays[0]), by_start);
}

static size_t strings_bytes(const char *const *strings, int *ret_n)
{
	size_t bytes = 0;
	int n = 0;

	for (; strings[n]; n++)
		bytes += strlen(strings[n]) + 1;
	*ret_n = n;
	return bytes;
}

static char *copy_strings(char **to, const char *const *strings, int n, char *room)
{
	for (int i = 0; i < n; i++) {
		size_t bytes = strlen(strings[i]) + 1;

		to[i] = memcpy(room, strings[i], bytes);
		room += bytes;
	}
	to[n] = NULL;
	return room;
}

/* Waits until the new one has its turn; from then on the former one has no duty. */
static int relieve(int pid, int former)
{
	uint64_t deadline = now_ns() + START_NS;

	while (atomic_load(&registry->keeper) != pid) {
		if (now_ns() > deadline || waitpid(pid, NULL, __WALL | WNOHANG) == pid)
			return -ECHILD;
		usleep(50);
	}
	if (former > 0) {
		kill(former, SIGKILL);
		waitpid(former, NULL, __WALL);
	}
	return pid;
}

static int start_keeper(const char *path, const char *const *argv, const char *const *envp)
{
	int nargs, nenv, pid, pidfd;
	size_t strings = strings_bytes(argv, &nargs) + strings_bytes(envp, &nenv) + strlen(path) + 1;
	size_t head = (sizeof(struct keeper) + 15) & ~15UL, pointers = sizeof(char *) * (size_t)(nargs + nenv + 8);
	size_t bytes = PAGE_DOWN(head + pointers + strings + KEEPER_STACK_BYTES + PAGE - 1);
	struct keeper *keeper;
	sigset_t all, before;
	char *room;

	if (!registry)
		return -ENXIO;
	pidfd = (int)syscall(SYS_pidfd_open, getpid(), 0);
	if (pidfd < 0)
		return -errno;
	keeper = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (keeper == MAP_FAILED) {
		close(pidfd);
		return -ENOMEM;
	}
	keeper->registry = registry;
	keeper->former = atomic_load(&registry->keeper);
	keeper->argv = (void *)((char *)keeper + head);
	keeper->envp = keeper->argv + nargs + 1;
	keeper->nenv = nenv;
	room = (char *)keeper + head + pointers;
	room = copy_strings(keeper->argv, argv, nargs, room);
	room = copy_strings(keeper->envp, envp, nenv, room);
	keeper->path = strcpy(room, path);
	note_what_stays(keeper, bytes);
	close(sn_withhold(KEEP_WATCHED, 0)); /* -1 for none */
	sn_hand_over(KEEP_WATCHED, 0, pidfd);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	/* Its signals stay blocked: what a terminal sends to the whole group is the daemon's business. */
	pid = (int)raw_thread(CLONE_FILES, (char *)keeper + bytes, NULL, keeper_main, keeper);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (pid > 0)
		pid = relieve(pid, keeper->former);
	munmap(keeper, bytes);
	return pid;
}

int sn_keeper_start(const char *path, const char *const *argv, const char *const *envp)
{
	int pid = -ECHILD;

	/* The one that the keeper made before it became this daemon may have taken its turn only just now. */
	for (int tries = 0; tries < 3 && pid == -ECHILD; tries++)
		pid = start_keeper(path, argv, envp);
	return pid;
}
