"""The engine: C threads that answer faults, move pieces and pack pages, as typed Python objects.

The only importer of the compiled module. Owns handles and the meaning of its return codes; every call lets the GIL
go while C works. Knows nothing of trio, sockets or policy.
"""

from __future__ import annotations

import enum
import errno
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from snapd.engine import codec
from snapd.engine._engine import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

WIRE_BYTES: Final = 1024
SILENT: Final = frozenset({errno.EINPROGRESS, errno.EHOSTDOWN})
"""What an OSError of a command to an agent that does not answer carries."""
MAX_SPANS: Final = 20
SLOTS: Final = 4


FILTERED: Final = errno.EBADRQC
"""What an OSError of a command carries that was not sent because of a seccomp filter."""


class Outcome(enum.IntEnum):
    """What became of a piece: `enum sn_outcome`."""

    MOVED = 0
    CHANGED = 1
    BUSY = 2
    TRACED = 3
    FOREIGN = 4
    NO_ROOM = 5
    GONE = 6
    SEALED = 7
    FAILED = 8
    SILENT = 9
    FILTERED = 10


class PartKind(enum.IntEnum):
    """Whether the content of kept pages is known: `enum sn_unheld`."""

    HELD = 0
    PINNED = 1
    ASIDE = 2


class NoticeKind(enum.IntEnum):
    """What the engine has to say by itself: `enum sn_notice_kind`."""

    CHILD = 1
    GONE = 2
    BAD_FRAME = 3
    TROUBLE = 4


@dataclass(frozen=True, slots=True)
class Notice:
    """One notice.

    `session` is the key of one that may be closed by now, `child` a handle, `cause` an errno, a frame error, or 0.
    """

    kind: NoticeKind
    cause: int
    session: int
    child: Any
    address: int
    value: int
    count: int


@dataclass(frozen=True, slots=True)
class PieceReport:
    """What one stop did; pages by what they are, times in nanoseconds."""

    outcome: Outcome
    cause: int
    stop_ns: int
    until_stopped_ns: int
    present: int
    aside: int
    clean: int
    zero: int
    guards: int
    pinned: int
    huge: int
    threads: int
    outcomes: tuple[Outcome, ...]
    causes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PackReport:
    """What packing one piece gave; `cause` is a negative errno when it failed."""

    cause: int
    stored_pages: int
    stored_bytes: int
    zero_pages: int
    lost_races: int


@dataclass(frozen=True, slots=True)
class Counts:
    """Pages of a session by state."""

    none: int
    aside: int
    stored: int
    filled: int
    zero: int
    guard: int
    bad: int
    moving: int
    frame_bytes: int
    ranges: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of a session since its start; `histogram` has the fills by time (see `percentile`)."""

    faults: int
    filled_zero: int
    filled_aside: int
    filled_stored: int
    retries: int
    bad_pages: int
    forks: int
    remaps: int
    removes: int
    unmaps: int
    replays: int
    replayed: int
    replay_hits: int
    replay_misses: int
    histogram: tuple[int, ...] = field(repr=False)

    def percentile(self, share: float) -> float | None:
        """Return the time in microseconds under which `share` (0 to 1) of the fills stayed, or None for no fill."""
        total = sum(self.histogram)
        seen = 0
        for bucket, count in enumerate(self.histogram):
            seen += count
            if total and seen >= share * total:
                return float(bucket if bucket < 8 else (4 + bucket % 4 + 1) << (bucket // 4 - 1))
        return None


@dataclass(frozen=True, slots=True)
class Region:
    """A row of the range table."""

    start: int
    npages: int
    first: int
    aside: int


@dataclass(frozen=True, slots=True)
class Part:
    """Pages in a row of a dump that is kept."""

    start: int
    npages: int
    kind: PartKind


@dataclass(frozen=True, slots=True)
class ThreadPlace:
    """Where a thread's stack pointer and TLS were when it stood."""

    tid: int
    stack: int
    tls: int


@dataclass(frozen=True, slots=True)
class Survey:
    """What one stop has shown; `kept`: pages that the kernel will look at when a thread ends."""

    outcome: Outcome
    cause: int
    threads: tuple[ThreadPlace, ...]
    kept: tuple[int, ...]
    stop_ns: int


@dataclass(frozen=True, slots=True)
class Injection:
    """What was put into a target without an agent: `number` is that of its userfaultfd there, `uffd` ours of it."""

    region: int
    region_bytes: int
    sentinel: int
    stop_ns: int
    number: int
    uffd: int
    control: int


@dataclass(frozen=True, slots=True)
class Borrows:
    """Stops of single threads outside a dump's own stops."""

    stops: int
    sum_ns: int
    longest_ns: int


_started: Any = None
_start_lock = threading.Lock()


def start(packers: int) -> str:
    """Start the packing threads once a process; returns where libzstd comes from. Raises ImportError or OSError."""
    global _started  # noqa: PLW0603 - the engine is one a process, as its threads are
    with _start_lock:
        if _started is None:
            addresses, source, keep = codec.load()
            table = ffi.new("struct sn_codec *")
            for name, address in addresses.items():
                setattr(table, name, ffi.cast("void *", address))
            check(lib.sn_init(table, packers))
            _started = (source, keep)
        return str(_started[0])


def set_busy_poll(us: int) -> None:
    """Let readers look for the next fault for so many microseconds before they sleep, where it pays; 0: never."""
    lib.sn_set_busy_poll(us)


def check(result: int) -> int:
    """Return `result`, or raise OSError when it is a negative errno."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def notice_fd() -> int:
    """Return the eventfd that becomes readable when there are notices."""
    return check(lib.sn_notice_fd())


def notices() -> Iterator[Notice]:
    """Take all notices that are there."""
    raw = ffi.new("struct sn_notice *")
    while lib.sn_next_notice(raw):
        yield Notice(NoticeKind(raw.kind), raw.cause, raw.session, raw.child or None, raw.address, raw.value, raw.count)


def uffd_api(uffd: int, *, with_fork: bool) -> int:
    """Enable a new userfaultfd's features and return them; OSError (EPERM without CAP_SYS_PTRACE, EINVAL)."""
    features = ffi.new("uint64_t *")
    check(lib.sn_uffd_api(uffd, with_fork, features))
    return int(features[0])


def forget_cached(fd: int, start: int, end: int) -> None:
    """Let the page cache forget a part of a file when the disk has it; waits for that. OSError: it has not."""
    check(lib.sn_forget_cached(fd, start, end))


def uffd_lives(uffd: int) -> bool:
    """Whether the address space of a userfaultfd still exists."""
    return bool(lib.sn_uffd_lives(uffd))


def uffd_register(uffd: int, start: int, length: int) -> None:
    """Watch one whole mapping for missing pages and writes; OSError (EBUSY: another userfaultfd has it)."""
    check(lib.sn_uffd_register(uffd, start, length))


def inject(pid: int, gift: int, *, make: bool) -> Injection:
    """Put into a process what it must have to be managed without an agent.

    `gift` is /dev/userfaultfd, and with `make` the process makes a userfaultfd of it; or else one of its own address
    space that it is to have. OSError: EPERM, EBUSY (another tracer), ENOEXEC (32-bit code), `FILTERED`, EOPNOTSUPP
    (its system calls go elsewhere), ESRCH, EAGAIN (it does not stop), and what the calls in it gave.
    """
    raw = ffi.new("struct sn_injection *")
    check(lib.sn_inject(pid, gift, make, raw))
    return Injection(*(getattr(raw, name) for name in Injection.__slots__))


def eject(pid: int, injection: Injection, uffd: int) -> None:
    """Take out of a process what `inject` has put there; a sentinel of 0 and a number of -1 stay. OSError likewise."""
    raw = ffi.new("struct sn_injection *", tuple(getattr(injection, name) for name in Injection.__slots__))
    check(lib.sn_eject(pid, raw, uffd))


def injections_end() -> None:
    """Wait until nothing is put into a process or taken out, and have nothing begin; for who ends this process."""
    lib.sn_injections_end()


def injections_go_on() -> None:
    """It did not end."""
    lib.sn_injections_go_on()


def same_memory(pid: int, other: int) -> bool:
    """Whether two processes share one address space; False where the kernel does not tell."""
    return bool(lib.sn_same_memory(pid, other) == 1)


def watched(pagemap_fd: int, address: int) -> bool:
    """Whether the page at `address` is registered for asynchronous write-protection."""
    return bool(lib.sn_watched(pagemap_fd, address) == 1)


def marked(pagemap_fd: int, address: int) -> bool:
    """Whether the page at `address` is watched and write-protected, as `Session.mark` makes a sentinel page."""
    return bool(lib.sn_marked(pagemap_fd, address) == 1)


class Interval(NamedTuple):
    """What to move next: pages with memory, and what they weigh in a stop, runs counted in."""

    start: int
    end: int
    npages: int
    weight: int


def next_piece(
    pagemap_fd: int, start: int, end: int, *, weight: int, run_weight: int, max_span: int, gap: int
) -> Interval | None:
    """Return the next interval of [start, end) with memory, not heavier than `weight`, or None at the end."""
    found = ffi.new("uint64_t[4]")
    limits = ffi.new("struct sn_piece_limits *", (weight, run_weight, max_span, gap))
    if check(lib.sn_next_piece(pagemap_fd, start, end, limits, found)) == 0:
        return None
    return Interval(*found)


def page_map_create() -> int:
    """Return a new page map memfd, sealed against shrinking, mode 0600."""
    return check(lib.sn_page_map_create())


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Bytes of a store: `live_bytes` of frames that are referred to, once for each reference; `written_bytes` in all.

    `tail` is where the next frame goes, `trimmed_bytes` went back to the file system since the start.
    """

    tail: int
    live_bytes: int
    written_bytes: int
    trimmed_bytes: int


class Store:
    """An open store that sessions share; owns its descriptor."""

    def __init__(self, fd: int, store_id: bytes, tail: int, limit: int = 0, number: int = 0) -> None:
        """Take over `fd`, whose frames end at `tail`.

        `limit` is how many segments it may have, 0 for the most; `number` is a former daemon's, 0 for a new store.
        """
        self.fd = fd
        self.handle = lib.sn_store_open(fd, store_id, tail, limit, number)
        if not self.handle:
            raise MemoryError

    @classmethod
    def of(cls, session: Session) -> Self:
        """Return a session's store; it stays the session's."""
        store = cls.__new__(cls)
        store.fd, store.handle = session.descriptors()[0], lib.sn_session_store(session.handle)
        return store

    def stats(self) -> StoreStats:
        """Return its figures."""
        return _store_stats(self.handle)

    def release(self) -> None:
        """Let go; the last session that uses the store closes it."""
        if self.handle:
            lib.sn_store_release(self.handle)
            self.handle = None


def _store_stats(handle: Any) -> StoreStats:
    raw = ffi.new("struct sn_store_stats *")
    lib.sn_store_stats(handle, raw)
    return StoreStats(*(getattr(raw, name) for name in StoreStats.__slots__))


def tidy_store(sessions: Sequence[Session]) -> int:
    """Give back what of a store nobody needs, and move what is left of mostly dead segments; returns how many bytes.

    `sessions` are some or all that share one store; none of them may end meanwhile. At most a few dozen segments are
    moved a call. OSError as the file system gives it.
    """
    store = lib.sn_session_store(sessions[0].handle)
    moved = ffi.new("uint64_t *")
    check(lib.sn_store_trim(store))
    check(lib.sn_store_compact(store, [one.handle for one in sessions], len(sessions), moved))
    check(lib.sn_store_trim(store))
    return int(moved[0])


class Session:
    """The engine's half of a session: three descriptors, the reader thread, the page map."""

    def __init__(self, handle: Any) -> None:
        """Wrap a handle that the engine gave out."""
        self.handle = handle

    @classmethod
    def create(
        cls, store: Store, *, pid: int, uffd: int, page_map: int, agent_sock: int, sentinel: int, tids: tuple[int, int]
    ) -> Self:
        """Start serving a target; takes the descriptors over. OSError when it can't, and then takes none.

        ESTALE: the userfaultfd is of another address space than the process.
        """
        target = ffi.new("struct sn_target *")
        target.pid, target.uffd, target.page_map, target.agent_sock = pid, uffd, page_map, agent_sock
        target.sentinel = sentinel
        target.agent_tids[0], target.agent_tids[1] = tids
        error = ffi.new("int *")
        handle = lib.sn_session_create(target, store.handle, error)
        if not handle:
            check(error[0])
            raise MemoryError
        return cls(handle)

    @property
    def key(self) -> int:
        """The session's id, as notices name it."""
        return int(lib.sn_session_id(self.handle))

    def close(self) -> None:
        """End the threads and close the descriptors. What is out then is served by nobody here."""
        handle, self.handle = self.handle, None
        if handle:
            lib.sn_session_close(handle)

    @property
    def number(self) -> int:
        """The session's number in its page map, which a successor knows it by."""
        return int(lib.sn_session_number(self.handle))

    def note(self, *, uid: int, born: int, flags: int) -> None:
        """Write down what a successor must know of the process; `born` is its start time as /proc has it."""
        lib.sn_session_note(self.handle, uid, born, flags)

    def set_pid(self, pid: int) -> None:
        """Name the process, once it is known; OSError when it is gone, or does not have the address space."""
        check(lib.sn_session_set_pid(self.handle, pid))

    def descriptors(self) -> tuple[int, int, int]:
        """Return the store, the page map and the userfaultfd; they stay the engine's."""
        calls = (lib.sn_session_store_fd, lib.sn_session_page_map, lib.sn_session_uffd)
        store, page_map, uffd = (int(call(self.handle)) for call in calls)
        return store, page_map, uffd

    def bind(self, agent_sock: int, tids: tuple[int, int]) -> None:
        """Give a forked child's session its own agent; takes the connection over."""
        lib.sn_session_bind(self.handle, agent_sock, tids)

    def keep(self, child: Session) -> None:
        """Let the agent keep what a forked child without an agent needs to be served."""
        lib.sn_session_keep(self.handle, child.handle)

    def let(self, child_number: int) -> None:
        """Let the agent's copies for a child go, which has ended or has an agent of its own."""
        lib.sn_session_let(self.handle, child_number)

    def lend(self, injection: Injection) -> None:
        """Let threads of the target do what an agent would; takes the shared page over."""
        raw = ffi.new("struct sn_injection *", tuple(getattr(injection, name) for name in Injection.__slots__))
        check(lib.sn_session_lend(self.handle, raw))

    def injection(self) -> Injection:
        """Return what was put into the target, also by a former daemon; no `region_bytes` for nothing."""
        raw = ffi.new("struct sn_injection *")
        lib.sn_session_injection(self.handle, raw)
        return Injection(*(getattr(raw, name) for name in Injection.__slots__))

    def has_uffd(self) -> bool:
        """Whether the target still has its userfaultfd open under the number that it was given."""
        return bool(lib.sn_session_has_uffd(self.handle) == 1)

    def borrows(self) -> Borrows:
        """Return how often threads were borrowed outside of stops since the last call."""
        raw = ffi.new("struct sn_borrows *")
        lib.sn_session_borrows(self.handle, raw)
        return Borrows(raw.stops, raw.sum_ns, raw.longest_ns)

    def alive(self) -> bool:
        """Whether the address space still exists."""
        return bool(lib.sn_session_alive(self.handle))

    def is_gone(self) -> bool:
        """Whether the notice of its end is on its way, or has been taken."""
        return bool(lib.sn_session_is_gone(self.handle))

    def gets_on(self) -> bool:
        """Whether the reader has done something since the last call, or has nothing to do."""
        return bool(lib.sn_session_gets_on(self.handle))

    def mark(self, *, on: bool) -> bool:
        """Write-protect the sentinel page, or not; False when that can't be done now, or never more."""
        result = lib.sn_session_mark(self.handle, on)
        return bool(result == 0)

    def stats(self) -> Stats:
        """Return the counters."""
        raw = ffi.new("struct sn_stats *")
        lib.sn_session_stats(self.handle, raw)
        counters = {name: getattr(raw, name) for name in Stats.__slots__ if name != "histogram"}
        return Stats(**counters, histogram=tuple(raw.histogram))

    def counts(self) -> Counts:
        """Count pages by state: a walk over all entries."""
        raw = ffi.new("struct sn_counts *")
        lib.sn_session_counts(self.handle, raw)
        return Counts(*(getattr(raw, name) for name in Counts.__slots__))

    def regions(self) -> list[Region]:
        """Return the range table."""
        capacity = 1024
        while True:
            raw = ffi.new("struct sn_region[]", capacity)
            n = lib.sn_session_regions(self.handle, raw, capacity)
            if n <= capacity:
                return [Region(raw[i].start, raw[i].npages, raw[i].first, raw[i].aside) for i in range(n)]
            capacity = int(n) + 256

    def set_floor(self, free_bytes: int) -> None:
        """Let packing stop with ENOSPC before the store's file system has less than that free."""
        lib.sn_store_set_floor(lib.sn_session_store(self.handle), free_bytes)

    def keep_cached(self, *, keep: bool) -> None:
        """Let frames stay in the page cache when they are written, or not."""
        lib.sn_store_keep_cached(lib.sn_session_store(self.handle), keep)

    def distrust_store(self) -> None:
        """Have nothing of its store forgotten any more, and nothing more stored: the disk has refused to take it."""
        lib.sn_store_distrust(lib.sn_session_store(self.handle))

    def behind(self) -> tuple[int, int] | None:
        """Return from where to where the page cache has what `forget_cached` is to be told, or None for nothing."""
        bounds = ffi.new("uint64_t[2]")
        if not lib.sn_store_behind(lib.sn_session_store(self.handle), bounds, bounds + 1):
            return None
        return int(bounds[0]), int(bounds[1])

    def store_key(self) -> int:
        """Return a number that sessions have in common which share a store."""
        return int(ffi.cast("uintptr_t", lib.sn_session_store(self.handle)))

    def store_stats(self) -> StoreStats:
        """Return the figures of its store."""
        return _store_stats(lib.sn_session_store(self.handle))

    def take_forked(self) -> bool:
        """Whether pages may be shared with a forked child: it forked since the last call, or `set_forked` said so."""
        return bool(lib.sn_session_take_forked(self.handle))

    def set_forked(self) -> None:
        """Note that pages still are shared, or were not looked at."""
        lib.sn_session_set_forked(self.handle)

    def survey(self, *, patient: bool) -> Survey:
        """Stop the target once to see what must stay in memory; an impatient one is BUSY soon, where CPUs are."""
        raw = ffi.new("struct sn_survey_report *")
        lib.sn_survey(self.handle, patient, raw)
        threads = tuple(ThreadPlace(one.tid, one.stack, one.tls) for one in raw.threads[0 : raw.nthreads])
        return Survey(Outcome(raw.outcome), raw.cause, threads, tuple(raw.kept[0 : raw.nkept]), raw.stop_ns)

    def call(self, message: bytes) -> bytes:
        """Send one command to the agent and return its reply; OSError carries the reply's status."""
        raw = ffi.new("char[]", message.ljust(WIRE_BYTES, b"\0"))
        check(lib.sn_agent_call(self.handle, raw))
        return bytes(ffi.buffer(raw, WIRE_BYTES))

    def answers(self) -> None:
        """Return when a command may be sent; OSError (one of SILENT) while the last one has no reply."""
        check(lib.sn_session_answers(self.handle))

    def dismiss(self) -> None:
        """End the agent's threads by ptrace; for when nothing is out. OSError EPERM where that is not ours to do."""
        check(lib.sn_session_dismiss(self.handle))

    def hurry(self) -> None:
        """Wait no longer than needs be for an agent from now on: the daemon ends."""
        lib.sn_session_hurry(self.handle)

    def dumping(self) -> None:
        """A dump begins: end a replay, and make the working set of what has come back since the last one."""
        lib.sn_session_dumping(self.handle)

    def dumped(self) -> None:
        """A dump has ended: what comes back from now on is what the program wants when it resumes."""
        lib.sn_session_dumped(self.handle)

    def restore(self, start: int, end: int, *, blind: bool = False) -> int:
        """Bring all pages of [start, end) back; returns how many.

        OSError: ENOMEM no room, ESRCH gone, EACCES guard pages can't be looked for; `blind`: then they are overwritten.
        """
        pages = ffi.new("uint64_t *")
        check(lib.sn_restore(self.handle, start, end, blind, pages))
        return int(pages[0])

    def collapse(self) -> int:
        """Make huge pages of what was huge before a dump, where all of it is back; returns how many bytes.

        OSError ESRCH: gone.
        """
        size = ffi.new("uint64_t *")
        check(lib.sn_session_collapse(self.handle, size))
        return int(size[0])

    def release(self, start: int, end: int) -> None:
        """Stop watching whole mappings; OSError EBUSY while a page of them is out."""
        check(lib.sn_release(self.handle, start, end))

    def hand_out(self) -> None:
        """Let a program without an agent have what waits in a cut stop, since none of its threads can be lent."""
        check(lib.sn_session_hand_out(self.handle))

    def recover(self) -> Outcome:
        """Finish what a former daemon's mover was told and a stop that was cut; BUSY: try again."""
        return Outcome(lib.sn_session_recover(self.handle))

    def is_cut(self) -> bool:
        """Whether pages wait for `recover`."""
        return bool(lib.sn_session_is_cut(self.handle))

    def trim(self) -> None:
        """Give memory of unused page-map entries back."""
        lib.sn_page_map_trim(self.handle)


class Model:
    """A session without a target, for tests: the real page map under synthetic events."""

    REMAP, REMOVE, UNMAP = 0x14, 0x15, 0x16

    def __init__(self, store: Store) -> None:
        """Make one; its userfaultfd is an eventfd that never becomes readable."""
        self.session = Session.create(
            store, pid=0, uffd=os.eventfd(0), page_map=page_map_create(), agent_sock=-1, sentinel=0, tids=(0, 0)
        )

    def add(self, start: int, npages: int, entry: int) -> None:
        """Give pages entries: `entry`, counted up in the frame offset."""
        check(lib.sn_model_add(self.session.handle, start, npages, entry))

    def blank(self, start: int, npages: int) -> None:
        """Watch pages that were never moved."""
        check(lib.sn_model_add(self.session.handle, start, npages, (1 << 64) - 1))

    def skip(self, nentries: int) -> None:
        """Let so many entries have been given out before."""
        lib.sn_model_skip(self.session.handle, nentries)

    def event(self, event: int, a: int, b: int, c: int = 0, npages_more: int = 0) -> tuple[int, int] | None:
        """Let an event be read: REMAP(from, to, length), REMOVE(start, end), UNMAP(start, end).

        A REMAP may add `npages_more` at the end.

        Return the (start, end) that has to be vacated by an event that is to come, if there is such a one.
        """
        need = ffi.new("uint64_t[2]")
        return (
            (need[0], need[1])
            if check(lib.sn_model_event(self.session.handle, event, a, b, c, npages_more, need))
            else None
        )

    def force(self) -> bool:
        """Let the oldest event that waits go on though nobody vacates its place. Return whether one still waits."""
        return bool(lib.sn_model_force(self.session.handle))

    def end(self, *, quiet: bool) -> None:
        """End the drain: what was applied becomes current. `quiet`: no call is in flight."""
        lib.sn_model_end(self.session.handle, quiet)

    def compact(self) -> None:
        """Make room in the ring in the middle of a drain."""
        lib.sn_model_compact(self.session.handle)

    def drop(self, start: int, end: int) -> None:
        """Let the mover unmap what has no records: its UNMAP must not hit what is there by then."""
        lib.sn_model_drop(self.session.handle, start, end)

    def trouble(self, cause: int) -> None:
        """Have a notice of trouble wait."""
        lib.sn_model_trouble(self.session.handle, cause)

    def vanish(self) -> None:
        """Have the notice of the session's end wait."""
        lib.sn_model_trouble(self.session.handle, 0)

    def stand(self) -> None:
        """Come to a full stop: nothing is owed any more."""
        lib.sn_model_stand(self.session.handle)

    def entry(self, address: int) -> int | None:
        """Return the entry of an address, None when no record holds it."""
        entry = int(lib.sn_model_entry(self.session.handle, address))
        return None if entry == (1 << 64) - 1 else entry


class Headroom:
    """How much memory a process may take without being asked, for tests."""

    @staticmethod
    def of(top: str, groups: str) -> int | None:
        """Return what groups, as /proc/PID/cgroup says them, leave; `top` is what /sys is in. None: no limit."""
        left = int(lib.sn_headroom(top.encode(), groups.encode()))
        return None if left == (1 << 64) - 1 else left

    @staticmethod
    def take(pid: int, size: int) -> bool:
        """Have memory promised; False when there is not enough."""
        return int(lib.sn_headroom_take(pid, size)) == 0

    @staticmethod
    def give(size: int) -> None:
        """Give back what was promised."""
        lib.sn_headroom_give(size)


class Piece:
    """Intervals on their way to the store together: move, pack, wait, drop. Close it at the end."""

    def __init__(self, session: Session, intervals: Sequence[tuple[int, int]], hint: int) -> None:
        """Prepare (start, end) pairs, at most MAX_SPANS, each inside one mapping; `hint` is the middle of a wide hole.

        MemoryError when too many pieces are on their way.
        """
        flat = [address for pair in intervals for address in pair]
        self._spans = len(intervals)
        self.handle = lib.sn_piece_create(session.handle, flat, len(intervals), hint)
        if not self.handle:
            raise MemoryError

    def move(self, *, patient: bool) -> PieceReport:
        """Stop the target, move the intervals aside, look, pin pass, let it go on.

        An impatient one is BUSY soon, where the target's threads do not get a CPU to stand on.
        """
        raw = ffi.new("struct sn_piece_report *")
        lib.sn_piece_move(self.handle, patient, raw)
        special = {"outcome", "outcomes", "causes"}
        values = {name: getattr(raw, name) for name in PieceReport.__slots__ if name not in special}
        return PieceReport(
            outcome=Outcome(raw.outcome),
            outcomes=tuple(Outcome(raw.outcomes[i]) for i in range(self._spans)),
            causes=tuple(raw.causes[i] for i in range(self._spans)),
            **values,
        )

    def keep(self) -> None:
        """Before the move: note what the stop finds, for a snapshot. MemoryError."""
        if lib.sn_piece_keep(self.handle):
            raise MemoryError

    def pack(self, level: int) -> None:
        """Queue the pages for the packing threads."""
        check(lib.sn_piece_pack(self.handle, level))

    def wait(self) -> PackReport:
        """Wait until the packing threads are through."""
        raw = ffi.new("struct sn_pack_report *")
        lib.sn_piece_wait(self.handle, raw)
        return PackReport(*(getattr(raw, name) for name in PackReport.__slots__))

    def give_back(self) -> None:
        """After a failed store: return what is still aside to the target. OSError EAGAIN: some must wait aside."""
        check(lib.sn_piece_return(self.handle))

    def drop(self, slice_bytes: int, breath_us: int) -> None:
        """Unmap the staging. OSError EBUSY while a page has no other home."""
        check(lib.sn_piece_drop(self.handle, slice_bytes, breath_us))

    def close(self) -> None:
        """Forget the piece."""
        handle, self.handle = self.handle, None
        if handle:
            lib.sn_piece_free(handle)


class Keep:
    """What a dump saw of each page, with references to the frames. Close it when they are copied, or not wanted."""

    def __init__(self, session: Session) -> None:
        """Take what is out now; MemoryError."""
        self._handle = lib.sn_keep_create(session.handle)
        if not self._handle:
            raise MemoryError

    def take(self, piece: Piece) -> None:
        """Take what was kept of a piece that is packed."""
        check(lib.sn_keep_take(self._handle, piece.handle))

    def parts(self) -> list[Part]:
        """Return the pages by the time at which they were seen: where parts overlap, the later one counts."""
        n = int(lib.sn_keep_parts(self._handle, ffi.NULL, 0))
        raw = ffi.new("struct sn_part[]", n)
        lib.sn_keep_parts(self._handle, raw, n)
        return [Part(raw[i].start, raw[i].npages, PartKind(raw[i].reason)) for i in range(n)]

    def copy_to(self, fd: int, store_id: bytes, offset: int) -> Copy:
        """Begin to copy frames into another store, from `offset` on."""
        return Copy(lib.sn_copy_create(self._handle, fd, store_id, offset))

    def close(self) -> None:
        """Let the frames go."""
        handle, self._handle = self._handle, None
        if handle:
            lib.sn_keep_free(handle)


class Copy:
    """Frames on their way into another store; a context manager."""

    def __init__(self, handle: Any) -> None:
        """Wrap a handle; MemoryError for none."""
        if not handle:
            raise MemoryError
        self._handle = handle

    def part(self, part: int, skip: int, npages: int) -> bytes:
        """Copy pages of a part; returns their entries, which name the new frames. OSError as writing gives it."""
        entries = ffi.new("uint64_t[]", npages)
        check(lib.sn_copy_part(self._handle, part, skip, npages, entries))
        return bytes(ffi.buffer(entries))

    def finish(self) -> int:
        """Write what is left; returns where the frames end."""
        end = ffi.new("uint64_t *")
        check(lib.sn_copy_finish(self._handle, end))
        return int(end[0])

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Forget it."""
        lib.sn_copy_free(self._handle)


class FormerPiece(Piece):
    """What a former daemon had moved and not yet dropped: pack, wait, drop."""

    def __init__(self, handle: Any) -> None:
        """Wrap what `former_pieces` found."""
        self._spans, self.handle = 0, handle


def former_pieces(session: Session) -> Iterator[FormerPiece]:
    """Yield the pieces that a former daemon had on their way."""
    for slot in range(SLOTS):
        if handle := lib.sn_piece_adopt(session.handle, slot):
            yield FormerPiece(handle)


def bench_codec(pages: bytes, level: int, threads: int) -> tuple[float, float, int]:
    """Return the seconds to compress and to decompress `pages` on `threads` threads, and the bytes of their frames."""
    compress, decompress, size = ffi.new("uint64_t *"), ffi.new("uint64_t *"), ffi.new("uint64_t *")
    data = ffi.from_buffer(pages)
    check(lib.sn_bench_codec(data, len(pages) // 4096, level, threads, compress, decompress, size))
    return compress[0] / 1e9, decompress[0] / 1e9, int(size[0])
