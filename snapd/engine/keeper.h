/* The registry: which descriptors the next daemon needs, in memory that the daemon, its keeper and the next daemon
 * share.
 *
 * Owns the layout. The daemon writes, the keeper reads when the daemon is dead: a slot's letter is stored last and
 * cleared first, so that a slot is whole at every instant.
 */
#ifndef SN_KEEPER_H
#define SN_KEEPER_H

#include <stdatomic.h>
#include <stdint.h>

#define KEEPER_SLOTS 32768
#define KEEPER_NAMES_BYTES (120UL << 10) /* a string of the environment has 128 KiB at most */
#define KEEPER_STACK_BYTES (16UL << 10)

/* A slot's descriptor is called LETTER.NUMBER in LISTEN_FDNAMES, the number in hex. */
enum keeper_letter {
	KEEP_USERFAULTFD = 'u',
	KEEP_PAGE_MAP = 'm', /* with a userfaultfd of the same number it is a session */
	KEEP_STORE = 's',
	KEEP_FORK = 'f',     /* the child's userfaultfd of a FORK in a ring; the number is the one that the event has */
	KEEP_REGISTRY = 'r',
	KEEP_WATCHED = 'k', /* a pidfd of whom the keeper watches */
	KEEP_OTHER = 'o',   /* the lock and the listening sockets */
};

enum keeper_ending { ENDING_NONE, ENDING_STOP, ENDING_UPGRADE };

struct keeper_slot {
	_Atomic uint32_t letter; /* 0: free */
	_Atomic int32_t fd;
	uint32_t number;
	uint32_t scanned; /* of a page map: its ring was looked through for forks */
};

struct registry {
	char magic[8];
	/* Whose turn it is: the keeper's pid, or the negative pid of the one that has taken its turn. */
	_Atomic int32_t keeper;
	_Atomic uint32_t ending;
	_Atomic uint64_t serving_ns; /* when the daemon took up its service (CLOCK_MONOTONIC); 0: not yet */
	_Atomic uint64_t died_ns;    /* when the keeper saw its end */
	_Atomic uint32_t young_deaths; /* daemons in a row that did not live long */
	_Atomic uint32_t takeovers;
	_Atomic uint32_t numbers; /* the last number that was given to a session or a store */
	_Atomic uint32_t nslots;  /* slots behind were never used */
	uint32_t reserved[2];
	struct keeper_slot slots[KEEPER_SLOTS];
};

/* What the keeper needs, in a mapping that is all that it keeps of the daemon's memory. */
struct keeper {
	struct registry *registry;
	int32_t former; /* the value of registry->keeper that it replaces */
	const char *path;
	char **argv, **envp;
	int nenv; /* three more fit behind */
	char pid_text[32], fds_text[32], names[KEEPER_NAMES_BYTES];
	struct {
		unsigned long start, end;
	} stays[4]; /* in order of address: what is not unmapped */
};

void keeper_main(void *keeper); /* keeper.c: never returns */

#endif
