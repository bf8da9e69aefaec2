/* The operations of churn.c, each on areas of its own thread only, each verified on the spot. They know no weights
 * and no time: churn.c chooses. */
#ifndef TARGETS_OPERATIONS_H
#define TARGETS_OPERATIONS_H

#include "children.h"
#include <pthread.h>

#define GUARD_INSTALL 102 /* MADV_GUARD_INSTALL, newer than many headers */
#define GUARD_REMOVE 103
#define FILE_BLOCKS 256
#define MAX_AREAS 64
#define MAX_OPERATIONS 32

/* Owned by one thread. It lives in shared memory like the shadow table: who corrupts the heap must not corrupt this. */
struct worker {
    pthread_t thread;
    unsigned number;
    struct rng rng;
    uint32_t serial; /* counter of the newest write */
    uint64_t done[MAX_OPERATIONS];
    uint64_t refused, refused_whole, grown_in_place;
    uint64_t pages, live_pages; /* at the end */
    int pipe[2];
    struct child child[CHILD_SLOTS];
    struct area area[MAX_AREAS];
};

static struct {
    unsigned threads, seconds, areas, pace_us, window, thp;
    size_t mib;
    uint64_t seed, slow_ms;
    const char *direct;
    bool guards, strict_mremap;
} options = {.threads = 8, .seconds = 10, .areas = 4, .window = 100, .mib = 256, .seed = 1};

static int direct_fd = -1;

static struct area *pick_area(struct worker *worker)
{
    return &worker->area[rng_below(&worker->rng, options.areas)];
}

/* A run of 1 to most pages, small ones more often than large ones. */
static uint32_t pick_run(struct worker *worker, const struct area *area, uint32_t most, uint32_t *ret_page)
{
    uint32_t limit = 1 + (uint32_t)rng_below(&worker->rng, most);
    uint32_t npages = 1 + (uint32_t)rng_below(&worker->rng, limit);
    if (npages > area_npages(area))
        npages = area_npages(area);
    *ret_page = area->lo + (uint32_t)rng_below(&worker->rng, area_npages(area) - npages + 1);
    return npages;
}

static uint32_t pick_page(struct worker *worker, const struct area *area)
{
    uint32_t npages = area_npages(area);
    uint32_t window = npages * options.window / 100;
    if (window == 0)
        window = 1;
    uint64_t start = mix64(area->tag + (here.serial >> 14));
    return area->lo + (uint32_t)((start + rng_below(&worker->rng, window)) % npages);
}

static bool writable(const struct view *view)
{
    return !view->read_only && view->shadow->kind != GUARD_KIND;
}

static void do_rmw(struct worker *worker)
{
    struct area *area = pick_area(worker);
    for (int i = 0; i < 16; i++) {
        struct view view = area_view(area, pick_page(worker, area));
        size_t line = rng_below(&worker->rng, PAGE_LINES);
        if (!writable(&view)) {
            check_page(&view);
        } else if (view.shadow->kind >= FILE_KIND) {
            check_page(&view);
            write_page(&view, ++worker->serial);
        } else {
            if (view.shadow->lazy)
                check_page(&view);
            check_line(&view, line);
            write_line(&view, line, ++worker->serial);
        }
    }
}

static void do_read(struct worker *worker)
{
    struct area *area = pick_area(worker);
    for (int i = 0; i < 16; i++) {
        struct view view = area_view(area, pick_page(worker, area));
        if (view.shadow->kind == GUARD_KIND)
            check_page(&view);
        else
            check_line(&view, rng_below(&worker->rng, PAGE_LINES));
    }
}

static void do_fill(struct worker *worker)
{
    struct area *area = pick_area(worker);
    uint32_t page, npages = pick_run(worker, area, 512, &page);
    for (uint32_t i = 0; i < npages; i++) {
        struct view view = area_view(area, page + i);
        check_page(&view);
        if (writable(&view))
            write_page(&view, ++worker->serial);
    }
}

/* Guards outlive both kinds of discard. */
static void discard(struct worker *worker, int advice)
{
    struct area *area = pick_area(worker);
    uint32_t page, npages = pick_run(worker, area, 128, &page);
    if (madvise(area_page(area, page), npages * PAGE, advice) == -1)
        fail_errno("madvise");
    for (uint32_t i = page; i < page + npages; i++) {
        if (area->shadow[i].kind == GUARD_KIND)
            continue;
        if (advice == MADV_FREE)
            area->shadow[i].lazy = true;
        else
            area_forget(area, i, 1);
    }
    uint32_t checks = npages < 4 ? npages : 4;
    for (uint32_t i = 0; i < checks; i++)
        area_check(area, page + (uint32_t)rng_below(&worker->rng, npages));
}

static void do_dontneed(struct worker *worker)
{
    discard(worker, MADV_DONTNEED);
}

static void do_free(struct worker *worker)
{
    discard(worker, MADV_FREE);
}

static void check_some(struct worker *worker, const struct area *area, int npages)
{
    for (int i = 0; i < npages; i++)
        area_check(area, area->lo + (uint32_t)rng_below(&worker->rng, area_npages(area)));
}

static uint32_t pick_size(struct worker *worker, const struct area *area)
{
    return area->capacity / 3 + (uint32_t)rng_below(&worker->rng, area->capacity / 2);
}

static void renew(struct worker *worker, struct area *area)
{
    area_unmap(area);
    area_map(area, pick_size(worker, area));
    check_some(worker, area, 8);
}

static void do_anew(struct worker *worker)
{
    renew(worker, pick_area(worker));
}

static void do_over(struct worker *worker)
{
    struct area *area = pick_area(worker);
    uint32_t page, npages = pick_run(worker, area, 256, &page);
    area_map_over(area, page, npages);
    area_check(area, page);
    area_check(area, page + npages - 1);
}

static void do_trim(struct worker *worker)
{
    struct area *area = pick_area(worker);
    uint32_t npages = 1 + (uint32_t)rng_below(&worker->rng, area->capacity / 16);
    if (area_npages(area) < area->capacity / 4 + npages)
        renew(worker, area);
    else if (rng_below(&worker->rng, 2))
        area_trim_front(area, npages);
    else
        area_trim_back(area, npages);
    area_check(area, area->lo);
    area_check(area, area->hi - 1);
}

/* Where the area is several VMAs (fresh memory does not merge into a mapping that has moved) the kernel refuses with
 * EFAULT, and nothing has changed. One that is whole is refused only when another party split it. */
static bool remap(struct worker *worker, struct area *area, uint32_t npages, int flags, void *place)
{
    if (area_remap(area, npages, flags, place))
        return true;
    int error = errno;
    area->stuck = true;
    worker->refused++;
    if (area->whole) {
        worker->refused_whole++;
        if (options.strict_mremap)
            fail("FAILED mremap of a whole mapping at %p: %s", (void *)area->at, strerror(error));
    }
    return false;
}

static void do_grow(struct worker *worker)
{
    struct area *area = pick_area(worker);
    uint32_t room = area->capacity - area->hi, old_hi = area->hi;
    if (area->stuck || room == 0)
        return;
    uint32_t npages = area_npages(area) + 1 + (uint32_t)rng_below(&worker->rng, room);
    if (area_remap(area, npages, 0, NULL))
        worker->grown_in_place++;
    else if (!remap(worker, area, npages, MREMAP_MAYMOVE, NULL))
        return;
    area_check(area, old_hi - 1);
    area_check(area, old_hi);
    area_check(area, area->hi - 1);
    check_some(worker, area, 4);
}

static void do_shrink(struct worker *worker)
{
    struct area *area = pick_area(worker);
    uint32_t npages = area_npages(area), less = 1 + (uint32_t)rng_below(&worker->rng, area->capacity / 8);
    if (area->stuck || npages < area->capacity / 4 + less)
        return;
    if (remap(worker, area, npages - less, rng_below(&worker->rng, 2) ? MREMAP_MAYMOVE : 0, NULL))
        check_some(worker, area, 4);
}

/* As a realloc into a place of its own choice: a reservation holds the hole until the kernel replaces it. An equal
 * size is asked for only where a refusal is an error: of several VMAs the kernel may then have moved the first ones. */
static void do_hole(struct worker *worker)
{
    struct area *area = pick_area(worker);
    uint32_t npages = area_npages(area), most = area->capacity - area->lo;
    if (area->stuck)
        return;
    uint32_t size = most / 2 + 1 + (uint32_t)rng_below(&worker->rng, most - most / 2);
    if (area->whole && options.strict_mremap && rng_below(&worker->rng, 2))
        size = npages;
    else if (size == npages)
        size--;
    void *hole = mmap(NULL, size * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (hole == MAP_FAILED)
        fail_errno("mmap of a reservation");
    /* After a refusal the reservation may be gone and its place another thread's: it is left alone. */
    if (remap(worker, area, size, MREMAP_MAYMOVE | MREMAP_FIXED, hole))
        check_some(worker, area, 8);
}

static void do_dontunmap(struct worker *worker)
{
    struct area *area = pick_area(worker);
    if (area->stuck || !area->whole)
        return;
    char *old = area->at;
    uint32_t npages = area_npages(area);
    if (!remap(worker, area, npages, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL))
        return;
    for (int i = 0; i < 8; i++) {
        const char *page = old + rng_below(&worker->rng, npages) * PAGE;
        if (!all_zero(page, PAGE))
            fail("MISMATCH churn thread %u after %s: address %p expected zeros found %016lx", here.thread,
                 here.operation, (const void *)page, *(const uint64_t *)page);
    }
    check_some(worker, area, 8);
    if (munmap(old, npages * PAGE) == -1)
        fail_errno("munmap");
}

static void do_protect(struct worker *worker)
{
    struct area *area = pick_area(worker);
    if (area->ro_lo != area->ro_hi) {
        area_unprotect(area);
        return;
    }
    uint32_t page, npages = pick_run(worker, area, 256, &page);
    area_protect(area, page, npages);
    area_check(area, page);
    if (!faults(area_page(area, page + npages - 1), true))
        fail("FAILED churn thread %u: read-only page at %p was writable", here.thread,
             (void *)area_page(area, page + npages - 1));
}

/* The kernel reads the page and, after a discard, writes it. */
static void do_pipe(struct worker *worker)
{
    struct area *area = pick_area(worker);
    struct view view = area_view(area, pick_page(worker, area));
    if (!writable(&view))
        return;
    check_page(&view);
    if (write(worker->pipe[1], view.at, PAGE) != (ssize_t)PAGE)
        fail_errno("write to a pipe");
    if (rng_below(&worker->rng, 2) && madvise(view.at, PAGE, MADV_DONTNEED) == -1)
        fail_errno("MADV_DONTNEED");
    if (read(worker->pipe[0], view.at, PAGE) != (ssize_t)PAGE)
        fail_errno("read from a pipe");
    check_page(&view);
}

static void do_fork(struct worker *worker)
{
    struct child *child = NULL;
    for (int i = 0; i < CHILD_SLOTS; i++) {
        child_reap(&worker->child[i], false);
        if (!worker->child[i].pid)
            child = &worker->child[i];
    }
    while (!child) {
        child_reap(&worker->child[0], true);
        if (!worker->child[0].pid)
            child = &worker->child[0];
    }
    child_sample(child, worker->area, options.areas, &worker->rng);
    pid_t self = getpid(), pid = fork();
    if (pid == -1)
        fail_errno("fork");
    if (pid == 0)
        child_run(child, self);
    child->pid = pid;
    check_some(worker, pick_area(worker), 4);
}

static void do_direct(struct worker *worker)
{
    struct area *area = pick_area(worker);
    uint32_t page, npages = pick_run(worker, area, 128, &page);
    area_unprotect(area);
    for (uint32_t i = 0; i < npages; i++)
        if (area->shadow[page + i].kind == GUARD_KIND)
            npages = i;
    if (npages == 0)
        return;
    uint32_t block = (uint32_t)rng_below(&worker->rng, FILE_BLOCKS - npages + 1);
    ssize_t got = pread(direct_fd, area_page(area, page), npages * PAGE, (off_t)(block * PAGE));
    if (got != (ssize_t)(npages * PAGE))
        fail("FAILED direct read of %u pages gave %zd: %s", npages, got, got < 0 ? strerror(errno) : "short");
    for (uint32_t i = 0; i < npages; i++) {
        area->shadow[page + i].kind = FILE_KIND + block + i;
        area->shadow[page + i].lazy = false;
        area_check(area, page + i);
    }
}

/* Discards first: installing a guard tells nobody that the pages under it are gone. */
static void do_guard(struct worker *worker)
{
    struct area *area = pick_area(worker);
    uint32_t page, npages = pick_run(worker, area, 4, &page);
    char *at = area_page(area, page);
    if (area->shadow[page].kind == GUARD_KIND) {
        if (madvise(at, npages * PAGE, GUARD_REMOVE) == -1)
            fail_errno("MADV_GUARD_REMOVE");
        for (uint32_t i = page; i < page + npages; i++)
            if (area->shadow[i].kind == GUARD_KIND)
                area_forget(area, i, 1);
    } else {
        area_unprotect(area);
        if (madvise(at, npages * PAGE, MADV_DONTNEED) == -1 || madvise(at, npages * PAGE, GUARD_INSTALL) == -1)
            fail_errno("MADV_GUARD_INSTALL");
        for (uint32_t i = page; i < page + npages; i++)
            area->shadow[i].kind = GUARD_KIND;
        if (!faults(at, true))
            fail("FAILED churn thread %u: guard at %p was writable", here.thread, (void *)at);
    }
    for (uint32_t i = page; i < page + npages; i++)
        area_check(area, i);
}

static struct operation {
    const char *name;
    void (*run)(struct worker *worker);
    unsigned weight;
} operations[] = {
    {"rmw", do_rmw, 4000},
    {"read", do_read, 1500},
    {"fill", do_fill, 200},
    {"dontneed", do_dontneed, 160},
    {"free", do_free, 80},
    {"anew", do_anew, 2},
    {"over", do_over, 30},
    {"trim", do_trim, 8},
    {"grow", do_grow, 24},
    {"shrink", do_shrink, 8},
    {"hole", do_hole, 16},
    {"dontunmap", do_dontunmap, 6},
    {"pipe", do_pipe, 100},
    {"protect", do_protect, 60},
    {"fork", do_fork, 4},
    {"direct", do_direct, 40},
    {"guard", do_guard, 60},
};
_Static_assert(COUNT_OF(operations) <= MAX_OPERATIONS, "a count for each operation");

#endif
