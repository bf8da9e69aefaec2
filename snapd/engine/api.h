/* The engine as Python sees it. Plain declarations only: this text is also what the cffi facade is made from.
 *
 * Functions return 0 or a negative errno unless they say otherwise. Addresses are the target's, sizes are bytes unless
 * named npages, times are nanoseconds unless named _us. No function may be called with the GIL held by a fill: fills
 * never call Python.
 */

/* libzstd by pointers: the engine uses the codec that the Python tools use. */
struct sn_codec {
	void *create_cctx, *free_cctx, *set_cctx, *compress2;
	void *create_dctx, *free_dctx, *decompress_dctx, *is_error;
};

enum sn_notice_kind { SN_NOTICE_CHILD = 1, SN_NOTICE_GONE = 2, SN_NOTICE_BAD_FRAME = 3, SN_NOTICE_TROUBLE = 4 };
struct sn_notice {
	int kind, cause; /* cause: errno, or 0 */
	uint64_t session; /* sn_session_id; CHILD: the parent's. The session may be closed by now. */
	struct sn_session *child;
	uint64_t address, value, count; /* count: how often; the rest is the first one's */
};

struct sn_store_stats {
	uint64_t tail, live_bytes, written_bytes, trimmed_bytes; /* written: and not given back */
};

/* What makes a target: agent_sock is -1 for a forked child without an agent. */
struct sn_target {
	int pid, uffd, page_map, agent_sock;
	uint64_t sentinel;
	int agent_tids[2];
};

struct sn_stats {
	uint64_t faults, filled_zero, filled_aside, filled_stored, retries, bad_pages;
	uint64_t forks, remaps, removes, unmaps;
	uint64_t replays, replayed, replay_hits, replay_misses; /* hits, misses: of what was held back */
	uint64_t histogram[64]; /* fills by time: bucket 4*log2(us) + the next two bits */
};

struct sn_counts {
	uint64_t none, aside, stored, filled, zero, guard, bad, moving, frame_bytes, ranges;
};

enum sn_outcome {
	SN_MOVED = 0,
	SN_CHANGED = 1,   /* the mapping is not what was chosen: choose again */
	SN_BUSY = 2,      /* a thread did not stop in time: put off */
	SN_TRACED = 3,    /* another tracer */
	SN_FOREIGN = 4,   /* another userfaultfd watches the range */
	SN_NO_ROOM = 5,   /* no address space, memory or map slots in the target */
	SN_GONE = 6,      /* the target is gone */
	SN_SEALED = 7,    /* the kernel forbids to move it */
	SN_FAILED = 8,    /* cause says why */
	SN_SILENT = 9,    /* the agent does not answer */
	SN_FILTERED = 10  /* a seccomp filter is on the agent too */
};

struct sn_piece_report {
	int outcome, cause;
	uint64_t stop_ns, until_stopped_ns;
	uint64_t present, aside, clean, zero, guards, pinned, huge; /* pages */
	int threads;
	int outcomes[20], causes[20]; /* of each span; outcome is the stop's own */
};

struct sn_pack_report {
	int cause;
	uint64_t stored_pages, stored_bytes, zero_pages, lost_races;
};

struct sn_region {
	uint64_t start, npages, first, aside;
};

int sn_init(const struct sn_codec *codec, int npackers);
void sn_set_busy_poll(uint32_t us); /* how long readers look for the next fault before they sleep; 0: not at all */
int sn_notice_fd(void);
int sn_next_notice(struct sn_notice *ret); /* 1 when there was one */

/* limit: segments of 1 MiB that a store may have; 0 for the most there are. number: a former daemon's, 0 for a
 * new one. */
struct sn_store *sn_store_open(int fd, const unsigned char *id, uint64_t tail, uint64_t limit, uint32_t number);
void sn_store_release(struct sn_store *store);
void sn_store_stats(struct sn_store *store, struct sn_store_stats *ret);
void sn_store_set_floor(struct sn_store *store, uint64_t free_bytes); /* packing keeps that much free */
/* Moves what is left of segments of which less than half is needed to the end of the store: at most a few dozen a call.
 * sessions: those that share the store; none of them may end meanwhile. ret_bytes: what was moved. */
int sn_store_compact(struct sn_store *store, struct sn_session **sessions, int nsessions, uint64_t *ret_bytes);
int sn_store_trim(struct sn_store *store); /* gives space of dead segments back to the file system */

/* Frames that are written leave the page cache a little later, unless they are to be kept there. What of a store is
 * left to be forgotten, 0 for nothing; and doing it, which waits for the disk. */
void sn_store_keep_cached(struct sn_store *store, int keep);
void sn_store_distrust(struct sn_store *store);
int sn_store_behind(struct sn_store *store, uint64_t *ret_from, uint64_t *ret_to);
int sn_forget_cached(int fd, uint64_t from, uint64_t to);

int sn_page_map_create(void); /* a sealed memfd, or a negative errno */

struct sn_session *sn_session_create(const struct sn_target *target, struct sn_store *store, int *ret_error);
void sn_session_close(struct sn_session *session);
uint64_t sn_session_id(struct sn_session *session); /* never given out twice */
uint32_t sn_session_number(struct sn_session *session); /* in the registry and in its page map */
/* What a successor must know of the process. */
void sn_session_note(struct sn_session *session, int uid, uint64_t born, uint32_t flags);
int sn_session_pid(struct sn_session *session);
/* Names a forked child's process, once it is known. -ESTALE: the address space is another's. */
int sn_session_set_pid(struct sn_session *session, int pid);
/* Gives a forked child's session the agent that the child has started; takes the connection over. */
void sn_session_bind(struct sn_session *session, int agent_sock, const int *tids);
/* The agent keeps a forked child's userfaultfd and page map, as it does when the child is forked. */
void sn_session_keep(struct sn_session *session, struct sn_session *child);
/* The agent need not keep a forked child any longer: it has ended, or has an agent of its own. */
void sn_session_let(struct sn_session *session, uint32_t child);
int sn_session_page_map(struct sn_session *session);
int sn_session_store_fd(struct sn_session *session);
int sn_session_uffd(struct sn_session *session);
struct sn_store *sn_session_store(struct sn_session *session);
void sn_session_stats(struct sn_session *session, struct sn_stats *ret);
void sn_session_counts(struct sn_session *session, struct sn_counts *ret);
uint64_t sn_session_regions(struct sn_session *session, struct sn_region *ret, uint64_t capacity);
int sn_session_alive(struct sn_session *session);
int sn_session_is_gone(struct sn_session *session); /* its end is told by a notice, once; or was */
int sn_session_gets_on(struct sn_session *session); /* 0 when the reader did nothing since the last call, and should */
int sn_session_mark(struct sn_session *session, int on); /* write-protects the sentinel page, or not */

/* Whether the address space of a userfaultfd still exists. */
int sn_uffd_lives(int uffd);

/* Attaching: what must be in a target that has no agent is put there by ptrace. gift is /dev/userfaultfd, with make, of
 * which the target makes a userfaultfd; or one that is there. Either way ret_uffd is the caller's own descriptor of it,
 * or -1 with a gift that was one already. -EPERM: not ours to trace; -EBUSY: another tracer; -ENOEXEC: 32-bit code;
 * -EBADRQC: a filter that can't be suspended; -EOPNOTSUPP: dispatched system calls; -ESRCH; -EAGAIN: not now. */
struct sn_injection {
	uint64_t region, region_bytes, sentinel, stop_ns;
	int number, uffd, control; /* of the userfaultfd in the target, ours, the page that is shared */
};
int sn_inject(int pid, int gift, int make, struct sn_injection *ret);
/* Unmaps and closes what sn_inject has put there: uffd is ours of the same userfaultfd, or -1. A sentinel of 0 and a
 * number of -1 stay. For when nothing but the sentinel is watched. */
int sn_eject(int pid, const struct sn_injection *injection, int uffd);
/* Waits until no target is made to call anything, and has none begin; for who ends this process. */
void sn_injections_end(void);
void sn_injections_go_on(void); /* it did not end */
/* Threads of the target do what an agent would, from now on. Takes the shared page over. */
int sn_session_lend(struct sn_session *session, const struct sn_injection *injection);
/* What was put into the target, also by a former daemon: 0 bytes for nothing. */
void sn_session_injection(struct sn_session *session, struct sn_injection *ret);
/* Stops of single threads outside a dump's own stops, since the last call. */
struct sn_borrows {
	uint64_t stops, sum_ns, longest_ns;
};
void sn_session_borrows(struct sn_session *session, struct sn_borrows *ret);
int sn_session_has_uffd(struct sn_session *session); /* 1: the target still has it open */

int sn_uffd_api(int uffd, int with_fork, uint64_t *ret_features);
int sn_uffd_register(int uffd, uint64_t start, uint64_t length);
int sn_same_memory(int pid, int other); /* 1 when both processes share one address space */
/* Whether the target forked since the last call: pages may be shared with a child until they are written. */
int sn_session_take_forked(struct sn_session *session);
void sn_session_set_forked(struct sn_session *session); /* some still are */
/* Stops the target once to see what must stay: where its threads' stacks and TLS are, and pages that the kernel will
 * look at when a thread ends. */
struct sn_thread {
	int tid;
	uint64_t stack, tls;
};
struct sn_survey_report {
	int outcome, cause; /* an sn_outcome, and a negative errno or 0 */
	int nthreads, nkept;
	uint64_t stop_ns;
	struct sn_thread threads[8192];
	uint64_t kept[8192];
};
void sn_survey(struct sn_session *session, _Bool patient, struct sn_survey_report *ret);
/* Next interval worth a piece in [start, end): not heavier than weight, where each page weighs 1 and each run of pages
 * run_weight more; not wider than span; ends at a gap wider than gap. ret[0], ret[1]: the interval; ret[2]: pages with
 * memory; ret[3]: what they weigh. Returns 1, 0 at the end. */
struct sn_piece_limits {
	uint64_t weight, run_weight, span, gap;
};
int sn_next_piece(int pagemap_fd, uint64_t start, uint64_t end, const struct sn_piece_limits *limits, uint64_t *ret);
int sn_watched(int pagemap_fd, uint64_t address); /* 1: registered for asynchronous write-protect */
int sn_marked(int pagemap_fd, uint64_t address); /* 1: watched and write-protected */

/* Steps 2 to 5 of a dump for one piece: stop, move, look, pin pass, go on. intervals: pairs of start and end, each
 * inside one mapping, at most 20. hint: the middle of a wide hole in the target, or 0. */
struct sn_piece *sn_piece_create(struct sn_session *session, const uint64_t *intervals, int nintervals, uint64_t hint);
int sn_piece_move(struct sn_piece *piece, _Bool patient, struct sn_piece_report *ret);
/* Step 6, in two halves: queue the piece for the packing threads, and wait until they are done. */
int sn_piece_pack(struct sn_piece *piece, int level);
int sn_piece_wait(struct sn_piece *piece, struct sn_pack_report *ret);
/* Instead of step 7 after a failed store: pages that are still aside return by fills. -EAGAIN: some must wait there. */
int sn_piece_return(struct sn_piece *piece);
/* A dump whose pages are kept: what is out when it begins, and what each piece's stop found. NULL: no memory. */
struct sn_keep *sn_keep_create(struct sn_session *session);
void sn_keep_free(struct sn_keep *keep);
int sn_piece_keep(struct sn_piece *piece); /* before the move */
int sn_keep_take(struct sn_keep *keep, struct sn_piece *piece); /* after the wait */
/* Pages in a row by the time at which they were seen: where parts overlap, the later one counts. */
enum sn_unheld { SN_HELD = 0, SN_UNHELD_PINNED = 1, SN_UNHELD_ASIDE = 2 };
struct sn_part {
	uint64_t start, npages;
	int reason;
};
uint64_t sn_keep_parts(struct sn_keep *keep, struct sn_part *ret, uint64_t capacity);
/* Copies the frames of pages of a part behind those that are in fd, sealed for the store id. The entries that come back
 * name the new frames; a frame that cannot be read gives BAD. */
struct sn_copy *sn_copy_create(struct sn_keep *keep, int fd, const unsigned char *id, uint64_t offset);
void sn_copy_free(struct sn_copy *copy);
int sn_copy_part(struct sn_copy *copy, uint64_t part, uint64_t skip, uint64_t npages, uint64_t *ret_entries);
int sn_copy_finish(struct sn_copy *copy, uint64_t *ret_end);

/* Step 7: unmap the staging in slices of at most slice bytes, breath_us apart. */
int sn_piece_drop(struct sn_piece *piece, uint64_t slice, unsigned int breath_us);
void sn_piece_free(struct sn_piece *piece);

/* Around a dump: what comes back soon after it is the working set, which is brought first when the program resumes the
 * next time. */
void sn_session_dumping(struct sn_session *session);
void sn_session_dumped(struct sn_session *session);

/* Brings [start, end) back into the target. ret_pages: pages filled. -ENOMEM when the target has no room. */
int sn_restore(struct sn_session *session, uint64_t start, uint64_t end, int blind, uint64_t *ret_pages);
/* Stops watching a whole mapping in which nothing is out. -EBUSY while something is. */
int sn_release(struct sn_session *session, uint64_t start, uint64_t end);

/* Makes huge pages again of what stops saw as such, where all of it is back and not watched. -ESRCH: the target is
 * gone. */
int sn_session_collapse(struct sn_session *session, uint64_t *ret_bytes);

/* One command to the agent; for what needs no engine state. message is a struct snapd_wire of 1024 bytes, in and
 * out. */
int sn_agent_call(struct sn_session *session, void *message);
/* 0 when a command may be sent, also where the reply to the last one has come late. */
int sn_session_answers(struct sn_session *session);
/* Ends the agent's threads, asking no seccomp filter; for when nothing is out. -EPERM: that is not ours to do. */
int sn_session_dismiss(struct sn_session *session);
void sn_session_hurry(struct sn_session *session); /* from now on nobody is waited for as long as usual */
void sn_page_map_trim(struct sn_session *session);

/* The keeper and what it keeps; letters and endings are keeper.h's. fd -1 makes a registry; returns its descriptor. */
int sn_keeper_open(int fd);
int sn_hand_over(int letter, uint32_t number, int fd);
int sn_withhold(int letter, uint32_t number); /* the descriptor that it was, or -1 */
/* What is handed over, two words each, letter and number; returns how many there are, which may be more than room. */
uint32_t sn_handed_over(uint32_t *ret, uint32_t room);
int sn_duplicate(int letter, uint32_t number); /* of what is handed over; -ENOENT when it is no more */
void sn_keeper_numbers_from(uint32_t last);    /* a number up to this one is somebody's already */
/* Makes a keeper that will execute path; the former one has no duty any more then. Returns its pid. Again: when it is
 * gone. */
int sn_keeper_start(const char *path, const char *const *argv, const char *const *envp);
void sn_keeper_format(char *ret_magic); /* the 8 bytes with which every registry begins */
int sn_keeper_pid(void);
void sn_keeper_ending(int ending);
uint64_t sn_keeper_serving(void); /* from here on targets are served; returns for how long they were not, or 0 */
int sn_same_file(int fd, int other); /* 1 when both descriptors are of one open file */

/* What the page map of a former daemon says of its session. */
struct sn_page_map_info {
	int pid, uid;
	uint32_t number, store_number, parent, source, flags;
	/* spans on their way by phase (enum phase); events that were read and not applied */
	uint32_t phases[6], events;
	uint64_t born, sentinel;
	unsigned char store_id[16];
};
void sn_page_map_format(char *ret_magic, uint32_t *ret_version); /* of every page map; magic has 8 bytes */
int sn_page_map_look(int fd, struct sn_page_map_info *ret); /* -EPROTO: it is none of this version */
/* Makes a session of a former daemon's page map after checking all of it against a store of so many bytes: -EBADMSG,
 * and then ret_what says what is wrong. Nothing is served before sn_session_resume. */
struct sn_session *sn_session_adopt(const struct sn_target *target, struct sn_store *store, uint64_t store_bytes,
				    int *ret_error, const char **ret_what);
int sn_page_map_renumber(int fd); /* its number was given out by another registry than ours */
/* The staging of source has pages that this forked child does not have yet. */
void sn_session_depend(struct sn_session *session, struct sn_session *source);
int sn_session_resume(struct sn_session *session);
/* With an agent again: finishes what the former daemon's mover and a cut stop have left. Returns an sn_outcome;
 * SN_BUSY: try again. */
int sn_session_recover(struct sn_session *session);
int sn_session_hand_out(struct sn_session *session);
int sn_session_is_cut(struct sn_session *session); /* 1: pages wait for that */
/* A piece that was moved and not packed or dropped, slot 0 to 3; NULL: there is none. */
struct sn_piece *sn_piece_adopt(struct sn_session *session, int slot);

/* Doors for tests, see model.c: pages with entries counted up in the frame offset (all ones: without entries), an
 * event as if it had been read (the kernel's numbers; 1 when it or an earlier one waits for ret_need to be vacated),
 * the end of that wait when nobody vacates it, the end of a drain, room made in the ring, what the mover unmaps, a full
 * stop, and the entry of an address (all ones: none). */
int sn_model_add(struct sn_session *session, uint64_t start, uint64_t npages, uint64_t entry);
void sn_model_skip(struct sn_session *session, uint64_t nentries); /* as if so many had been given out and taken back */
int sn_model_event(struct sn_session *session, int event, uint64_t a, uint64_t b, uint64_t c, uint32_t npages_more,
		   uint64_t *ret_need);
int sn_model_force(struct sn_session *session);
void sn_model_end(struct sn_session *session, int quiet);
void sn_model_compact(struct sn_session *session);
void sn_model_drop(struct sn_session *session, uint64_t start, uint64_t end);
void sn_model_stand(struct sn_session *session);
void sn_model_trouble(struct sn_session *session, int cause); /* a notice of trouble; of the session's end with 0 */
uint64_t sn_model_entry(struct sn_session *session, uint64_t address);

/* headroom.c, also for tests: memory that a process may take without being asked is promised, or refused (-ENOMEM), and
 * given back when it was brought. What /proc/PID/cgroup says leaves so many bytes; top is what /sys is in. */
int sn_headroom_take(int pid, uint64_t bytes);
void sn_headroom_give(uint64_t bytes);
uint64_t sn_headroom(const char *top, const char *groups);

/* Raw limits for benchmarks, measured without a session; MB/s and us are computed by the caller. */
int sn_bench_codec(const unsigned char *pages, uint64_t npages, int level, int nthreads, uint64_t *ret_compress_ns,
		   uint64_t *ret_decompress_ns, uint64_t *ret_bytes);
