/* What the starter and the agent's two threads share: one page of the agent's own region.
 *
 * Owns the layout of the region; knows no policy and no libc.
 */
#ifndef SNAPD_AGENT_H
#define SNAPD_AGENT_H

#include "uapi.h"
#include "wire.h"

#define AGENT_STACK_BYTES (16 * SNAPD_PAGE)
#define AGENT_PATH_BYTES 108

#define AGENT_KEPT 64

struct agent {
	char path[AGENT_PATH_BYTES]; /* the daemon's agent socket */
	unsigned long region, region_bytes;
	unsigned long sentinel; /* one registered page that is never present: a forked child is known by it */
	struct snapd_run bss;   /* the library's own anonymous data */
	int comm_tid, mover_tid;
	int uffd, store, page_map; /* -1: none; in the agent's own fd table */
	int sock;                  /* the connection that the mover should use */
	unsigned int sock_generation, sock_taken; /* futex: a new connection is there */
	unsigned int busy;                        /* the mover is inside a command */
	unsigned int leaving;                     /* futex: 1 when the agent has let go */
	unsigned int closing;                     /* the program wants to leave: no session begins */
	unsigned int fork_wait;                   /* pages are out and a fork must ask first */
	unsigned int tells;                       /* a program under `snapd run`: a line on stderr is in order */
	unsigned int delay_ms;                    /* before a child's first connection: most children end sooner */
	int last_status;
	unsigned int kept_lock; /* futex */
	struct {
		unsigned long number; /* 0: free */
		int uffd, page_map, offered; /* offered: the connecting thread uses them */
	} kept[AGENT_KEPT]; /* forked children: without an agent of their own nobody else has them */
};

void agent_main(void *agent); /* entry of the first thread; never returns */
/* Ends an agent without a session; -EBUSY: it has got one. For the program's threads. */
int agent_end(struct agent *agent);

/* Connects to path; returns a fd or a negative errno. Needs no libc and no memory but the stack. */
int agent_connect(const char *path);
/* Sends or receives one message with up to 3 fds (-1 ends the list). Return 0 or a negative errno (0 bytes: -EPIPE). */
int agent_send(int sock, struct snapd_wire *message, const int *fds, int nfds);
int agent_receive(int sock, struct snapd_wire *message, int fds[3]);

#endif
