/* Pages of verified 64-byte lines: what each line must hold, and the check of a page against it (for churn.c).
 * A line holds the seed, a tag derived from its logical place and the counter of its last write; the counters stand in
 * a shadow table in shared memory. It knows one page at a time, and nothing of areas, threads or system calls. */
#ifndef TARGETS_LINES_H
#define TARGETS_LINES_H

#include "common.h"
#include <setjmp.h>

#define LINE_WORDS 8
#define PAGE_LINES (PAGE / (LINE_WORDS * sizeof(uint64_t)))

/* What a page holds: lines after the shadow table, a guard marker, or FILE_KIND + n: block n of the O_DIRECT file. */
enum { LINES_KIND = 0, GUARD_KIND = 1, FILE_KIND = 2 };

/* What is known of a page's content: one row of the shadow table. */
struct shadow {
    uint32_t kind;
    bool lazy;                    /* MADV_FREE was called since the last write: old bytes or a page of zeros */
    uint32_t counter[PAGE_LINES]; /* 0 means that the line was not written since the page was fresh: zeros */
};

struct view {
    char *at;
    uint64_t tag; /* of the page's first line */
    bool read_only;
    struct shadow *shadow;
};

/* Names the operation and the owner in a report; one a thread. */
struct whereabouts {
    const char *who;
    unsigned thread;
    const char *operation;
    uint64_t serial;
};

static __thread struct whereabouts here;
static __thread sigjmp_buf fault_return;
static __thread volatile sig_atomic_t fault_expected;
static uint64_t line_seed;

static inline void fresh_line(uint64_t *ret, uint64_t tag, uint32_t counter)
{
    uint64_t check = mix64(tag ^ ((uint64_t)counter << 20) ^ line_seed);
    ret[0] = line_seed;
    ret[1] = tag;
    ret[2] = counter;
    ret[3] = check;
    ret[4] = 0;
    ret[5] = (uint64_t)counter + 1;
    ret[6] = tag & 0xffff;
    ret[7] = check;
}

static inline void file_line(uint64_t *ret, uint32_t block, size_t line)
{
    for (size_t w = 0; w < LINE_WORDS; w++)
        ret[w] = mix64(0xf11eull << 48 | (uint64_t)block << 24 | line << 4 | w);
}

static inline void expected_line(uint64_t *ret, const struct view *view, size_t line)
{
    if (view->shadow->kind >= FILE_KIND)
        file_line(ret, view->shadow->kind - FILE_KIND, line);
    else if (view->shadow->counter[line] == 0)
        memset(ret, 0, LINE_WORDS * sizeof *ret);
    else
        fresh_line(ret, view->tag + line, view->shadow->counter[line]);
}

static inline uint64_t *line_at(const struct view *view, size_t line)
{
    return (uint64_t *)(view->at + line * LINE_WORDS * sizeof(uint64_t));
}

static inline bool all_zero(const void *bytes, size_t length)
{
    const char *c = bytes;
    return c[0] == 0 && memcmp(c, c + 1, length - 1) == 0;
}

__attribute__((noreturn)) static inline void mismatch(const struct view *view, size_t line, const uint64_t *expected)
{
    const uint64_t *found = line_at(view, line);
    size_t word = 0;
    while (word < LINE_WORDS - 1 && found[word] == expected[word])
        word++;
    const char *looks = all_zero(found, 64)                                  ? "zeros"
                        : found[0] == line_seed && found[1] == view->tag + line ? "an older or newer state of this line"
                        : found[0] == line_seed                              ? "another line"
                                                                             : "foreign bytes";
    fail("MISMATCH %s thread %u after %s (operation %lu)%s: address %p tag %lx line %zu word %zu: expected %016lx "
         "(counter %u) found %016lx (counter %lu), which looks like %s",
         here.who, here.thread, here.operation, here.serial, view->shadow->lazy ? " lazy" : "", (void *)(found + word),
         view->tag, line, word, expected[word], view->shadow->counter[line], found[word], found[2], looks);
}

static inline void check_line(const struct view *view, size_t line)
{
    uint64_t expected[LINE_WORDS];
    expected_line(expected, view, line);
    const uint64_t *found = line_at(view, line);
    if (memcmp(found, expected, sizeof expected) == 0 || (view->shadow->lazy && all_zero(found, sizeof expected)))
        return;
    mismatch(view, line, expected);
}

/* Runs the access and tells whether it raised SIGSEGV. */
static inline bool faults(char *at, bool write)
{
    volatile char *byte = at;
    if (sigsetjmp(fault_return, 1)) {
        fault_expected = 0;
        return true;
    }
    fault_expected = 1;
    char value = *byte;
    if (write)
        *byte = value;
    fault_expected = 0;
    return false;
}

static inline void on_fault(int signal, siginfo_t *info, void *context)
{
    (void)context;
    if (signal == SIGSEGV && fault_expected)
        siglongjmp(fault_return, 1);
    fail("FAILED %s thread %u in %s (operation %lu): unexpected %s, code %d, address %p", here.who, here.thread,
         here.operation, here.serial, signal == SIGBUS ? "SIGBUS" : "SIGSEGV", info->si_code, info->si_addr);
}

static inline void catch_faults(void)
{
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
}

/* A write ends the laziness of a page: from here on it is either as old as a whole or zero as a whole. */
static inline void settle(const struct view *view)
{
    volatile uint64_t *word = (volatile uint64_t *)view->at;
    *word = *word;
    if (all_zero(view->at, PAGE)) {
        view->shadow->kind = LINES_KIND;
        memset(view->shadow->counter, 0, sizeof view->shadow->counter);
    }
    view->shadow->lazy = false;
}

/* Checks all lines; a lazy page that may be written is settled first, and so checked as a whole. */
static inline void check_page(const struct view *view)
{
    if (view->shadow->kind == GUARD_KIND) {
        if (!faults(view->at, false))
            fail("FAILED %s thread %u in %s (operation %lu): the guard at %p was readable", here.who, here.thread,
                 here.operation, here.serial, (void *)view->at);
        return;
    }
    if (view->shadow->lazy && !view->read_only)
        settle(view);
    for (size_t line = 0; line < PAGE_LINES; line++)
        check_line(view, line);
}

static inline void write_line(const struct view *view, size_t line, uint32_t counter)
{
    fresh_line(line_at(view, line), view->tag + line, counter);
    view->shadow->counter[line] = counter;
}

/* The page must be writable and no guard; what it held before is given up. */
static inline void write_page(const struct view *view, uint32_t counter)
{
    view->shadow->kind = LINES_KIND;
    view->shadow->lazy = false;
    for (size_t line = 0; line < PAGE_LINES; line++)
        write_line(view, line, counter);
}

#endif
