/* An area of churn.c: a mapping of one thread, its logical pages, and their rows of the shadow table. A logical page
 * keeps its row wherever the area moves. Each function changes the mapping and the table in one go, or neither.
 * It knows nothing of which operation is due. */
#ifndef TARGETS_AREAS_H
#define TARGETS_AREAS_H

#include "lines.h"

struct area {
    char *at;            /* address of logical page lo */
    uint32_t lo, hi;     /* logical pages lo <= p < hi are mapped */
    uint32_t capacity;   /* hi never passes it: the shadow table has that many rows */
    uint32_t ro_lo, ro_hi;
    /* Made by one mmap and never split since, so that it is one VMA under any neighbourhood. A VMA that another party
     * registered with a userfaultfd in parts may refuse mremap with EFAULT; a whole one may not. */
    bool whole;
    bool stuck; /* an mremap was refused: leave this mapping in place until it is made anew */
    bool huge;
    uint64_t tag;
    struct shadow *shadow;
};

static inline uint32_t area_npages(const struct area *area)
{
    return area->hi - area->lo;
}

static inline char *area_page(const struct area *area, uint32_t page)
{
    return area->at + (size_t)(page - area->lo) * PAGE;
}

static inline struct view area_view(const struct area *area, uint32_t page)
{
    return (struct view){
        .at = area_page(area, page),
        .tag = area->tag + (uint64_t)page * PAGE_LINES,
        .read_only = page >= area->ro_lo && page < area->ro_hi,
        .shadow = &area->shadow[page],
    };
}

static inline void area_check(const struct area *area, uint32_t page)
{
    struct view view = area_view(area, page);
    check_page(&view);
}

/* The pages are fresh now: zeros, and neither lazy nor guards. */
static inline void area_forget(struct area *area, uint32_t page, uint32_t npages)
{
    memset(&area->shadow[page], 0, npages * sizeof *area->shadow);
}

static inline void area_set_huge(const struct area *area, uint32_t page, uint32_t npages)
{
    if (area->huge && madvise(area_page(area, page), npages * PAGE, MADV_HUGEPAGE) == -1)
        fail_errno("MADV_HUGEPAGE");
}

/* Leaves a gap behind the area, so that growing in place often succeeds. */
static inline void area_map(struct area *area, uint32_t npages)
{
    area->at = heap_alloc(area->capacity * PAGE);
    if (npages < area->capacity && munmap(area->at + npages * PAGE, (area->capacity - npages) * PAGE) == -1)
        fail_errno("munmap");
    area->lo = area->ro_lo = area->ro_hi = 0;
    area->hi = npages;
    area->whole = true;
    area->stuck = false;
    area_forget(area, 0, area->capacity);
    area_set_huge(area, 0, npages);
}

static inline void area_unmap(struct area *area)
{
    if (munmap(area->at, area_npages(area) * PAGE) == -1)
        fail_errno("munmap");
    area->at = NULL;
}

static inline void area_protect(struct area *area, uint32_t page, uint32_t npages)
{
    if (mprotect(area_page(area, page), npages * PAGE, PROT_READ) == -1)
        fail_errno("mprotect to read-only");
    area->ro_lo = page;
    area->ro_hi = page + npages;
    area->whole = false;
}

static inline void area_unprotect(struct area *area)
{
    if (area->ro_lo == area->ro_hi)
        return;
    if (mprotect(area_page(area, area->ro_lo), (area->ro_hi - area->ro_lo) * PAGE, PROT_READ | PROT_WRITE) == -1)
        fail_errno("mprotect to read-write");
    area->ro_lo = area->ro_hi = 0;
}

/* Fresh memory over a part of the area, in one step. */
static inline void area_map_over(struct area *area, uint32_t page, uint32_t npages)
{
    area_unprotect(area);
    void *at = mmap(area_page(area, page), npages * PAGE, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    if (at == MAP_FAILED)
        fail_errno("mmap MAP_FIXED");
    area->whole = area->whole && npages == area_npages(area);
    area_forget(area, page, npages);
    area_set_huge(area, page, npages);
}

static inline void area_trim_front(struct area *area, uint32_t npages)
{
    area_unprotect(area);
    if (munmap(area->at, npages * PAGE) == -1)
        fail_errno("munmap");
    area_forget(area, area->lo, npages);
    area->at += npages * PAGE;
    area->lo += npages;
}

static inline void area_trim_back(struct area *area, uint32_t npages)
{
    area_unprotect(area);
    if (munmap(area_page(area, area->hi - npages), npages * PAGE) == -1)
        fail_errno("munmap");
    area->hi -= npages;
    area_forget(area, area->hi, npages);
}

/* mremap to npages, with the flags and (for MREMAP_FIXED) the place given. False when the kernel refused: then nothing
 * has changed. */
static inline bool area_remap(struct area *area, uint32_t npages, int flags, void *place)
{
    area_unprotect(area);
    uint32_t old = area_npages(area);
    void *at = mremap(area->at, old * PAGE, npages * PAGE, flags, place);
    if (at == MAP_FAILED) {
        if (errno != ENOMEM && errno != EFAULT)
            fail_errno("mremap");
        return false;
    }
    area->at = at;
    if (npages < old)
        area_forget(area, area->lo + npages, old - npages);
    area->hi = area->lo + npages;
    return true;
}

#endif
