/* What the engine's files share: the session, the store, the page map's layout, and the calls between files.
 *
 * Lock order: session->mover (one command at a time), then session->lock. The reader holds session->lock exclusively
 * from before read() of the userfaultfd until its events are applied; a fill holds it shared from its last look at an
 * entry until UFFDIO_COPY returns. Nobody waits for the agent with session->lock held: an agent's mremap returns only
 * after the reader has read its event.
 */
#ifndef SN_INTERNAL_H
#define SN_INTERNAL_H

#include "engine.h"
#include "faultpoint.h"

#include "../agent/uapi.h"
#include "../agent/wire.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/types.h>

#define PAGE SNAPD_PAGE
#define PAGE_DOWN(x) ((x) & ~(PAGE - 1))
#define HUGE_BYTES (2UL << 20)
#define min_u64(a, b) ((a) < (b) ? (a) : (b))
#define max_u64(a, b) ((a) > (b) ? (a) : (b))

/* ---- page map: layout of the memfd ---- */

enum state { ST_NONE, ST_ASIDE, ST_STORED, ST_FILLED, ST_ZERO, ST_GUARD, ST_BAD, ST_COUNT };

#define ENTRY_STATE(e) ((enum state)((e) & 15))
#define ENTRY_MOVING (1ULL << 4)
#define ENTRY_BYTES(e) ((((e) >> 8) & 0x3ff) * 8)
#define ENTRY_OFFSET(e) ((((e) >> 18) & ((1ULL << 44) - 1)) * 8)
#define ENTRY_FRAME_MASK (((1ULL << 54) - 1) << 8)
#define ENTRY_MAKE(state, offset, bytes) ((uint64_t)(state) | ((uint64_t)(bytes) / 8) << 8 | ((offset) / 8) << 18)
#define ENTRY_WITH(e, state) (((e) & ENTRY_FRAME_MASK) | (uint64_t)(state))

static inline bool entry_has_frame(uint64_t e)
{
	return ENTRY_STATE(e) == ST_STORED || ENTRY_STATE(e) == ST_FILLED;
}

/* npages of the target from start are entries from first; aside: where moved pages are now, or 0. What is watched
 * and was never moved has a record without entries: an event that ends it must not be taken for another's. */
struct record {
	uint64_t start, npages, first, aside;
};
#define NO_ENTRIES (~0ULL)
struct interval {
	uint64_t start, end;
};

#define MAX_DEBTS 512
#define MAX_RECORDS 65536
#define RING_SLOTS 512 /* of each of the two rings */
#define MAX_ENTRIES (1ULL << 31)
#define PM_REUSE_FROM (MAX_ENTRIES / 2)

struct table {
	uint64_t nrecords, ndebts;
	struct interval debts[MAX_DEBTS]; /* of each an UNMAP is to come that belongs to a REMAP that was read */
	struct interval dropping; /* what the mover unmaps now: it has no records, so its UNMAP means nothing */
	struct record records[MAX_RECORDS];
};

#define MAX_INFLIGHT 4
#define MAX_SPANS 20
#define SLOT_BYTES (1UL << 30) /* more than the pages of a piece, or its staging, ever are */

enum phase { PHASE_IDLE, PHASE_MOVE, PHASE_PIN, PHASE_STORE, PHASE_DROP, PHASE_CUT /* a successor has claimed it */ };
struct intent { /* a span of a piece on its way, for a successor */
	uint64_t phase, start, npages, aside, staging;
};

#define FLAG_FORK_EVENTS 1 /* of a page map; the others are the daemon's own, and not a forked child's */

/* As the kernel has it in its first version. */
struct snapd_sched_attr {
	uint32_t size, policy;
	uint64_t flags;
	int32_t nice;
	uint32_t priority;
	uint64_t runtime, deadline, period;
};
#define SNAPD_SCHED_RESET_ON_FORK 1

struct haste { /* a lent thread that goes before others, and how it was scheduled */
	_Atomic int32_t tid;
	uint32_t reserved;
	uint64_t slack_ns;
	struct snapd_sched_attr was;
};

struct page_map_header {
	char magic[8];
	uint32_t version, page_size;
	uint8_t store_id[16];
	uint32_t key_id, dictionary_id;
	int32_t pid, uid;
	uint32_t number, store_number; /* of the session and of its store, in the registry */
	uint32_t parent, source;       /* numbers: who forked it; in whose staging pages of it are, or 0 */
	uint32_t flags, reserved;
	uint64_t born, sentinel, nentries; /* born: when the process started, so that its pid is no other's */
	_Atomic uint64_t generation; /* says which table and which ring are current: both change by one store */
	struct intent intents[MAX_INFLIGHT * MAX_SPANS];
	struct snapd_run stagings[MAX_INFLIGHT];
	struct snapd_run attached; /* what was mapped in a target without an agent */
	int32_t attached_uffd;	   /* and the number of its userfaultfd there */
	uint32_t reserved2;
	struct haste haste;
};

#define PM_RING_OFFSET 4096UL
#define PM_TABLE_OFFSET (64UL << 10)
#define PM_TABLE_BYTES (4UL << 20)
#define PM_SET_OFFSET (PM_TABLE_OFFSET + 2 * PM_TABLE_BYTES)
#define PM_ENTRIES_OFFSET (16UL << 20)
#define PM_BYTES (PM_ENTRIES_OFFSET + MAX_ENTRIES * 8)
_Static_assert(sizeof(struct table) <= PM_TABLE_BYTES, "a table fits its place");

#define MAX_SET_RUNS (1UL << 18)
struct working_set { /* what was wanted after the last resume; no page of the target depends on it */
	uint64_t nruns, npages;
	uint32_t held_back; /* so many of 65536 pages are left out of the next replay */
	uint32_t replays;
	uint64_t runs[MAX_SET_RUNS]; /* by address: the number of the first page << 16 | pages less one */
};
_Static_assert(PM_SET_OFFSET + sizeof(struct working_set) <= PM_ENTRIES_OFFSET, "the set fits its place");

struct page_map {
	int fd;
	char *base;
	struct page_map_header *header;
	_Atomic uint64_t *entries;
	uint64_t alloc_next, alloc_limit;
};

/* pagemap.c */
int pm_open(struct page_map *pm, int fd);
void pm_close(struct page_map *pm);
bool pm_is_ours(const struct page_map_header *header);
struct table *pm_table(struct page_map *pm);
struct snapd_uffd_msg *pm_ring(struct page_map *pm);
struct snapd_uffd_msg *pm_other_ring(struct page_map *pm);
struct table *pm_edit(struct page_map *pm); /* a copy of the table to change; pm_commit makes it the current one */
void pm_commit(struct page_map *pm);
long pm_find(const struct table *table, uint64_t address); /* index of the record that holds it, or -1 */
long pm_first_at(const struct table *table, uint64_t address); /* first record that ends behind it */
/* Takes [start, end) out of the table; what was there goes to out (up to capacity). Returns how many. */
long pm_cut(struct table *table, uint64_t start, uint64_t end, struct record *out, long capacity);
void pm_set_dropping(struct page_map *pm, struct interval dropping);
int pm_insert(struct table *table, struct record record);
uint64_t pm_address_of(const struct table *table, uint64_t index); /* 0: no longer mapped */
void pm_join(struct table *table); /* makes one of records that follow each other */
void pm_trim(struct page_map *pm, struct record *used, uint64_t n);
int pm_blank(struct table *table, uint64_t start, uint64_t end); /* gives what has no record one without entries */
void pm_add_debt(struct table *table, uint64_t start, uint64_t end);
bool pm_settle(struct table *table, uint64_t start, uint64_t end); /* pays a debt of exactly this, if there is one */
int pm_alloc(struct page_map *pm, uint64_t npages, uint64_t *ret_first);

/* registry.c: what the next daemon needs */
uint32_t keeper_number(void);
void keeper_ring_is_read(uint32_t number);
int keeper_fork(uint32_t ufd);
void keeper_fork_is_applied(int fd);

/* ---- store ---- */

#define SEGMENT_SHIFT 20
#define SEGMENT_BYTES (1UL << SEGMENT_SHIFT)
#define MAX_SEGMENTS (1UL << 20)
#define HEADER_BYTES 4096UL

struct sn_store {
	int fd;
	uint32_t number;
	unsigned char id[16];
	uint32_t id_crc;
	atomic_int references;
	pthread_mutex_t lock;	     /* tail, end */
	_Atomic uint64_t tail, end;  /* where the next frame goes; behind all segments that were ever begun */
	uint64_t limit;		     /* segments; when all were begun, those that were given back are used again */
	_Atomic uint64_t reused;     /* counts segments used again: what was read before may be another page */
	_Atomic uint64_t *live;	     /* bytes of frames that are referred to by segment, once for each reference */
	_Atomic uint32_t *written;   /* bytes that were written to each segment and not given back */
	_Atomic uint64_t trimmed_bytes, floor;
	_Atomic uint64_t begun, forgotten; /* segments that the disk was given, and that the page cache forgot */
	atomic_bool keep_cached, distrusted; /* distrusted: the disk has refused something, at any place */
	pthread_mutex_t forgetting;
};

/* store.c */
void store_name(struct sn_store *store, const unsigned char *id);
int store_reserve(struct sn_store *store, uint64_t bytes, bool keep_floor, uint64_t *ret_offset);
int store_write(struct sn_store *store, const void *frames, uint64_t bytes, uint64_t offset);
void store_hold(struct sn_store *store, uint64_t offset, uint64_t bytes);
void store_unhold(struct sn_store *store, uint64_t offset, uint64_t bytes);
static inline void store_hold_entry(struct sn_store *store, uint64_t e)
{
	if (entry_has_frame(e))
		store_hold(store, ENTRY_OFFSET(e), ENTRY_BYTES(e));
}
static inline void store_unhold_entry(struct sn_store *store, uint64_t e)
{
	if (entry_has_frame(e))
		store_unhold(store, ENTRY_OFFSET(e), ENTRY_BYTES(e));
}

/* behind.c: frames were appended. -EIO: the disk did not take earlier ones */
int behind_wrote(struct sn_store *store);

/* ---- frames ---- */

#define FRAME_HEADER 8
#define FRAME_MAX (FRAME_HEADER + PAGE)
/* The numbers are those of notices. NO_MEMORY and NOT_READ say nothing of the frame, it may be had later; GONE: the
 * target's memory. */
enum frame_error {
	FRAME_OK,
	FRAME_WOULD_BLOCK,
	FRAME_BAD_CHECK,
	FRAME_BAD_DECODE,
	FRAME_BAD_READ,
	FRAME_BAD_ENTRY,
	FRAME_NO_MEMORY,
	FRAME_NOT_READ,
	FRAME_LOST_ASIDE,
	FRAME_GONE
};

struct frame_packer; /* a compression context */
struct frame_opener; /* a decompression context */
/* frame.c */
void frame_use_codec(const struct sn_codec *codec);
uint32_t frame_crc(uint32_t crc, const void *data, size_t bytes);
struct frame_packer *frame_packer_create(void);
void frame_packer_destroy(struct frame_packer *packer);
/* Writes the frame of a page without its check; returns its padded bytes. room is at least FRAME_MAX. */
uint32_t frame_pack(struct frame_packer *packer, int level, const void *page, unsigned char *room);
void frame_seal(const struct sn_store *store, uint64_t offset, unsigned char *frame);
/* Whether the check of a frame is right for its place; the payload is not decoded. */
bool frame_is_whole(const struct sn_store *store, uint64_t offset, const unsigned char *frame, uint64_t bytes);
struct frame_opener *frame_opener_create(void);
void frame_opener_destroy(struct frame_opener *opener);
enum frame_error frame_open(struct frame_opener *opener, const struct sn_store *store, uint64_t offset,
			    const unsigned char *frame, uint64_t bytes, void *page);

/* ---- session ---- */

#define MAX_FAULTS 4096
#define MAX_FILLERS 4

struct fault {
	uint64_t address, since_ns, due_ns;
	bool write;
	bool unasked; /* brought in by us: nobody waits for it, and a guard may be there */
	unsigned char troubles; /* how often it could not be had */
};

struct filler { /* one thread's means of filling */
	struct frame_opener *opener;
	unsigned char *frame; /* FRAME_MAX bytes */
	unsigned char *page;  /* one page */
	bool from_store;      /* the last fill was */
	bool unknown;	      /* the last fill found no record at all */
};

struct stop;
struct robust;
struct huge;

#define FRESH_STREAMS 8
struct fresh { /* where the program is likely to use new memory next, and how much at once */
	struct {
		uint64_t expected, npages;
	} streams[FRESH_STREAMS];
	unsigned int next_victim;
};
struct loan;
struct resume;
struct replay;
struct flood;

#define MAX_THREADS (int)(sizeof(((struct sn_survey_report *)0)->threads) / sizeof(struct sn_thread))
#define MAX_KEPT (int)(sizeof(((struct sn_survey_report *)0)->kept) / sizeof(uint64_t))

/* notice.c: one that must not be lost; it lies in the session that it is about */
struct notice {
	struct sn_notice what;
	struct notice *next;
	bool waits;
};
void notice_post(struct notice *notice);
void notice_forget(struct notice *notice);
void notify(const struct sn_notice *notice); /* one that is counted when it repeats */

struct sn_session {
	uint64_t id;
	struct notice birth, end;
	uint32_t number;   /* in the registry */
	atomic_bool cut;   /* a former daemon died in a stop: its pages wait for sn_session_recover */
	bool handing;	   /* or for nobody: see sn_session_hand_out() */
	atomic_bool adopted; /* of a former daemon: its ring may have events that were not applied */
	atomic_int pid;
	int uffd, agent_sock, wake_fd;
	atomic_int maps_fd, pagemap_fd, mem_fd, process_fd; /* of the userfaultfd's own, or -1: memory.c */
	int agent_tids[2];
	uint64_t sentinel;
	struct sn_session *source; /* whose staging a forked child's pages are in, until they are copied; else NULL */
	struct sn_store *store;
	struct page_map pm;

	pthread_mutex_t mover;
	struct stop *stop; /* made when first used, and the next two; for whoever holds mover */
	struct robust *robust;
	struct huge *huge;
	struct loan *loan; /* of a target without an agent: its threads are borrowed; else NULL */
	struct sn_borrows borrows;
	uint32_t mover_seq;
	int status_fd;    /* the mover's /proc status, or -1 */
	bool mover_owes;  /* a command was given up on: until its reply is here there is no next one */
	bool mover_ended; /* there is nobody to send one to */
	bool pausing;     /* packing pauses for this session */
	atomic_int reading; /* packers that are inside a read of its memory */
	atomic_bool hurry; /* the daemon ends: nobody is waited for as long as usual */
	pthread_rwlock_t lock;
	bool in_stop; /* all but the agent stands: events are our own */
	bool standing; /* all but the agent stands, and nothing was moved yet */
	bool unseen;  /* pages have moved and were not looked at: nothing may be filled, the asides are the truth */
	atomic_bool forked; /* pages may be shared with a child */

	pthread_t reader, fillers[MAX_FILLERS];
	int nfillers;
	struct events *model;
	struct record *scratch, *moving; /* for whoever holds the lock exclusively; MAX_RECORDS each */
	atomic_bool stopping, gone;
	_Atomic uint64_t rounds; /* of the reader: pulse.c */
	atomic_bool waiting;
	uint64_t rounds_seen;
	pthread_mutex_t queue_lock;
	pthread_cond_t queue_ready;
	struct fault queue[MAX_FAULTS];
	int nqueue, nidle;

	pthread_mutex_t fresh_lock;
	struct fresh fresh;

	struct resume *_Atomic resume; /* from the first dump on */
	struct replay *_Atomic replay;
	struct flood *_Atomic flood;

	atomic_int fork_copies; /* children that still read our staging */
	struct sn_piece *inflight[MAX_INFLIGHT];
	struct hold *_Atomic hold; /* for whoever works on pieces: while one is in flight */
	struct sn_stats stats; /* counters by relaxed atomics */
};

#define COUNT(session, field) __atomic_fetch_add(&(session)->stats.field, 1, __ATOMIC_RELAXED)

/* Those who hold session->lock do so for a few microseconds, and a sleep takes longer than that: whoever has the lock
 * often looks for a while first. */
#define LOCK_LOOKS 200
static inline void session_share(struct sn_session *session)
{
	for (int looks = 0; looks < LOCK_LOOKS; looks++) {
		if (pthread_rwlock_tryrdlock(&session->lock) == 0)
			return;
		__builtin_ia32_pause();
	}
	pthread_rwlock_rdlock(&session->lock);
}

/* engine.c */
int cpus(void); /* that this process may use */

/* session.c */
uint64_t now_ns(void);
void prefer_thread(void); /* best effort: a plain user may not raise itself */
bool start_thread(pthread_t *thread, void *(*run)(void *), void *arg); /* with a small stack */
struct sn_session *session_new(const struct sn_target *target, struct sn_store *store, struct sn_session *source,
			       int *ret_error);
struct stop *session_stop(struct sn_session *session);
int session_start(struct sn_session *session);
int session_hand_over(struct sn_session *session); /* for the next daemon */
void session_forget(struct sn_session *session);
int session_fork(struct sn_session *session, const struct table *from, int uffd);
void session_gone(struct sn_session *session);
/* Replaces an entry and gives its old frame back; for whoever holds session->lock exclusively. */
void entry_put(struct sn_session *session, uint64_t index, uint64_t entry);

/* pulse.c: for the reader */
void pulse_wait(struct sn_session *session);
void pulse_go_on(struct sn_session *session);

/* trust.c: a page map that was not ours all the time */
bool trust_file(int fd);
/* What is wrong with it, or NULL; scratch has room for all records. */
const char *trust_wrong(struct page_map *pm, uint64_t store_bytes, struct record *scratch);

/* adopt.c */
void adopt_forks(struct sn_session *session);

/* recover.c */
void recover_begin(struct sn_session *session);
bool recover_moved(struct sn_session *session, struct table *table, uint64_t from, uint64_t to, uint64_t bytes);
int recover_find(struct sn_session *source, uint64_t index, uint64_t aside, uint64_t *ret);
struct snapd_run recover_ours(struct sn_session *session, struct snapd_run whole);

/* move.c: there must be a way back, for whoever holds session->mover */
int move_back(struct sn_session *session, uint64_t from, uint64_t to, uint64_t bytes);

/* events.c */
struct events { /* one drain: from before the first read until all that was read is applied */
	struct sn_session *session;
	struct table *table; /* the copy that is edited, or NULL */
	unsigned int n;	     /* messages in the ring */
	unsigned int nwaiting;
	uint16_t waiting[RING_SLOTS]; /* slots of those that are not applied, in order */
};
void events_begin(struct events *events, struct sn_session *session);
void events_take(struct events *events); /* the message in slot n of the ring */
struct interval events_need(const struct events *events); /* the place that must be vacated first, or nothing */
void events_force(struct events *events);	      /* nobody will vacate it */
void events_compact(struct events *events);	      /* makes room in the ring */
void events_end(struct events *events, bool quiet); /* quiet: no call is in flight */
void events_cover(struct sn_session *session, struct table *table, uint64_t address);

/* callers.c */
#define MAX_CALLERS MAX_THREADS
struct caller {
	pid_t tid;
	bool innocent;
	uint64_t ran_ns;
};
/* Waits until the thread that took memory away from the place has queued its event. False: there is none; true also
 * when /proc does not say. */
bool callers_await(int pid, struct interval place, struct caller *seen);
/* The new length in bytes of what an mremap that has not returned moved away from an address; 0 when nobody says. */
uint64_t callers_length(int pid, uint64_t moved_from, struct caller *seen);

/* uffd.c: each errno gets its meaning here */
enum uffd_result { UFFD_DONE, UFFD_EXISTS, UFFD_AGAIN, UFFD_UNMAPPED, UFFD_GONE, UFFD_NO_MEMORY, UFFD_ERROR };
enum uffd_result uffd_copy(int uffd, uint64_t to, const void *from, uint64_t bytes, uint64_t mode, uint64_t *ret_done);
enum uffd_result uffd_zero(int uffd, uint64_t at, uint64_t bytes);
enum uffd_result uffd_poison(int uffd, uint64_t at, uint64_t bytes);
enum uffd_result uffd_wake(int uffd, uint64_t at, uint64_t bytes);
enum uffd_result uffd_protect(int uffd, uint64_t at, uint64_t bytes, bool on);
bool uffd_changing(int uffd);
int uffd_register(int uffd, uint64_t start, uint64_t bytes, uint64_t mode);
int uffd_unregister(int uffd, uint64_t start, uint64_t bytes);
long pagemap_scan(int fd, uint64_t start, uint64_t end, uint64_t anyof, uint64_t ret_mask, uint64_t max_pages,
		  struct snapd_page_region *regions, uint64_t capacity, uint64_t *ret_end);

/* memory.c */
int memory_open(struct sn_session *session); /* 0 when it is open; -ESTALE: the process is not the userfaultfd's;
						* -EACCES, -EPERM: perhaps all but mem_fd is */
void memory_close(struct sn_session *session);
long memory_read(struct sn_session *session, uint64_t from, void *to, uint64_t bytes);
bool memory_is_ending(struct sn_session *session);
bool memory_is_freed(struct sn_session *session, uint64_t address);
bool memory_has_guard(struct sn_session *session, uint64_t start, uint64_t npages);

/* hold.c */
int hold_take(struct sn_session *session); /* 0 when the memory stays until hold_release */
void hold_release(struct sn_session *session);

/* reader.c */
void *reader_main(void *session);
bool ring_is_applied(const struct sn_session *session); /* what a former daemon had read; waits for it a while */

/* fill.c */
enum fill_result { FILL_DONE, FILL_LATER, FILL_NO_MEMORY, FILL_TROUBLE, FILL_WOULD_BLOCK, FILL_GONE };
int filler_init(struct filler *filler);
void filler_deinit(struct filler *filler);
enum fill_result fill_page(struct sn_session *session, struct filler *filler, struct fault *fault, bool nowait);
/* Until it is worth another try to answer what is asked for since then. */
uint64_t fill_delay_ns(const struct sn_session *session, uint64_t since_ns, enum fill_result result);
void fill_count(struct sn_session *session, uint64_t since_ns);
int fill_queue(struct sn_session *session, struct fault fault);
void *filler_main(void *session);

/* fresh.c: for whoever holds the lock, shared. alone: the page and nothing behind it. */
enum uffd_result fresh_fill(struct sn_session *session, uint64_t address, bool alone);

/* huge.c: for whoever holds session->mover */
struct huge *huge_create(void);
void huge_destroy(struct huge *huge);
void huge_note(struct huge *huge, uint64_t start, uint64_t end); /* with session->mover held */

/* bulk.c */
#define RUN_PAGES 128
struct run { /* pages in a row and the entries they had when they were looked up */
	uint64_t start, first;
	uint64_t entries[RUN_PAGES];
	uint64_t n, reused;
};
struct bulk {
	struct sn_session *session;
	struct frame_opener *opener;
	unsigned char *pages, *frames;
	bool keep_frames;
	uint64_t filled, ahead; /* ahead: the disk was told to read up to there */
};
int bulk_init(struct bulk *bulk, struct sn_session *session, bool keep_frames);
void bulk_deinit(struct bulk *bulk);
bool bulk_next(struct sn_session *session, uint64_t *at, uint64_t end, struct run *ret);
uint64_t bulk_decode(struct bulk *bulk, const struct run *run, bool nowait);
int bulk_copy(struct bulk *bulk, const struct run *run, const unsigned char *pages, uint64_t good);

/* resume.c: pages came back from the store, and were or may be wanted */
void resume_note(struct sn_session *session, uint64_t address, uint64_t npages);
void resume_destroy(struct resume *resume);
void set_check(struct sn_session *session);
uint64_t page_lot(uint64_t page); /* a random number that is always the same */
bool set_holds_back(const struct working_set *set, uint64_t page);
struct interval set_run(const struct working_set *set, uint64_t i);

/* replay.c: one at a time, for resume.c; the set stays as it is until the end */
bool replay_start(struct sn_session *session, const struct working_set *set);
void replay_hint_end(struct sn_session *session); /* does not wait */
void replay_end(struct sn_session *session);

/* flood.c: one at a time, for resume.c. out: pages; salt: another one holds other pages back. */
#define FLOOD_SAMPLES 64 /* pages that are held back */
bool flood_start(struct sn_session *session, uint64_t out, uint64_t salt);
bool flood_holds_back(uint64_t salt, uint64_t out, uint64_t page);
void flood_hint_end(struct sn_session *session); /* does not wait */
uint64_t flood_end(struct sn_session *session);	 /* how many pages were held back */

/* headroom.c: how many bytes of memory a process may still take */
uint64_t headroom(int pid);

/* spin.c: for a reader */
struct spin {
	int cpus;
	unsigned int misses, hits;
	unsigned int debt;  /* faults that must come soon before it spins again */
	unsigned int price; /* the next debt */
	uint64_t filled_ns; /* the last time */
	unsigned int burst; /* faults that came soon after the one before */
	uint64_t looked_ns; /* when crowded was found */
	bool crowded;
};
struct pollfd;
void spin_init(struct spin *spin);
/* Looks at descriptors for a moment; true when one is ready, false at once where it does not pay. */
bool spin_for(struct spin *spin, struct pollfd *fds, unsigned int nfds);
void spin_slept(struct spin *spin, uint64_t ns); /* until the next fault */
void spin_filled(struct spin *spin);
void spin_yield(bool begins);

/* awake.c */
void awake_start(void);
void awake_for(uint64_t ns);

/* prefetch.c */
struct prefetch;
struct prefetch *prefetch_create(struct sn_session *session);
void prefetch_destroy(struct prefetch *prefetch);
void prefetch_note(struct prefetch *prefetch, uint64_t address); /* a stored page was filled on demand */
/* fills a few pages; false when there is nothing to do */
bool prefetch_step(struct prefetch *prefetch);

/* stop.c: all of it for a tracer, but create, destroy and run */
struct stop *stop_create(void);
void stop_destroy(struct stop *stop);
int stop_run(struct stop *stop, void (*run)(void *arg), void *arg);
int stop_begin(struct stop *stop, int pid, const int skip[2], bool patient); /* an sn_outcome */
int stop_cause(const struct stop *stop);		       /* a negative errno, of stop_begin */
bool stop_touches(const struct stop *stop, uint64_t start, uint64_t end); /* a stack top or TLS is inside */
int stop_places(const struct stop *stop, struct sn_thread *ret, int capacity);
int stop_threads(const struct stop *stop);
uint64_t stop_lasted_ns(const struct stop *stop);
pid_t stop_thread(const struct stop *stop, int index); /* 0: it does not stand */
void stop_end(struct stop *stop);
int stop_begin_one(struct stop *stop, int pid); /* only one thread, that can be lent; as stop_begin else */
void stop_finish(struct stop *stop);
bool stop_is_mine(const struct stop *stop); /* the caller is its tracer */
bool stop_stands(const struct stop *stop);  /* it is between its begin and its end */

/* task.c */
int task_candidates(int pid, pid_t *ret, int capacity); /* threads that could be lent, the best first */
bool task_may_be_left(int pid, pid_t tid);
bool task_is_traced(int pid, pid_t tid);
bool task_is_deaf(int pid, pid_t tid);
bool task_is_filtered(int pid, pid_t tid);

/* haste.c */
void haste_begin(pid_t tid, struct haste *ret); /* for a tracer of the thread; tid stays 0 when nothing was changed */
void haste_end(struct haste *haste);
void haste_end_former(struct haste *haste, int pid);

/* borrow.c, for stop.c */
void borrow_end(struct stop *stop);

/* inject.c */
void loan_forget(struct sn_session *session);

/* orders.c: the commands of an agent, carried out by a borrowed thread; for whoever holds session->mover. As
 * mover.c's. */
int orders_ready(struct sn_session *session);
int loan_find_code(struct sn_session *session); /* inject.c: whether it is there still, in the same program */
int orders_call(struct sn_session *session, struct snapd_wire *message);

/* robust.c: for whoever holds session->mover */
struct robust *robust_create(void);
void robust_destroy(struct robust *robust);
int robust_look(struct sn_session *session);
void robust_fill(struct sn_session *session);
bool robust_touches(const struct robust *robust, uint64_t start, uint64_t end);
int robust_pages(const struct robust *robust, uint64_t *ret, int capacity);

/* mover.c: commands of the agent; for whoever holds session->mover. Beside the reply's status they return: */
#define MOVER_LATE (-EINPROGRESS) /* no reply in time; the command is carried out some time */
#define MOVER_FILTERED (-EBADRQC) /* it was not sent: a seccomp filter may kill the program for it */
#define MOVER_SILENT (-EHOSTDOWN) /* it was not sent: the last one's reply has not come, or never will */
void mover_attach(struct sn_session *session, int agent_sock);
void mover_detach(struct sn_session *session);
void mover_keep(struct sn_session *session, const struct sn_session *child);
void mover_pause(struct sn_session *session); /* before a stop or an unmap */
void mover_continue(struct sn_session *session);
int mover_ready(struct sn_session *session); /* 0 when a command may be sent */
int mover_settle(struct sn_session *session);
int mover_call(struct sn_session *session, struct snapd_wire *message);
int mover_unmap(struct sn_session *session, struct snapd_run run);

/* dismiss.c */
bool dismiss_is_stopped(const struct sn_session *session); /* the mover, by a signal */
/* Ends a thread of the agent; -EAGAIN: not yet. unfiltered: only where no seccomp filter is asked; else -EPERM. */
int dismiss(struct sn_session *session, int tid, bool unfiltered);

/* lift.c */
void lift(const struct sn_session *session); /* again and again, while the mover is waited for in a stop */
void lift_end(void);

/* pack.c */
int pack_start(int nthreads);
void pack_pause(void); /* while a target stands; pauses nest */
void pack_continue(void);
void pack_wait(struct sn_session *session);

/* piece.c, move.c */
#define MAX_SEGMENTS_OF_PIECE 4096
enum decision { ABSENT, POISON, DIRTY, CLEAN, ZERO, GUARD, PINNED, LEFT_ASIDE };

struct span { /* one interval of a piece, inside one mapping */
	uint64_t start, npages;
	uint64_t base; /* its first page in the piece's decisions */
	uint64_t hint, aside, staging;
	long first_segment, nsegments;
	int outcome, cause;
	bool keep_aside;
};
struct segment { /* staging pages in a row and their entries */
	uint64_t first, npages, staging, base;
};
struct sn_piece { /* what goes aside in one stop */
	struct sn_session *session;
	struct span spans[MAX_SPANS];
	int nspans, slot;
	bool adopted; /* of a former daemon, which may have dropped some of it */
	uint64_t npages, staging, staging_bytes, staging_hint;
	struct segment *segments;
	long nsegments;
	uint8_t *decisions;
	uint64_t *kept; /* of a dump that is kept: an entry a page, or one of KEPT_*; else NULL */
	struct snapd_page_region *regions;
	uint64_t dropped; /* bytes, in the order of the drop: no address is unmapped twice */
	/* packing */
	pthread_mutex_t lock;
	pthread_cond_t done;
	int level, jobs_left, cause;
	struct sn_pack_report packed;
};

/* keep.c: what no entry can be */
#define KEPT_LEFT (~0ULL)	/* nothing is known of it */
#define KEPT_PINNED (~0ULL - 1) /* it stayed in memory */
#define KEPT_ASIDE (~0ULL - 2)	/* it is served from where it could not be stored */
void piece_note_kept(struct sn_piece *piece, uint64_t page, uint64_t entry);
void piece_forget_kept(struct sn_piece *piece);

static inline uint64_t span_bytes(const struct span *span)
{
	return span->npages * PAGE;
}

static inline void piece_set_phase(struct sn_piece *piece, enum phase phase)
{
	for (int i = 0; i < piece->nspans; i++) {
		const struct span *span = &piece->spans[i];

		struct intent *intent = &piece->session->pm.header->intents[piece->slot * MAX_SPANS + i];

		intent->start = span->start;
		intent->npages = span->npages;
		intent->aside = span->aside;
		intent->staging = span->staging;
		/* A successor may find what is here at any instant: it says what the rest is. */
		__atomic_store_n(&intent->phase, phase, __ATOMIC_RELEASE);
	}
}

#endif
