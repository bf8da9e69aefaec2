/* What a borrowed thread and the engine share, and how the one is told what to call: for borrow.c, orders.c, inject.c.
 */
#ifndef SN_BORROW_H
#define SN_BORROW_H

#include "stop.h"

#define MAX_CALLS 64
#define MAX_PAIRS (SNAPD_WIRE_RUNS / 2)

enum rule { /* several of them together */
	GO_ON = 0,
	CHAIN = 1,	 /* the result is the next call's first argument; after an error that one is left out */
	UNTIL_ERROR = 2, /* an error ends the batch */
	BUSY_IS_NONE = 4, /* but not EBUSY */
	AFTER_BUSY = 8,	  /* called only if the call before said EBUSY */
	AFTER_BUSY_2 = 16 /* or the one before that */
};

struct call {
	uint64_t number, args[6];
	int64_t result;
	uint64_t rule;
};

/* Two pages that the target can write to as well: nothing in them is believed but that it is the target's word.
 * ARCH_STUB has its offsets. */
struct control {
	_Atomic uint32_t word; /* the tracer's thread, and CHANGED, which each batch turns over */
	_Atomic uint32_t done; /* the word of the batch that was done last */
	uint32_t ncalls, nran;
	uint64_t mask;		/* of the program's thread, and below its registers: what it is without us */
	uint64_t nundo;
	arch_regs regs;
	uint64_t unused;
	struct call calls[MAX_CALLS];
	struct call undo[2]; /* what else it calls before it is the program's again, when nobody is there to do it */
	struct snapd_uffd_move moves[MAX_PAIRS];
	struct snapd_sched_attr sched; /* for undo */
};

#define CODE_BYTES PAGE
#define CONTROL_BYTES (2 * PAGE)
_Static_assert(sizeof(struct control) <= CONTROL_BYTES, "the control block fits its pages");
_Static_assert(offsetof(struct control, mask) == 16 && offsetof(struct control, regs) == 32 &&
	       offsetof(struct control, nundo) == 24 && offsetof(struct control, calls) == 256 &&
	       offsetof(struct control, undo) == 4864 && sizeof(struct call) == 72, "as the stub has it");

/* What the target has of ours. */
struct loan {
	struct control *control; /* here */
	uint64_t code;		 /* there; the control block is one page behind it */
	int uffd;		 /* the number of the userfaultfd there */
	struct haste *haste;	 /* for a successor */
	/* while a thread is lent: */
	bool stands; /* it does not run the code now */
	uint64_t mask;
	void *robust_head;
	size_t robust_bytes;
	int ncalls;
};

extern const char sn_stub_begin[], sn_stub_end[];

/* borrow.c, for the tracer */
int borrow_begin(struct stop *stop, struct loan *loan); /* 0 when a thread is lent */
int borrow_ready(struct stop *stop, struct thread *thread); /* no filter asks, and no other obstacle */
void borrow_call(struct loan *loan, unsigned int rules, long number, const uint64_t args[6]);
int borrow_run(struct stop *stop); /* the batch of borrow_call; -EPIPE: the thread has ended, -EFAULT: it can't */

#endif
