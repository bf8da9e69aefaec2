/* An io_uring by raw system calls, as much of it as pins.c needs: prepare, submit, take one completion.
 * It knows nothing of what the buffers hold. */
#ifndef TARGETS_RING_H
#define TARGETS_RING_H

#include "common.h"
#include <linux/io_uring.h>
#include <stdatomic.h>
#include <sys/syscall.h>
#include <sys/uio.h>

struct ring {
    int fd;
    unsigned entries, prepared;
    uint64_t interrupted; /* waits that ended with EINTR: io_uring_enter is not restarted after a stop */
    atomic_uint *sq_tail, *cq_head, *cq_tail;
    unsigned sq_mask, cq_mask;
    unsigned *sq_array;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
};

/* False with errno set where the kernel or a policy refuses io_uring. */
static inline bool ring_init(struct ring *ret, unsigned entries)
{
    struct io_uring_params params = {0};
    *ret = (struct ring){.fd = (int)syscall(SYS_io_uring_setup, entries, &params)};
    if (ret->fd == -1)
        return false;
    if (!(params.features & IORING_FEAT_SINGLE_MMAP)) {
        errno = ENOSYS;
        return false;
    }
    size_t sq_bytes = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    size_t cq_bytes = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    char *rings = mmap(NULL, sq_bytes > cq_bytes ? sq_bytes : cq_bytes, PROT_READ | PROT_WRITE,
                       MAP_SHARED | MAP_POPULATE, ret->fd, IORING_OFF_SQ_RING);
    void *sqes = mmap(NULL, params.sq_entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE,
                      MAP_SHARED | MAP_POPULATE, ret->fd, IORING_OFF_SQES);
    if (rings == MAP_FAILED || sqes == MAP_FAILED)
        fail_errno("mmap of an io_uring");
    ret->entries = params.sq_entries;
    ret->sq_tail = (atomic_uint *)(rings + params.sq_off.tail);
    ret->sq_mask = *(unsigned *)(rings + params.sq_off.ring_mask);
    ret->sq_array = (unsigned *)(rings + params.sq_off.array);
    ret->cq_head = (atomic_uint *)(rings + params.cq_off.head);
    ret->cq_tail = (atomic_uint *)(rings + params.cq_off.tail);
    ret->cq_mask = *(unsigned *)(rings + params.cq_off.ring_mask);
    ret->cqes = (struct io_uring_cqe *)(rings + params.cq_off.cqes);
    ret->sqes = sqes;
    return true;
}

static inline void ring_register_buffer(const struct ring *ring, void *at, size_t length)
{
    struct iovec buffer = {at, length};
    if (syscall(SYS_io_uring_register, ring->fd, IORING_REGISTER_BUFFERS, &buffer, 1) == -1)
        fail_errno("IORING_REGISTER_BUFFERS");
}

static inline void ring_prepare(struct ring *ring, uint8_t opcode, int fd, void *at, size_t length, uint64_t offset,
                                uint64_t user_data)
{
    unsigned tail = atomic_load_explicit(ring->sq_tail, memory_order_relaxed), slot = tail & ring->sq_mask;
    ring->sqes[slot] = (struct io_uring_sqe){
        .opcode = opcode,
        .fd = fd,
        .addr = (uint64_t)(uintptr_t)at,
        .len = (uint32_t)length,
        .off = offset,
        .user_data = user_data,
    };
    ring->sq_array[slot] = slot;
    atomic_store_explicit(ring->sq_tail, tail + 1, memory_order_release);
    ring->prepared++;
}

static inline void ring_enter(struct ring *ring, unsigned wait_for)
{
    while (ring->prepared || wait_for) {
        long submitted = syscall(SYS_io_uring_enter, ring->fd, ring->prepared, wait_for,
                                 wait_for ? IORING_ENTER_GETEVENTS : 0, NULL, 0);
        if (submitted == -1) {
            if (errno != EINTR)
                fail_errno("io_uring_enter");
            ring->interrupted++;
            continue;
        }
        /* What was submitted counts first: an interruption of the wait is then not reported. The caller looks again. */
        ring->prepared -= (unsigned)submitted;
        if (!ring->prepared)
            return;
    }
}

struct completion {
    uint64_t user_data;
    int result; /* bytes, or a negative errno */
};

/* Waits for a completion and takes it. */
static inline struct completion ring_take(struct ring *ring)
{
    unsigned head = atomic_load_explicit(ring->cq_head, memory_order_relaxed);
    while (head == atomic_load_explicit(ring->cq_tail, memory_order_acquire))
        ring_enter(ring, 1);
    const struct io_uring_cqe *cqe = &ring->cqes[head & ring->cq_mask];
    struct completion completion = {.user_data = cqe->user_data, .result = cqe->res};
    atomic_store_explicit(ring->cq_head, head + 1, memory_order_release);
    return completion;
}

#endif
