/* The messages between a daemon and an agent: one fixed size, SOCK_SEQPACKET. The table is docs/protocol.md.
 *
 * Owns layout and numbers; both sides include it. A message of another size, magic or version is refused.
 */
#ifndef SNAPD_WIRE_H
#define SNAPD_WIRE_H

#include <linux/types.h>

#define SNAPD_WIRE_MAGIC 0x41504e53u /* "SNPA" */
#define SNAPD_WIRE_VERSION 1
#define SNAPD_WIRE_RUNS 60

enum snapd_wire_kind {
	SNAPD_HELLO = 1,      /* agent: who I am; with fds when a session survives its daemon */
	SNAPD_MAKE = 2,       /* daemon: make a userfaultfd from the device that comes along */
	SNAPD_HOLD = 3,       /* daemon: keep these fds (store, page map) */
	SNAPD_STAGE = 4,      /* map an empty private anonymous area near dest */
	/* pairs of runs: mremap(DONTUNMAP) the first to the hint in the second; asides are DONTFORK */
	SNAPD_MOVE = 5,
	SNAPD_GUARD = 6,      /* install guards on the runs */
	/* pairs of runs: UFFDIO_MOVE the first (aside) to the second (staging); pinned runs come back */
	SNAPD_PIN = 7,
	SNAPD_BACK = 8,       /* return addr to dest: DOFORK, then mremap(FIXED) */
	SNAPD_UNMAP = 9,      /* munmap the runs */
	SNAPD_ADVISE = 10,    /* madvise(value) on the runs */
	SNAPD_PING = 11,      /* no work: the reply's value is the status of the last command */
	SNAPD_LEAVE = 12,     /* give up the session: close what is held, end the agent's threads */
	SNAPD_FORK_WAIT = 13, /* program: about to fork, all pages must be in first */
	SNAPD_LEAVE_WAIT = 14, /* program: wants to end its cooperation */
	SNAPD_FLAGS = 15,     /* daemon: value becomes the agent's flags (SNAPD_FLAG_*) */
	/* daemon: keep what comes along, a forked child's userfaultfd and page map, until LET; no reply to either */
	SNAPD_KEEP = 16,
	SNAPD_LET = 17, /* value: the child's number, as in KEEP */
};

#define SNAPD_HELLO_BUSY 1u      /* the mover is inside a command of the former daemon */
#define SNAPD_HELLO_SESSION 2u   /* fds of a live session come along: userfaultfd, store, page map */
#define SNAPD_HELLO_FORKED 4u    /* started by the fork handler: this memory may have a session already */
#define SNAPD_HELLO_KEPT 8u      /* not the agent's own session but one of a child, which nobody else may have */
#define SNAPD_REPLY_MORE 1u      /* runs did not fit: repeat the command, what is done stays done */
#define SNAPD_FLAG_FORK_WAIT 1u  /* fork handler must ask before it forks */

struct snapd_run {
	__u64 start, length;
};

/* In the reply to MOVE the second of each pair is {new address, 0} or {0, errno}. In the reply to PIN that could
 * not go on (REPLY_MORE, or an error) dest is the pair and value the address where it stopped.
 *
 * status: 0 or a negative errno. In a reply addr, length and dest are the command's, value is the result. */
struct snapd_wire {
	__u32 magic;
	__u16 version, kind;
	__u32 seq;
	__s32 status;
	__u64 addr, length, dest, value;
	__u32 nruns, flags;
	__u64 reserved;
	struct snapd_run runs[SNAPD_WIRE_RUNS];
};
_Static_assert(sizeof(struct snapd_wire) == 1024, "the wire format is fixed");

#endif
