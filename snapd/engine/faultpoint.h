/* Fault points: places at which a test has the engine die, stop, wait or be told of an error.
 *
 * Each has a number that stays its own. They exist only where SN_FAULT_POINTS is defined, which no build but that of
 * tests/faults/ does: elsewhere nothing is left of them. What happens at one is for tests/faults/faultpoint.c to know.
 */
#ifndef SN_FAULTPOINT_H
#define SN_FAULTPOINT_H

enum fault_point {
	FP_NONE,
	/* a stop */
	FP_STAGE_MAPPED = 1, /* the staging is mapped, and nobody has noted where */
	FP_STAGED = 2,
	FP_STANDING = 3,
	FP_WATCHED = 4,
	FP_CLAIMED = 5,
	FP_OWN_MOVE_READ = 6, /* the event of a move is read, and where it went is not noted */
	FP_OWN_MOVE_NOTED = 7,
	FP_MOVED = 8,
	FP_LOOKED = 9,
	FP_GUARDED = 10,
	FP_PINNED = 11,
	FP_RETURNED = 12,
	FP_SETTLING = 13, /* before each entry */
	FP_SETTLED = 14,  /* the table says where pages are, the phase does not */
	FP_LETTING_GO = 15,
	FP_CHOSEN = 16,	      /* a piece is made, and nothing stands */
	FP_THREAD_FOUND = 17, /* before each of a stop; short: it is not listed yet */
	FP_REGISTERING = 18,  /* short: a mapping is not watched, and nobody is told */
	FP_LISTING = 19,      /* before a span of a piece, not the first; short: /proc lists the last one again */
	FP_LOOKING = 29, /* errors of a look at an aside */
	/* store and drop */
	FP_PACK_READ = 20,
	FP_FRAMES_WRITE = 21, /* errors, and a short write */
	FP_FRAMES_WRITTEN = 22,
	FP_PUBLISHING = 23, /* before each entry */
	FP_STAGING_LEFT = 24,
	FP_DROPPING = 25,
	FP_SLICE_DROPPED = 26,
	FP_PIECE_ENDING = 27, /* its spans are forgotten, its staging is not */
	/* a fill */
	FP_FRAME_READ = 30, /* errors, and a short read */
	FP_FILLING = 31,    /* errors of a COPY */
	FP_FILLED = 32,	    /* the page is there, its entry does not say so */
	FP_POISONED = 33,
	FP_RESTORED = 34,
	FP_MEMORY_READ = 35, /* errors of what is aside */
	FP_BULK_READ = 36,   /* errors, and a short read */
	FP_REPLAY_DECODED = 37,
	FP_MEM_OPEN = 38,     /* errors: a target's memory is denied */
	FP_PAGEMAP_OPEN = 39, /* errors: and what the kernel says of it */
	/* events */
	FP_EVENT_READ = 40,
	FP_EVENT_APPLIED = 41, /* and not taken out of the ring */
	FP_FORK_READ = 42,
	FP_FORK_SERVED = 43, /* the child has its session, and the event is in the ring */
	FP_HALF_HANDED = 44, /* the next daemon gets a session's userfaultfd, and not its page map */
	FP_CHILD_COPYING = 45,
	FP_UNTOLD = 46, /* a session is served, and Python has not heard of it */
	FP_EVENT_TAKEN = 47, /* short: it is lost */
	/* a takeover */
	FP_ADOPTED = 50,
	FP_CUT_CLAIMED = 51,
	FP_CUT_COMMITTED = 52,
	FP_RING_APPLIED = 53,
	FP_CUT_STANDING = 54,
	FP_CUT_LOOKED = 55,
	FP_CUT_PINNED = 56,
	FP_CUT_RETURNED = 57,
	FP_CUT_POINTED = 58,
	FP_CUT_SETTLING = 59,
	FP_CUT_SETTLED = 60,
	FP_PIECE_ADOPTED = 61,
	FP_RESUMED = 62,
	FP_SERVING = 63,
	FP_CUT_SEEN = 64, /* the program runs: looked, and not settled */
	FP_CUT_MOVED = 65,
	FP_RING_LEFT = 66, /* nothing of the former daemon's ring is applied */
	/* attaching and detaching */
	FP_INJECTING = 68, /* a thread is about to make a call of ours, and nothing but we puts it back */
	FP_SESSION_BEGINNING = 69, /* the target has a userfaultfd, and the keeper does not know it */
	/* the store's room, and a snapshot */
	FP_RESERVE = 70, /* errors */
	FP_COMPACT_WRITTEN = 71,
	FP_COMPACT_PUBLISHING = 72,
	FP_PUNCH = 73, /* errors */
	FP_PUNCHED = 74,
	FP_COPY_WRITE = 75, /* errors */
	FP_WRITE_BACK = 76, /* errors: the disk takes what the page cache has */
	FP_SNAPSHOT_WRITE = 80, /* these are of Python: of its footer and header */
	FP_SNAPSHOT_SYNC = 81,	/* of the file, then of its directory */
	FP_SNAPSHOT_NAMING = 82,
	FP_SNAPSHOT_NAMED = 83,
	FP_COUNT = 100
};

#define FAULT_SHORT 1 /* beside 0 and negative errnos: a part is written or read, and no more */

#ifdef SN_FAULT_POINTS
int fault_point(enum fault_point point);
#define FAULT_ERROR(point) fault_point(point)
#define FAULT_POINT(point) ((void)fault_point(point))
#else
#define FAULT_ERROR(point) 0
#define FAULT_POINT(point) ((void)0)
#endif

#endif
