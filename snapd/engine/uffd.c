/* System calls on a userfaultfd and on /proc/PID/pagemap: one wrapper each.
 *
 * Owns what an errno means; knows nothing of sessions.
 */
#include "internal.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define KCMP_VM 1

static enum uffd_result meaning(int error)
{
	switch (error) {
	case 0: return UFFD_DONE;
	case EEXIST: return UFFD_EXISTS;
	case EAGAIN: return UFFD_AGAIN; /* an event is unread, or the thread that raised it has not run yet */
	case ENOENT: return UFFD_UNMAPPED;
	case ESRCH: return UFFD_GONE;
	case ENOMEM: return UFFD_NO_MEMORY;
	default: return UFFD_ERROR;
	}
}

enum uffd_result uffd_copy(int uffd, uint64_t to, const void *from, uint64_t bytes, uint64_t mode, uint64_t *ret_done)
{
	struct snapd_uffd_copy copy = {.dst = to, .src = (uint64_t)(uintptr_t)from, .len = bytes, .mode = mode};
	int error = ioctl(uffd, SNAPD_UFFDIO_COPY, &copy) ? errno : 0;

	if (ret_done)
		*ret_done = copy.copy > 0 ? (uint64_t)copy.copy : 0;
	return meaning(error);
}

enum uffd_result uffd_zero(int uffd, uint64_t at, uint64_t bytes)
{
	struct snapd_uffd_zeropage zero = {.range = {at, bytes}};

	return meaning(ioctl(uffd, SNAPD_UFFDIO_ZEROPAGE, &zero) ? errno : 0);
}

enum uffd_result uffd_poison(int uffd, uint64_t at, uint64_t bytes)
{
	struct snapd_uffd_poison poison = {.range = {at, bytes}};

	return meaning(ioctl(uffd, SNAPD_UFFDIO_POISON, &poison) ? errno : 0);
}

enum uffd_result uffd_wake(int uffd, uint64_t at, uint64_t bytes)
{
	struct snapd_uffd_range range = {at, bytes};

	return meaning(ioctl(uffd, SNAPD_UFFDIO_WAKE, &range) ? errno : 0);
}

enum uffd_result uffd_protect(int uffd, uint64_t at, uint64_t bytes, bool on)
{
	struct snapd_uffd_writeprotect protect = {.range = {at, bytes},
						  .mode = on ? SNAPD_UFFDIO_WRITEPROTECT_MODE_WP : 0};

	return meaning(ioctl(uffd, SNAPD_UFFDIO_WRITEPROTECT, &protect) ? errno : 0);
}

/* Whether a call that raises an event is under way: then the kernel refuses everything that would fill, before it looks
 * at the arguments. */
bool uffd_changing(int uffd)
{
	struct snapd_uffd_zeropage none = {.range = {1, 1}};

	return ioctl(uffd, SNAPD_UFFDIO_ZEROPAGE, &none) && errno == EAGAIN;
}

int sn_uffd_lives(int uffd)
{
	return uffd_zero(uffd, 0, PAGE) != UFFD_GONE;
}

int uffd_register(int uffd, uint64_t start, uint64_t bytes, uint64_t mode)
{
	struct snapd_uffd_register range = {.range = {start, bytes}, .mode = mode};

	return ioctl(uffd, SNAPD_UFFDIO_REGISTER, &range) ? -errno : 0;
}

int uffd_unregister(int uffd, uint64_t start, uint64_t bytes)
{
	struct snapd_uffd_range range = {start, bytes};

	return ioctl(uffd, SNAPD_UFFDIO_UNREGISTER, &range) ? -errno : 0;
}

int sn_uffd_register(int uffd, uint64_t start, uint64_t length)
{
	return uffd_register(uffd, start, length, SNAPD_UFFDIO_REGISTER_MODE_MISSING | SNAPD_UFFDIO_REGISTER_MODE_WP);
}

int sn_uffd_api(int uffd, int with_fork, uint64_t *ret_features)
{
	struct snapd_uffd_api api = {
		.api = SNAPD_UFFD_API,
		.features = SNAPD_UFFD_FEATURE_PAGEFAULT_FLAG_WP | SNAPD_UFFD_FEATURE_EVENT_REMAP |
			    SNAPD_UFFD_FEATURE_EVENT_REMOVE | SNAPD_UFFD_FEATURE_EVENT_UNMAP |
			    SNAPD_UFFD_FEATURE_WP_UNPOPULATED | SNAPD_UFFD_FEATURE_WP_ASYNC |
			    SNAPD_UFFD_FEATURE_POISON | SNAPD_UFFD_FEATURE_MOVE |
			    (with_fork ? SNAPD_UFFD_FEATURE_EVENT_FORK : 0)};
	int ret = ioctl(uffd, SNAPD_UFFDIO_API, &api) ? -errno : 0;

	*ret_features = api.features;
	return ret;
}

long pagemap_scan(int fd, uint64_t start, uint64_t end, uint64_t anyof, uint64_t ret_mask, uint64_t max_pages,
		  struct snapd_page_region *regions, uint64_t capacity, uint64_t *ret_end)
{
	struct snapd_pm_scan scan = {.size = sizeof(scan),
				     .start = start,
				     .end = end,
				     .vec = (uint64_t)(uintptr_t)regions,
				     .vec_len = capacity,
				     .max_pages = max_pages,
				     .category_anyof_mask = anyof,
				     .return_mask = ret_mask};
	long n = ioctl(fd, SNAPD_PAGEMAP_SCAN, &scan);

	if (ret_end)
		*ret_end = scan.walk_end;
	return n < 0 ? -errno : n;
}

int sn_watched(int pagemap_fd, uint64_t address)
{
	struct snapd_page_region region;
	long n = pagemap_scan(pagemap_fd, address, address + PAGE, SNAPD_PAGE_IS_WPALLOWED, SNAPD_PAGE_IS_WPALLOWED, 0,
			      &region, 1, NULL);

	return n < 0 ? (int)n : n > 0;
}

int sn_marked(int pagemap_fd, uint64_t address)
{
	struct snapd_page_region region;
	long n = pagemap_scan(pagemap_fd, address, address + PAGE, SNAPD_PAGE_IS_WPALLOWED,
			      SNAPD_PAGE_IS_WPALLOWED | SNAPD_PAGE_IS_WRITTEN, 0, &region, 1, NULL);

	return n < 0 ? (int)n : n > 0 && !(region.categories & SNAPD_PAGE_IS_WRITTEN);
}

#define SCAN_REGIONS 512

int sn_next_piece(int pagemap_fd, uint64_t start, uint64_t end, const struct sn_piece_limits *limits, uint64_t *ret)
{
	struct snapd_page_region regions[SCAN_REGIONS];
	uint64_t walked, weight = 0;
	long n = pagemap_scan(pagemap_fd, start, end, SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED,
			      SNAPD_PAGE_IS_PRESENT | SNAPD_PAGE_IS_SWAPPED, limits->weight, regions,
			      min_u64(SCAN_REGIONS, limits->weight / limits->run_weight + 1), &walked);

	memset(ret, 0, 4 * sizeof(ret[0]));
	if (n < 0)
		return (int)n;
	for (long i = 0; i < n; i++) {
		uint64_t from = regions[i].start, to = regions[i].end;
		bool full = weight + limits->run_weight >= limits->weight;

		if (i && (full || from - ret[1] > limits->gap || from >= ret[0] + limits->span))
			break;
		if (!i)
			ret[0] = from;
		to = min_u64(to, ret[0] + limits->span);
		to = min_u64(to, from + PAGE * (full ? 1 : limits->weight - weight - limits->run_weight));
		ret[1] = to;
		ret[2] += (to - from) / PAGE;
		weight += (to - from) / PAGE + limits->run_weight;
	}
	ret[3] = weight;
	return n > 0;
}

int sn_same_memory(int pid, int other)
{
	long ret = syscall(SYS_kcmp, pid, other, KCMP_VM, 0, 0);

	return ret < 0 ? -errno : ret == 0;
}
