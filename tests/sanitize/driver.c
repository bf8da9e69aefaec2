/* The engine without Python, for the sanitizers: real sessions of a real program, dumped, restored and looked at by
 * several threads at once until the program ends.
 *
 *   driver AGENT-LIBRARY SECONDS PROGRAM [ARGUMENT]...
 *
 * Does what snapd/daemon does, as simply as it can be done: the handshake of agents.py, the choice of policy.py by maps
 * alone, and dumps of random intervals. The exit status is the program's, 1 when the driver itself failed; what a
 * sanitizer finds decides for itself. Children by fork are served and not dumped. */
#include "../../snapd/engine/internal.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAX_INTERVALS 4096
#define MAX_CHILDREN 4096
#define MAX_FAILED 3 /* as many pieces as may be on their way when the program ends */
#define STORE_HEADER 4096
#define LEVEL 1
#define STACK_BELOW (64UL << 10)
#define STACK_ABOVE (1UL << 20)
#define LEAST_BYTES (64UL << 10)
#define PIECE_PAGES 1024
#define RUN_WEIGHT 8
#define SLICE_BYTES (4UL << 20)
#define HINT 0x600000000000UL /* a hole in every address space, far from what the program maps */

static struct sn_store *store;
static struct sn_session *session;
static struct snapd_wire hello;
static atomic_bool ending;
static struct sn_session *children[MAX_CHILDREN];
static int nchildren;
static struct sn_piece *failed[MAX_FAILED];
static int nfailed;
static pthread_mutex_t operation = PTHREAD_MUTEX_INITIALIZER; /* a dump or a restore, as in the daemon */
static _Atomic uint64_t dumps, moved_pages, restores;

static void fail(const char *what)
{
	fprintf(stderr, "driver: %s: %s\n", what, strerror(errno));
	_exit(1); /* other threads run */
}

static void check(int result, const char *what)
{
	if (result < 0) {
		errno = -result;
		fail(what);
	}
}

static uint64_t random_below(uint64_t *state, uint64_t limit)
{
	*state = *state * 6364136223846793005ULL + 1442695040888963407ULL;
	return (*state >> 33) % limit;
}

/* ---- the codec ---- */

static void *symbol(const char *name)
{
	static void *library;
	void *found;

	if (!library)
		library = dlopen("libzstd.so.1", RTLD_NOW);
	found = library ? dlsym(library, name) : NULL;
	if (!found)
		fail(name);
	return found;
}

static void start_engine(void)
{
	struct sn_codec codec = {.create_cctx = symbol("ZSTD_createCCtx"),
				 .free_cctx = symbol("ZSTD_freeCCtx"),
				 .set_cctx = symbol("ZSTD_CCtx_setParameter"),
				 .compress2 = symbol("ZSTD_compress2"),
				 .create_dctx = symbol("ZSTD_createDCtx"),
				 .free_dctx = symbol("ZSTD_freeDCtx"),
				 .decompress_dctx = symbol("ZSTD_decompressDCtx"),
				 .is_error = symbol("ZSTD_isError")};

	check(sn_init(&codec, 2), "sn_init");
}

/* ---- the program and its agent ---- */

static int listen_for_agent(const char *path)
{
	struct sockaddr_un name = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	snprintf(name.sun_path, sizeof(name.sun_path), "%s", path);
	if (fd < 0 || bind(fd, (struct sockaddr *)&name, sizeof(name)) || listen(fd, 16))
		fail(path);
	return fd;
}

static pid_t start_program(const char *library, const char *path, char **argv)
{
	pid_t pid = fork();

	if (pid < 0)
		fail("fork");
	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	setenv("LD_PRELOAD", library, 1);
	setenv("SNAPD_AGENT_SOCKET", path, 1);
	setenv("SNAPD_NO_FOLLOW_FORKS", "1", 1);
	execvp(argv[0], argv);
	fail(argv[0]);
	return -1;
}

static void send_message(int sock, struct snapd_wire *message, const int *fds, int nfds)
{
	union {
		char room[CMSG_SPACE(4 * sizeof(int))];
		struct cmsghdr align;
	} control = {0};
	struct iovec iov = {message, sizeof(*message)};
	struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1};

	message->magic = SNAPD_WIRE_MAGIC;
	message->version = SNAPD_WIRE_VERSION;
	if (nfds) {
		struct cmsghdr *rights;

		header.msg_control = control.room;
		header.msg_controllen = CMSG_SPACE((size_t)nfds * sizeof(int));
		rights = CMSG_FIRSTHDR(&header);
		*rights = (struct cmsghdr){CMSG_LEN((size_t)nfds * sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
		memcpy(CMSG_DATA(rights), fds, (size_t)nfds * sizeof(int));
	}
	if (sendmsg(sock, &header, MSG_NOSIGNAL) != (ssize_t)sizeof(*message))
		fail("sendmsg");
}

/* Returns the one descriptor that came along, or -1. */
static int receive_message(int sock, struct snapd_wire *ret)
{
	union {
		char room[CMSG_SPACE(4 * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec iov = {ret, sizeof(*ret)};
	struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.room,
				.msg_controllen = sizeof(control.room)};
	struct cmsghdr *rights;
	int fd = -1;

	if (recvmsg(sock, &header, MSG_CMSG_CLOEXEC) != (ssize_t)sizeof(*ret))
		fail("recvmsg");
	rights = CMSG_FIRSTHDR(&header);
	if (rights && rights->cmsg_type == SCM_RIGHTS)
		memcpy(&fd, CMSG_DATA(rights), sizeof(fd));
	if (ret->status) {
		errno = -ret->status;
		fail("the agent's reply");
	}
	return fd;
}

static int open_store(void)
{
	const char *directory = getenv("TMPDIR");
	int fd = open(directory ? directory : "/tmp", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	unsigned char id[16];

	if (fd < 0 || getrandom(id, sizeof(id), 0) != sizeof(id) || ftruncate(fd, STORE_HEADER))
		fail("a store");
	store = sn_store_open(fd, id, STORE_HEADER, 0, 0);
	if (!store)
		fail("sn_store_open");
	return fd;
}

/* The handshake of docs/protocol.md. */
static void attach(pid_t pid, int listener)
{
	int sock = accept4(listener, NULL, NULL, SOCK_CLOEXEC), device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
	struct snapd_wire make = {.kind = SNAPD_MAKE}, hold = {.kind = SNAPD_HOLD};
	struct sn_target target = {.pid = pid, .agent_sock = sock};
	uint64_t features;
	int held[2], error;

	if (sock < 0 || device < 0)
		fail("accept, or /dev/userfaultfd");
	receive_message(sock, &hello);
	send_message(sock, &make, &device, 1);
	target.uffd = receive_message(sock, &make);
	close(device);
	target.sentinel = hello.addr;
	target.agent_tids[0] = (int)hello.length;
	target.agent_tids[1] = (int)hello.dest;
	check(sn_uffd_api(target.uffd, 1, &features), "UFFDIO_API");
	check(sn_uffd_register(target.uffd, target.sentinel, PAGE), "the sentinel");
	held[0] = open_store();
	held[1] = target.page_map = sn_page_map_create();
	check(target.page_map, "a page map");
	send_message(sock, &hold, held, 2);
	receive_message(sock, &hold);
	session = sn_session_create(&target, store, &error);
	check(error, "sn_session_create");
}

/* ---- dumps ---- */

static bool is_ours(uint64_t start, uint64_t end)
{
	for (unsigned int i = 0; i < hello.nruns; i++)
		if (hello.runs[i].start < end && start < hello.runs[i].start + hello.runs[i].length)
			return true;
	return false;
}

struct parts {
	uint64_t ends[2 * MAX_INTERVALS];
	int n;
};

/* Adds [start, end) without what of it a survey says must stay; number counts through what that is. */
static void carve(uint64_t start, uint64_t end, const struct sn_survey_report *seen, int number, struct parts *parts)
{
	for (; number < 2 * seen->nthreads + seen->nkept; number++) {
		const struct sn_thread *thread = &seen->threads[number / 2];
		uint64_t low, high;

		if (number >= 2 * seen->nthreads) {
			low = PAGE_DOWN(seen->kept[number - 2 * seen->nthreads]);
			high = low + PAGE;
		} else if (number % 2) {
			low = PAGE_DOWN(thread->tls) - PAGE;
			high = low + 3 * PAGE;
		} else {
			low = PAGE_DOWN(thread->stack - STACK_BELOW);
			high = PAGE_DOWN(thread->tls) + 2 * PAGE;
			if (thread->tls < thread->stack || thread->tls - thread->stack > (64UL << 20))
				high = PAGE_DOWN(thread->stack + STACK_ABOVE);
		}
		if (low < end && high > start) {
			if (low > start)
				carve(start, low, seen, number + 1, parts);
			if (high < end)
				carve(high, end, seen, number + 1, parts);
			return;
		}
	}
	if (end - start >= LEAST_BYTES && parts->n < MAX_INTERVALS) {
		parts->ends[2 * parts->n] = start;
		parts->ends[2 * parts->n++ + 1] = end;
	}
}

static void choose(pid_t pid, const struct sn_survey_report *seen, struct parts *ret)
{
	char path[64], line[512];
	FILE *maps;

	ret->n = 0;
	snprintf(path, sizeof(path), "/proc/%d/maps", pid);
	maps = fopen(path, "re");
	while (maps && fgets(line, sizeof(line), maps)) {
		unsigned long start, end, inode;
		char permissions[8], name[256] = "";
		int found = sscanf(line, "%lx-%lx %7s %*s %*s %lu %255s", &start, &end, permissions, &inode, name);

		if (found >= 4 && !strcmp(permissions, "rw-p") && !inode && (!name[0] || !strcmp(name, "[heap]")) &&
		    !is_ours(start, end))
			carve(start, end, seen, 0, ret);
	}
	if (maps)
		fclose(maps);
}

static void see_through(struct sn_piece *piece)
{
	struct sn_pack_report packed;

	sn_piece_wait(piece, &packed);
	if (packed.cause != -ESRCH) /* the program ends */
		check(packed.cause, "packing");
	if (packed.cause || sn_piece_drop(piece, SLICE_BYTES, 100)) {
		nfailed++; /* and what is aside stays there, with the piece */
		if (nfailed > MAX_FAILED)
			fail("too many pieces could not be dropped");
		failed[nfailed - 1] = piece;
		return;
	}
	sn_piece_free(piece);
	atomic_fetch_add(&dumps, 1);
}

/* One piece after the other, two on their way at a time. */
static void dump(pid_t pid, uint64_t *rng)
{
	static struct sn_survey_report seen;
	static struct parts parts;
	const struct sn_piece_limits limits = {PIECE_PAGES, RUN_WEIGHT, PIECE_PAGES * PAGE, 64 * PAGE};
	struct sn_piece *flying = NULL;
	uint64_t batch[2 * MAX_SPANS];
	int nbatch = 0, pagemap;
	char path[64];

	sn_survey(session, true, &seen);
	if (seen.outcome != SN_MOVED)
		return;
	choose(pid, &seen, &parts);
	snprintf(path, sizeof(path), "/proc/%d/pagemap", pid);
	pagemap = open(path, O_RDONLY | O_CLOEXEC);
	for (int i = 0; i < parts.n && pagemap >= 0; i++) {
		uint64_t at = parts.ends[2 * i], found[4];

		while (at < parts.ends[2 * i + 1] &&
		       sn_next_piece(pagemap, at, parts.ends[2 * i + 1], &limits, found) == 1) {
			at = found[1];
			if (random_below(rng, 100) < 40)
				continue;
			batch[2 * nbatch] = found[0];
			batch[2 * nbatch + 1] = found[1];
			if (++nbatch < 4 && at < parts.ends[2 * i + 1])
				continue;
			struct sn_piece *piece = sn_piece_create(session, batch, nbatch, HINT);
			struct sn_piece_report report;

			nbatch = 0;
			if (!piece)
				fail("sn_piece_create");
			if (sn_piece_move(piece, true, &report)) {
				sn_piece_free(piece);
				continue;
			}
			atomic_fetch_add(&moved_pages, report.aside + report.clean + report.zero);
			sn_piece_pack(piece, LEVEL);
			if (flying)
				see_through(flying);
			flying = piece;
		}
	}
	if (flying)
		see_through(flying);
	if (pagemap >= 0)
		close(pagemap);
	sn_page_map_trim(session);
	sn_store_trim(store);
}

/* ---- what goes on beside the dumps ---- */

static void take_notices(void)
{
	struct sn_notice notice;

	while (sn_next_notice(&notice)) {
		if (notice.kind == SN_NOTICE_CHILD && nchildren < MAX_CHILDREN)
			children[nchildren++] = notice.child;
		for (int i = 0; notice.kind == SN_NOTICE_GONE && i < nchildren; i++)
			if (sn_session_id(children[i]) == notice.session) {
				sn_session_close(children[i]);
				children[i] = children[--nchildren];
				break;
			}
		if (notice.kind == SN_NOTICE_BAD_FRAME) {
			fprintf(stderr, "driver: a page is lost at %#lx\n", notice.address);
			_exit(1);
		}
	}
}

static void *look_on(void *unused)
{
	struct sn_counts counts;
	struct sn_stats stats;
	struct sn_region regions[64];
	struct sn_store_stats stored;

	(void)unused;
	while (!atomic_load(&ending)) {
		sn_session_stats(session, &stats);
		sn_session_counts(session, &counts);
		sn_session_regions(session, regions, 64);
		sn_store_stats(store, &stored);
		take_notices();
		usleep(5000);
	}
	return NULL;
}

static void *bring_back(void *unused)
{
	uint64_t rng = 7, pages;
	struct sn_region regions[64];

	(void)unused;
	while (!atomic_load(&ending)) {
		uint64_t n = sn_session_regions(session, regions, 64);

		n = min_u64(n, 64);
		if (n) {
			const struct sn_region *one = &regions[random_below(&rng, n)];

			pthread_mutex_lock(&operation);
			sn_restore(session, one->start, one->start + one->npages * PAGE / 2, 0, &pages);
			pthread_mutex_unlock(&operation);
			atomic_fetch_add(&restores, 1);
		}
		usleep(20000);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	char directory[] = "/tmp/snapd-driver-XXXXXX", path[64];
	uint64_t rng = 1, end;
	pthread_t looker, bringer;
	int listener, status = 0;
	pid_t pid;

	if (argc < 4) {
		fprintf(stderr, "usage: driver AGENT-LIBRARY SECONDS PROGRAM [ARGUMENT]...\n");
		return 2;
	}
	if (!mkdtemp(directory))
		fail("mkdtemp");
	snprintf(path, sizeof(path), "%s/agent.sock", directory);
	listener = listen_for_agent(path);
	pid = start_program(argv[1], path, argv + 3);
	start_engine();
	attach(pid, listener);
	unlink(path);
	rmdir(directory);
	pthread_create(&looker, NULL, look_on, NULL);
	pthread_create(&bringer, NULL, bring_back, NULL);
	end = now_ns() + strtoull(argv[2], NULL, 10) * 1000000000ULL;
	while (now_ns() < end && waitpid(pid, &status, WNOHANG) == 0) {
		pthread_mutex_lock(&operation);
		dump(pid, &rng);
		pthread_mutex_unlock(&operation);
		usleep((useconds_t)random_below(&rng, 30000));
	}
	/* The program ends by itself, served to its end. */
	atomic_store(&ending, true);
	pthread_join(bringer, NULL);
	pthread_join(looker, NULL);
	while (kill(pid, 0) == 0 && waitpid(pid, &status, WNOHANG) == 0)
		usleep(10000);
	take_notices();
	fprintf(stderr, "driver: %lu pieces, %lu pages moved, %lu restores, %d children left\n", dumps, moved_pages,
		restores, nchildren);
	for (int i = 0; i < nchildren; i++)
		sn_session_close(children[i]);
	for (int i = 0; i < nfailed; i++)
		sn_piece_free(failed[i]);
	sn_session_close(session);
	sn_store_release(store);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
