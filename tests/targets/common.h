/* What the C targets share beside the bench's programs: how they wait for their end.
 * Header only and plain libc. It knows nothing of snapd: each target must pass when it runs alone. */
#ifndef TARGETS_COMMON_H
#define TARGETS_COMMON_H

#include "../../snapd/bench/common.h"

/* All threads made later inherit the mask, so that only the waiter in main sees these two. */
static inline sigset_t block_end_signals(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    return set;
}

/* Returns at the deadline, or earlier when SIGTERM or SIGINT asks for an early, orderly end. */
static inline void wait_for_end(const sigset_t *end_signals, uint64_t deadline_ns)
{
    for (uint64_t now = now_ns(); now < deadline_ns; now = now_ns()) {
        uint64_t left = deadline_ns - now;
        struct timespec ts = {.tv_sec = (time_t)(left / NS_PER_S), .tv_nsec = (long)(left % NS_PER_S)};
        if (sigtimedwait(end_signals, NULL, &ts) > 0)
            return;
    }
}

#endif
