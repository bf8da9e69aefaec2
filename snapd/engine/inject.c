/* Attaching: a target that knows nothing of us gets a userfaultfd, a sentinel and the code for borrowed threads, by
 * system calls that one of its threads is made to carry out while all stand; and loses them again at the end.
 *
 * Here there is no code of ours in the target yet (or no longer), so each call goes by an instruction that the target
 * has itself, with a ptrace stop before and after. Descriptors come by a socket pair that lives for these calls alone.
 * Knows no session but to lend what it made.
 */
#include "borrow.h"
#include "faultpoint.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define STOP_TRIES 50
#define STOP_TRIES_AGAIN 2 /* of one thread; who asked asks again */
#define STOP_PAUSE_US 5000
#define KCMP_FILE 0
#define NAME "snapd"
#define EXECUTABLE 0x10 /* MFD_EXEC, newer than some headers */
#define TRAP (SIGTRAP | 0x80)

#define REGION_BYTES (CODE_BYTES + CONTROL_BYTES)
#define SENTINEL_BYTES (3 * PAGE) /* with neighbours without access, so that no mapping merges with it */

struct scratch { /* in the target, where the control block will be */
	int pair[2];
	struct msghdr header;
	struct iovec iov;
	char byte;
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(2 * sizeof(int))];
	} rights;
};

struct injector {
	struct stop *stop;
	struct thread *thread;
	int pid, pidfd, mem;
	uint64_t call_site, mask;
	int gift, make;
	struct haste haste;
	struct sn_injection *ret;
	int error;
};

/* Runs to the next entry or exit of a system call. */
static int to_next_trap(struct injector *injector)
{
	struct thread *thread = injector->thread;
	int status;

	for (;;) {
		if (ptrace(PTRACE_SYSCALL, thread->tid, NULL, NULL) ||
		    waitpid(thread->tid, &status, __WALL | __WNOTHREAD) != thread->tid || !WIFSTOPPED(status)) {
			thread->gone = true;
			return -ESRCH;
		}
		if (WSTOPSIG(status) == TRAP)
			return 0;
		if (WSTOPSIG(status) == SIGSTOP && status >> 16 == 0)
			thread->again = SIGSTOP;
		else if (status >> 16 == 0)
			return -EFAULT;
	}
}

static long call(struct injector *injector, long number, const uint64_t args[6])
{
	arch_regs regs = injector->thread->regs;
	int error;

	if (injector->error)
		return injector->error;
	arch_call_with(&regs, injector->call_site, number, args);
	error = ptrace(PTRACE_SETREGS, injector->thread->tid, NULL, &regs) ? -ESRCH : 0;
	FAULT_POINT(FP_INJECTING);
	if (!error)
		error = to_next_trap(injector);
	if (!error)
		error = to_next_trap(injector);
	if (!error && ptrace(PTRACE_GETREGS, injector->thread->tid, NULL, &regs))
		error = -ESRCH;
	injector->error = error;
	return error ? error : arch_result(&regs);
}
#define CALL(injector, number, ...) call(injector, number, (const uint64_t[6]){__VA_ARGS__})

static bool find_instruction(int mem, uint64_t start, uint64_t end, uint64_t *ret)
{
	static const unsigned char wanted[ARCH_CALL_BYTES] = ARCH_CALL_CODE;
	unsigned char text[PAGE];

	for (uint64_t at = start; at < end; at += PAGE) {
		ssize_t n = pread(mem, text, sizeof(text), (off_t)at);

		for (ssize_t i = 0; i + (ssize_t)ARCH_CALL_BYTES <= n; i++)
			if (memcmp(text + i, wanted, sizeof(wanted)) == 0) {
				*ret = at + (uint64_t)i;
				return true;
			}
	}
	return false;
}

/* The kernel's own code in every process has one, or else some library. */
static int find_call_site(struct injector *injector)
{
	char path[64], line[512], permissions[5];
	uint64_t start, end;
	int found = -ENOEXEC;
	FILE *maps;

	snprintf(path, sizeof(path), "/proc/%d/maps", injector->pid);
	maps = fopen(path, "re");
	if (!maps)
		return -ESRCH;
	while (found && fgets(line, sizeof(line), maps))
		if (strstr(line, "[vdso]") && sscanf(line, "%lx-%lx", &start, &end) == 2 &&
		    find_instruction(injector->mem, start, end, &injector->call_site))
			found = 0;
	rewind(maps);
	while (found && fgets(line, sizeof(line), maps))
		if (sscanf(line, "%lx-%lx %4s", &start, &end, permissions) == 3 && permissions[2] == 'x' &&
		    !strstr(line, "[vsyscall]") &&
		    find_instruction(injector->mem, start, end, &injector->call_site))
			found = 0;
	fclose(maps);
	return found;
}

/* A thread that is made to call, with no signal in between. */
static int begin_calls(struct injector *injector)
{
	uint64_t all = ~0ULL;
	int error = -EAGAIN;

	injector->thread = NULL;
	for (int i = 0; i < injector->stop->nthreads && !injector->thread; i++) {
		struct thread *thread = &injector->stop->threads[i];

		error = borrow_ready(injector->stop, thread);
		if (!error)
			injector->thread = thread;
	}
	if (error)
		return error;
	if (ptrace(PTRACE_GETSIGMASK, injector->thread->tid, (void *)sizeof(all), &injector->mask) ||
	    ptrace(PTRACE_SETSIGMASK, injector->thread->tid, (void *)sizeof(all), &all))
		return -ESRCH;
	haste_begin(injector->thread->tid, &injector->haste);
	return 0;
}

static void end_calls(struct injector *injector)
{
	if (!injector->thread || injector->thread->gone)
		return;
	ptrace(PTRACE_SETREGS, injector->thread->tid, NULL, &injector->thread->regs);
	ptrace(PTRACE_SETSIGMASK, injector->thread->tid, (void *)sizeof(injector->mask), &injector->mask);
	haste_end(&injector->haste);
}

static void close_there(struct injector *injector, long fd)
{
	if (fd >= 0)
		CALL(injector, SYS_close, (uint64_t)fd);
}

static int send_gifts(int sock, int first, int second)
{
	struct scratch local = {0};
	struct cmsghdr *rights = &local.rights.header;

	local.iov = (struct iovec){&local.byte, 1};
	local.header = (struct msghdr){.msg_iov = &local.iov, .msg_iovlen = 1, .msg_control = &local.rights,
				       .msg_controllen = sizeof(local.rights)};
	*rights = (struct cmsghdr){.cmsg_len = CMSG_LEN(2 * sizeof(int)), .cmsg_level = SOL_SOCKET,
				   .cmsg_type = SCM_RIGHTS};
	memcpy(CMSG_DATA(rights), (int[2]){first, second}, 2 * sizeof(int));
	return sendmsg(sock, &local.header, MSG_NOSIGNAL | MSG_DONTWAIT) == 1 ? 0 : -errno;
}

/* Two of our descriptors become the target's. at: room for a scratch. */
static int give(struct injector *injector, uint64_t at, int first, int second, int ret[2])
{
	struct scratch there = {.pair = {-1, -1}};
	long result = CALL(injector, SYS_socketpair, AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0, at);
	int sock, error;

	ret[0] = ret[1] = -1;
	if (result < 0)
		return (int)result;
	if (pread(injector->mem, there.pair, sizeof(there.pair), (off_t)at) != sizeof(there.pair))
		return -EFAULT;
	sock = (int)syscall(SYS_pidfd_getfd, injector->pidfd, there.pair[1], 0);
	error = sock < 0 ? -errno : send_gifts(sock, first, second);
	if (!error) {
		there.iov = (struct iovec){(void *)(at + offsetof(struct scratch, byte)), 1};
		there.header = (struct msghdr){.msg_iov = (void *)(at + offsetof(struct scratch, iov)), .msg_iovlen = 1,
					       .msg_control = (void *)(at + offsetof(struct scratch, rights)),
					       .msg_controllen = sizeof(there.rights)};
		if (pwrite(injector->mem, &there, sizeof(there), (off_t)at) != sizeof(there))
			error = -EFAULT;
	}
	if (!error) {
		result = CALL(injector, SYS_recvmsg, (uint64_t)there.pair[0], at + offsetof(struct scratch, header),
			      MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
		error = result == 1 ? 0 : result < 0 ? (int)result : -EPROTO;
	}
	if (!error && pread(injector->mem, &there, sizeof(there), (off_t)at) != sizeof(there))
		error = -EFAULT;
	if (!error && there.rights.header.cmsg_len >= CMSG_LEN(sizeof(int)))
		memcpy(ret, CMSG_DATA(&there.rights.header),
		       min_u64(there.rights.header.cmsg_len - CMSG_LEN(0), 2 * sizeof(int)));
	if (!error && ret[1] < 0)
		error = -EMFILE; /* it has no room for so many; what there was room for is closed by the caller */
	if (sock >= 0)
		close(sock);
	close_there(injector, there.pair[0]);
	close_there(injector, there.pair[1]);
	return error ? error : injector->error;
}

static int make_control(void)
{
	int fd = memfd_create(NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING | EXECUTABLE);

	if (fd < 0)
		fd = memfd_create(NAME, MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (fd < 0)
		return -errno;
	if (ftruncate(fd, CODE_BYTES + CONTROL_BYTES) ||
	    pwrite(fd, sn_stub_begin, (size_t)(sn_stub_end - sn_stub_begin), 0) != sn_stub_end - sn_stub_begin ||
	    fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)) {
		int error = -errno;

		close(fd);
		return error;
	}
	return fd;
}

static int map_fixed(struct injector *injector, uint64_t at, uint64_t bytes, int protection, int flags, int fd,
		     uint64_t offset)
{
	long result = CALL(injector, SYS_mmap, at, bytes, (uint64_t)protection, (uint64_t)(flags | MAP_FIXED),
			   (uint64_t)fd, offset);

	return result < 0 && result > -4096 ? (int)result : 0;
}

static int map_anywhere(struct injector *injector, uint64_t bytes, uint64_t *ret)
{
	long result = CALL(injector, SYS_mmap, 0, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
			   (uint64_t)-1, 0);

	if (result < 0 && result > -4096)
		return (int)result;
	*ret = (uint64_t)result;
	return 0;
}

static int map_sentinel(struct injector *injector)
{
	uint64_t at;
	int error = map_anywhere(injector, SENTINEL_BYTES, &at);

	if (error)
		return error;
	injector->ret->sentinel = at + PAGE;
	return map_fixed(injector, at + PAGE, PAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

/* By maps of a process: a program may unmap what it did not map, and then have something of its own there. */
static bool is_code(int maps, uint64_t at)
{
	static const char wanted[] = "/memfd:" NAME " ";
	char name[256] = "";
	struct snapd_procmap_query vma = {.size = sizeof(vma), .query_addr = at, .vma_name_addr = (uintptr_t)name,
					  .vma_name_size = sizeof(name)};

	return ioctl(maps, SNAPD_PROCMAP_QUERY, &vma) == 0 && vma.vma_start == at &&
	       strncmp(name, wanted, sizeof(wanted) - 1) == 0;
}

/* By what the process executes now: the session's own descriptors show the address space that it was. */
static bool is_ours(int pid, uint64_t at)
{
	char path[64];
	bool ret;
	int maps;

	snprintf(path, sizeof(path), "/proc/%d/maps", pid);
	maps = open(path, O_RDONLY | O_CLOEXEC);
	ret = maps >= 0 && is_code(maps, at);
	if (maps >= 0)
		close(maps);
	return ret;
}

/* 0, -EFAULT: the program has unmapped it, or -EPIPE: it has executed another program, and what is held of the former
 * one's memory still shows it. */
int loan_find_code(struct sn_session *session)
{
	uint64_t at = session->pm.header->attached.start;

	if (is_ours(atomic_load(&session->pid), at))
		return 0;
	return is_code(atomic_load(&session->maps_fd), at) ? -EPIPE : -EFAULT;
}

static void unmap_all(struct injector *injector)
{
	const struct sn_injection *what = injector->ret;

	if (what->sentinel)
		CALL(injector, SYS_munmap, what->sentinel - PAGE, SENTINEL_BYTES);
	if (what->region_bytes && is_ours(injector->pid, what->region) &&
	    is_ours(injector->pid, what->region + CODE_BYTES))
		CALL(injector, SYS_munmap, what->region, what->region_bytes);
}

/* All that a target gets. What of it is there when something fails is taken back. */
static int put_in(struct injector *injector)
{
	struct sn_injection *ret = injector->ret;
	int there[2] = {-1, -1}, error;
	uint64_t control;
	long number = -1;

	error = map_anywhere(injector, REGION_BYTES, &ret->region);
	if (error)
		return error;
	ret->region_bytes = REGION_BYTES;
	control = ret->region + CODE_BYTES;
	error = map_fixed(injector, control, CONTROL_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
			  0);
	if (!error)
		error = give(injector, control, ret->control, injector->gift, there);
	if (!error && injector->make)
		error = map_sentinel(injector);
	if (!error)
		error = map_fixed(injector, ret->region, CODE_BYTES, PROT_READ | PROT_EXEC, MAP_SHARED, there[0], 0);
	if (!error)
		error = map_fixed(injector, control, CONTROL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, there[0],
				  CODE_BYTES);
	if (!error)
		error = (int)CALL(injector, SYS_madvise, ret->region, REGION_BYTES, SNAPD_MADV_DONTFORK);
	if (!error && injector->make) {
		number = CALL(injector, SYS_ioctl, (uint64_t)there[1], SNAPD_USERFAULTFD_IOC_NEW,
			      O_CLOEXEC | O_NONBLOCK);
		error = number < 0 ? (int)number : 0;
		close_there(injector, there[1]);
	} else {
		number = there[1];
	}
	close_there(injector, there[0]);
	if (!error && injector->make) {
		ret->uffd = (int)syscall(SYS_pidfd_getfd, injector->pidfd, number, 0);
		error = ret->uffd < 0 ? -errno : 0;
	}
	ret->number = (int)number;
	if (error) {
		close_there(injector, number);
		if (ret->sentinel)
			CALL(injector, SYS_munmap, ret->sentinel - PAGE, SENTINEL_BYTES);
		CALL(injector, SYS_munmap, ret->region, REGION_BYTES);
	}
	return error ? error : injector->error;
}

/* Another thread may be on its way through our code yet: of a daemon that died, say. */
static bool is_in_use(const struct injector *injector)
{
	const struct sn_injection *region = injector->ret;

	for (int i = 0; i < injector->stop->nthreads; i++) {
		const struct thread *thread = &injector->stop->threads[i];

		if (thread->have_regs && arch_ip(&thread->regs) - region->region < region->region_bytes)
			return true;
	}
	return false;
}

/* uffd is gift here. A descriptor of the same number that is the program's own stays. */
static int take_out(struct injector *injector)
{
	const struct sn_injection *was = injector->ret;

	if (is_in_use(injector))
		return -EAGAIN;
	if (was->number >= 0 && injector->gift >= 0 &&
	    syscall(SYS_kcmp, injector->pid, getpid(), KCMP_FILE, was->number, injector->gift) == 0)
		close_there(injector, was->number);
	unmap_all(injector);
	return injector->error;
}

/* Who hands over ends this process, and must not end it inside a call: then the thread would never be put back. Who
 * waits goes before all that come later. */
static pthread_rwlock_t gate = PTHREAD_RWLOCK_WRITER_NONRECURSIVE_INITIALIZER_NP;

void sn_injections_end(void)
{
	pthread_rwlock_wrlock(&gate);
}

void sn_injections_go_on(void)
{
	pthread_rwlock_unlock(&gate);
}

struct job {
	struct injector injector;
	int (*work)(struct injector *injector);
	bool any; /* one thread that stands is enough */
	int ret;
	uint64_t stop_ns;
};

static int meaning(int outcome, int cause)
{
	return outcome == SN_GONE ? -ESRCH : outcome == SN_TRACED ? -EBUSY : cause == -EPERM ? -EPERM : -EAGAIN;
}

static void job_main(void *arg)
{
	static const int nobody[2];
	struct job *job = arg;
	struct injector *injector = &job->injector;
	uint64_t began = now_ns();
	/* A thread may wait in the kernel for a page that only somebody who is lent will bring. */
	int outcome = job->any ? stop_begin_one(injector->stop, injector->pid)
			       : stop_begin(injector->stop, injector->pid, nobody, true);

	job->ret = outcome == SN_MOVED ? begin_calls(injector) : meaning(outcome, stop_cause(injector->stop));
	if (outcome != SN_MOVED)
		return;
	if (!job->ret) {
		job->ret = job->work(injector);
		end_calls(injector);
	}
	stop_finish(injector->stop);
	job->stop_ns = now_ns() - began;
}

static int run_job(struct job *job)
{
	struct injector *injector = &job->injector;
	char path[64];
	int error;

	snprintf(path, sizeof(path), "/proc/%d/mem", injector->pid);
	injector->mem = open(path, O_RDWR | O_CLOEXEC);
	if (injector->mem < 0)
		return errno == ENOENT ? -ESRCH : -errno;
	injector->pidfd = (int)syscall(SYS_pidfd_open, injector->pid, 0);
	injector->stop = stop_create();
	error = injector->pidfd < 0 ? -errno : injector->stop ? find_call_site(injector) : -ENOMEM;
	job->ret = error ? error : -EAGAIN;
	for (int tries = 0; tries < (job->any ? STOP_TRIES_AGAIN : STOP_TRIES) && job->ret == -EAGAIN; tries++) {
		if (tries)
			usleep(STOP_PAUSE_US);
		injector->error = 0;
		pthread_rwlock_rdlock(&gate);
		error = stop_run(injector->stop, job_main, job);
		pthread_rwlock_unlock(&gate);
		if (error)
			job->ret = -error;
	}
	stop_destroy(injector->stop);
	if (injector->pidfd >= 0)
		close(injector->pidfd);
	close(injector->mem);
	return job->ret;
}

int sn_inject(int pid, int gift, int make, struct sn_injection *ret)
{
	struct job job = {.injector = {.pid = pid, .gift = gift, .make = make, .ret = ret}, .work = put_in,
			  .any = !make};
	int error;

	*ret = (struct sn_injection){.number = -1, .uffd = -1, .control = make_control()};
	if (ret->control < 0)
		return ret->control;
	error = run_job(&job);
	ret->stop_ns = job.stop_ns;
	if (error) {
		close(ret->control);
		if (ret->uffd >= 0)
			close(ret->uffd);
	}
	return error;
}

int sn_eject(int pid, const struct sn_injection *injection, int uffd)
{
	struct sn_injection was = *injection;
	struct job job = {.injector = {.pid = pid, .gift = uffd, .ret = &was}, .work = take_out};

	return run_job(&job);
}

void loan_forget(struct sn_session *session)
{
	if (session->loan)
		munmap(session->loan->control, CONTROL_BYTES);
	free(session->loan);
	session->loan = NULL;
}

int sn_session_lend(struct sn_session *session, const struct sn_injection *injection)
{
	struct loan *loan = injection->region_bytes ? calloc(1, sizeof(*loan)) : NULL;
	void *control = MAP_FAILED;

	if (loan)
		control = mmap(NULL, CONTROL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, injection->control, CODE_BYTES);
	if (injection->region_bytes && control == MAP_FAILED) {
		free(loan);
		return -ENOMEM;
	}
	if (loan)
		*loan = (struct loan){.control = control, .code = injection->region,
				      .uffd = injection->number, .haste = &session->pm.header->haste};
	pthread_mutex_lock(&session->mover);
	loan_forget(session);
	session->loan = loan;
	session->pm.header->attached = (struct snapd_run){injection->region, injection->region_bytes};
	session->pm.header->attached_uffd = injection->number;
	pthread_mutex_unlock(&session->mover);
	if (loan)
		close(injection->control);
	return 0;
}

void sn_session_injection(struct sn_session *session, struct sn_injection *ret)
{
	const struct page_map_header *header = session->pm.header;

	*ret = (struct sn_injection){.region = header->attached.start, .region_bytes = header->attached.length,
				     .sentinel = header->sentinel, .number = header->attached_uffd, .uffd = -1,
				     .control = -1};
}

int sn_session_has_uffd(struct sn_session *session)
{
	return syscall(SYS_kcmp, atomic_load(&session->pid), getpid(), KCMP_FILE, session->pm.header->attached_uffd,
		       session->uffd) == 0;
}
