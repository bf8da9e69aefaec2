/* Forked children of churn.c: a sample of one thread's pages is written down in shared memory right before the fork,
 * and the child checks that its memory stands still at that moment while its parent goes on.
 * It knows nothing of weights or the operations of the parent. */
#ifndef TARGETS_CHILDREN_H
#define TARGETS_CHILDREN_H

#include "areas.h"
#include <sys/prctl.h>
#include <sys/wait.h>

#define SAMPLE_PAGES 48
#define CHILD_SLOTS 2

struct sample {
    struct view view; /* its shadow pointer leads to the copy beside it */
    struct shadow shadow;
};

/* In shared memory; the parent leaves it alone from the fork until the child was reaped. */
struct child {
    pid_t pid; /* 0: free */
    uint32_t npages;
    uint64_t random;
    struct sample sample[SAMPLE_PAGES];
};

static inline void child_sample(struct child *child, const struct area *areas, size_t nareas, struct rng *rng)
{
    child->npages = 0;
    child->random = rng_next(rng);
    for (int tries = 0; tries < 2 * SAMPLE_PAGES && child->npages < SAMPLE_PAGES; tries++) {
        const struct area *area = &areas[rng_below(rng, nareas)];
        uint32_t page = area->lo + (uint32_t)rng_below(rng, area_npages(area));
        struct view view = area_view(area, page);
        bool seen = false;
        for (uint32_t i = 0; i < child->npages; i++)
            seen = seen || child->sample[i].view.at == view.at;
        if (seen)
            continue;
        struct sample *sample = &child->sample[child->npages++];
        sample->shadow = *view.shadow;
        view.shadow = &sample->shadow;
        sample->view = view;
    }
}

static inline void child_check(const struct child *child, const char *operation)
{
    here.operation = operation;
    for (uint32_t i = 0; i < child->npages; i++)
        check_page(&child->sample[i].view);
}

static inline void check_status(pid_t pid, int status, int expected)
{
    if (WIFEXITED(status) && WEXITSTATUS(status) == expected)
        return;
    fail("FAILED %s thread %u: child %d ended with %s %d", here.who, here.thread, (int)pid,
         WIFSIGNALED(status) ? "signal" : "status", WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
}

static inline void wait_for_exit(pid_t pid)
{
    int status;
    while (waitpid(pid, &status, 0) == -1)
        if (errno != EINTR)
            fail_errno("waitpid");
    check_status(pid, status, 0);
}

__attribute__((noreturn)) static inline void child_run(struct child *child, pid_t parent)
{
    here.who = "child";
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent)
        _exit(0);
    struct rng rng = {child->random};
    child_check(child, "fork");
    if (rng_below(&rng, 8) == 0) {
        pid_t self = getpid();
        pid_t grandchild = fork();
        if (grandchild == -1)
            fail_errno("fork of a grandchild");
        if (grandchild == 0) {
            here.who = "grandchild";
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            if (getppid() == self)
                child_check(child, "fork of a fork");
            _exit(0);
        }
        wait_for_exit(grandchild);
    }
    for (uint32_t i = 0; i < child->npages; i++) {
        const struct view *view = &child->sample[i].view;
        if (view->read_only || view->shadow->kind == GUARD_KIND)
            continue;
        if (rng_below(&rng, 4)) {
            write_page(view, UINT32_MAX);
        } else {
            if (madvise(view->at, PAGE, MADV_DONTNEED) == -1)
                fail_errno("MADV_DONTNEED in a child");
            memset(view->shadow, 0, sizeof *view->shadow);
        }
    }
    child_check(child, "writing in a child");
    _exit(0);
}

/* Reaps one that has ended, or waits for it when the caller has to have the slot. */
static inline void child_reap(struct child *child, bool wait)
{
    if (!child->pid)
        return;
    int status;
    pid_t pid = waitpid(child->pid, &status, wait ? 0 : WNOHANG);
    if (pid == 0 || (pid == -1 && errno == EINTR))
        return;
    if (pid == -1)
        fail_errno("waitpid");
    check_status(pid, status, 0);
    child->pid = 0;
}

#endif
