/* A hold: the target's memory stays while pages are aside, also when the target exits.
 *
 * Children that are forked meanwhile get these pages from the parent's memory, and the parent may exit the moment it
 * has forked. A descriptor of /proc keeps no memory, but whoever is inside a read of it does: so a thread reads the
 * pagemap into a page of the daemon's own that is missing, and is let go by that page alone. Knows no pieces.
 */
#include "internal.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DONTNEED_LOCKED 24 /* MADV_DONTNEED_LOCKED, newer than many headers */
#define POLL_MS 5
#define TRIES 400

struct hold {
	int pagemap, uffd;
	off_t offset;
	char *page;
	pthread_t thread;
	int error;
	atomic_bool over, ended;
};

static void *hold_main(void *arg)
{
	struct hold *hold = arg;
	ssize_t n;

	do { /* a freezer may wake it up: then it goes back */
		n = pread(hold->pagemap, hold->page, 8, hold->offset);
		hold->error = n < 0 ? -errno : n ? 0 : -ESRCH;
	} while ((hold->error == -EFAULT || hold->error == -EINTR) && !atomic_load(&hold->over));
	atomic_store(&hold->ended, true);
	return NULL;
}

static int own_userfaultfd(void)
{
	struct snapd_uffd_api api = {.api = SNAPD_UFFD_API};
	int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC), fd = -1;

	if (device >= 0) {
		fd = ioctl(device, SNAPD_USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
		close(device);
	}
	if (fd < 0)
		fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	if (fd < 0)
		return -errno;
	if (ioctl(fd, SNAPD_UFFDIO_API, &api)) {
		int error = -errno;

		close(fd);
		return error;
	}
	return fd;
}

static void hold_destroy(struct hold *hold)
{
	if (hold->uffd >= 0)
		close(hold->uffd);
	if (hold->page != MAP_FAILED)
		munmap(hold->page, PAGE);
	free(hold);
}

/* Its page must be missing, also where all of the daemon's memory is locked as it is mapped. */
static int hold_prepare(struct hold *hold)
{
	int error;

	hold->page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (hold->page == MAP_FAILED)
		return -ENOMEM;
	hold->uffd = own_userfaultfd();
	if (hold->uffd < 0)
		return hold->uffd;
	error = uffd_register(hold->uffd, (uintptr_t)hold->page, PAGE, SNAPD_UFFDIO_REGISTER_MODE_MISSING);
	if (!error && madvise(hold->page, PAGE, MADV_DONTNEED) && madvise(hold->page, PAGE, DONTNEED_LOCKED))
		error = -errno;
	return error;
}

static int hold_start(struct hold *hold)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	int error;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 128 << 10);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before); /* the thread inherits it: no handler ends its read */
	error = pthread_create(&hold->thread, &attributes, hold_main, hold);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
	return -error;
}

/* Returns what its read gave. */
static int hold_end(struct hold *hold)
{
	int error;

	atomic_store(&hold->over, true);
	uffd_zero(hold->uffd, (uintptr_t)hold->page, PAGE);
	pthread_join(hold->thread, NULL);
	error = hold->error;
	hold_destroy(hold);
	return error;
}

/* For whoever works on the session's pieces. Returns with the memory held. */
int hold_take(struct sn_session *session)
{
	struct hold *hold;
	int error;

	if (session->hold)
		return 0;
	hold = calloc(1, sizeof(*hold));
	if (!hold)
		return -ENOMEM;
	hold->pagemap = atomic_load(&session->pagemap_fd);
	hold->offset = (off_t)(session->sentinel / PAGE * 8);
	hold->uffd = -1;
	error = hold_prepare(hold);
	if (!error)
		error = hold_start(hold);
	if (error) {
		hold_destroy(hold);
		return error;
	}
	for (int tries = 0; tries < TRIES && !atomic_load(&hold->ended); tries++) {
		struct pollfd fault = {.fd = hold->uffd, .events = POLLIN};

		if (poll(&fault, 1, POLL_MS) > 0) { /* it is inside the read, and stays there */
			session->hold = hold;
			return 0;
		}
	}
	error = hold_end(hold);
	return error ? error : -EAGAIN;
}

void hold_release(struct sn_session *session)
{
	if (session->hold)
		hold_end(session->hold);
	session->hold = NULL;
}
