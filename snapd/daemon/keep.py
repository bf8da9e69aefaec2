"""Keeping a dump: which pages a snapshot holds and why not the others, and how its file comes to be.

Owns the names of snapshots, the order in which a file is written, made durable and named, and who gets it. The engine
copies the frames; the bytes of the footer are store/snapshot.py's.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import platform
import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from snapd import __version__
from snapd.daemon import policy, procfs
from snapd.engine import PartKind
from snapd.errors import DirectoryUnusable, NotPermitted, SnapshotExists
from snapd.pages import PAGE, Range, merge, subtract_all
from snapd.store import snapshot
from snapd.store.format import HEADER_BYTES, STORE_ID_BYTES, StoreHeader
from snapd.store.snapshot import SavedRange
from snapd.store.writer import MODE as FILE_MODE
from snapd.store.writer import NO_TMPFILE, meaning, write_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from snapd import engine
    from snapd.daemon.procfs import Mapping
    from snapd.daemon.room import MinFree

DIRECTORY: Final = "snapshots"
SUFFIX: Final = ".snapd"
DIRECTORY_MODE: Final = 0o711
OWN_MODE: Final = 0o700
COPY_PAGES: Final = 16384
PARTIAL: Final = ".partial-"

_UNHELD: Final = {PartKind.PINNED: "pinned", PartKind.ASIDE: "failed"}


@dataclass(frozen=True, slots=True)
class Wish:
    """What a caller asked for: the name of the snapshot, and whose file it becomes."""

    name: str
    uid: int
    gid: int


def wish_for(name: str, peer_uid: int, peer_gid: int, pid: int) -> Wish:
    """Return the wish of a caller for a process.

    NotPermitted when the kernel would not let the caller read the memory of the process: its files in /proc are
    root's then, and so a file with its memory may not become the caller's.
    """
    try:
        owner = Path(f"/proc/{pid}/mem").stat().st_uid
    except OSError:
        owner = -1
    if peer_uid not in (0, owner):
        raise NotPermitted(pid, peer_uid)
    return Wish(name, peer_uid, peer_gid)


@dataclass(frozen=True, slots=True)
class Held:
    """Pages in a row whose content is known: `skip` pages into a part of the engine's."""

    pages: Range
    part: int
    skip: int


def overlay(parts: Sequence[tuple[Range, int]]) -> list[Held]:
    """Return the parts in order of addresses, each page once: where parts overlap, the later one counts."""
    starts: list[int] = []
    found: list[Held] = []
    for whole, number in reversed(parts):
        at = bisect.bisect_right(starts, whole.start)
        at -= at > 0 and found[at - 1].pages.end > whole.start
        upto = bisect.bisect_left(starts, whole.end)
        pieces = subtract_all([whole], [one.pages for one in found[at:upto]])
        for piece in pieces:
            where = bisect.bisect_left(starts, piece.start)
            starts.insert(where, piece.start)
            found.insert(where, Held(piece, number, (piece.start - whole.start) // PAGE))
    return found


@dataclass(frozen=True, slots=True)
class Looked:
    """What a dump found when it chose: all mappings, what of them it went through, and what it did not."""

    mappings: tuple[Mapping, ...]
    chosen: tuple[Range, ...]
    stacks: tuple[Range, ...]
    own: tuple[Range, ...]
    maps: tuple[str, ...]


def unheld(held: Sequence[Range], looked: Looked, left: Iterable[tuple[Range, str]]) -> list[SavedRange]:
    """Return what of all mappings is not held, each page with one reason; the more particular reason counts."""
    groups: list[tuple[str, list[Range]]] = []
    by_reason: dict[str, list[Range]] = {}
    for pages, reason in left:
        by_reason.setdefault(reason, []).append(pages)
    groups += by_reason.items()
    by_reason = {}
    everything = []
    for one in looked.mappings:
        pages = Range(one.start, max(one.start, one.end))
        everything.append(pages)
        if reason_to_stay := policy.reason_to_stay(one):
            by_reason.setdefault(reason_to_stay, []).append(pages)
    groups += [("agent", list(looked.own)), *by_reason.items(), ("no_memory", list(looked.chosen))]
    groups += [("stack", list(looked.stacks)), ("small", everything)]
    mapped = merge(everything)
    taken = merge(held)
    rows: list[SavedRange] = []
    for reason, ranges in groups:
        inside = subtract_all(mapped, subtract_all(mapped, merge(ranges)))
        free = subtract_all(inside, taken)
        rows += [SavedRange(pages, held=False, reason=reason) for pages in free]
        taken = merge([*taken, *free])
    return rows


def facts_of(pid: int, uid: int, looked: Looked) -> dict[str, Any]:
    """Return what a snapshot says of its process; what is not known is left out."""
    status = procfs.status(pid)
    facts: dict[str, Any] = {"pid": pid, "uid": uid, "comm": status.get("Name", "?"), "maps": list(looked.maps)}
    with contextlib.suppress(OSError):
        facts["cmdline"] = [os.fsdecode(one) for one in _read(pid, "cmdline").split(b"\0")[:-1]]
        facts["exe"] = str(Path(f"/proc/{pid}/exe").readlink())
        facts["start_ticks"] = int(_read(pid, "stat").rpartition(b")")[2].split()[19])
        facts["threads"] = int(status.get("Threads", "0"))
    with contextlib.suppress(OSError):
        facts["boot_id"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {**facts, "kernel": platform.release(), "machine": platform.machine(), "snapd": __version__}


def _read(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()


class Keeping:
    """One snapshot on its way: nothing has a name before the file is whole and on the disk."""

    def __init__(self, state_dir: Path, wish: Wish, room: MinFree) -> None:
        """Look whether the name is free: SnapshotExists, DirectoryUnusable."""
        self._wish = wish
        self._room = room
        self._state_dir = state_dir
        self._directory = state_dir / DIRECTORY / str(wish.uid)
        self.path = self._directory / f"{wish.name}{SUFFIX}"
        self._make_directory()
        if os.path.lexists(self.path):
            raise SnapshotExists(wish.name)

    def _make_directory(self) -> None:
        try:
            with contextlib.suppress(FileExistsError):
                self._directory.parent.mkdir(DIRECTORY_MODE)
                self._directory.parent.chmod(DIRECTORY_MODE)
            with contextlib.suppress(FileExistsError):
                self._directory.mkdir(OWN_MODE)
                if os.geteuid() != self._wish.uid:
                    os.chown(self._directory, self._wish.uid, self._wish.gid)
        except OSError as error:
            raise DirectoryUnusable(str(self._directory), error.strerror or str(error)) from error

    def write(self, keep: engine.Keep, looked: Looked, left: list[tuple[Range, str]], facts: dict[str, Any]) -> int:
        """Write, make durable and name the file; returns its bytes.

        Raises SnapshotExists, StoreFull, StoreFailed or DirectoryUnusable; then there is no file.
        """
        with contextlib.ExitStack() as undo:
            try:
                directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                undo.callback(os.close, directory)
                fd, partial = _open_without_name(directory)
                undo.callback(os.close, fd)
                if partial:
                    undo.callback(_unlink_quietly, partial, directory)
                size = self._fill(fd, keep, looked, left, facts)
                if os.geteuid() != self._wish.uid:
                    os.fchown(fd, self._wish.uid, self._wish.gid)
                os.fsync(fd)
                self._name(fd, partial, directory)
            except OSError as error:
                raise meaning(error, str(self._state_dir)) from error
        return size

    def _fill(
        self, fd: int, keep: engine.Keep, looked: Looked, left: list[tuple[Range, str]], facts: dict[str, Any]
    ) -> int:
        header = StoreHeader(secrets.token_bytes(STORE_ID_BYTES), time.time_ns())
        parts = keep.parts()
        held = overlay([(Range(one.start, one.start + one.npages * PAGE), i) for i, one in enumerate(parts)])
        rows: list[SavedRange] = []
        entries = bytearray()
        first = 0
        with keep.copy_to(fd, header.store_id, HEADER_BYTES) as copy:
            for one in held:
                if parts[one.part].kind is not PartKind.HELD:
                    left = [(one.pages, _UNHELD[parts[one.part].kind]), *left]
                    continue
                for skip in range(0, one.pages.npages, COPY_PAGES):
                    self._room.check(self._state_dir)
                    entries += copy.part(one.part, one.skip + skip, min(COPY_PAGES, one.pages.npages - skip))
                if rows and rows[-1].pages.end == one.pages.start:
                    rows[-1] = replace(rows[-1], pages=Range(rows[-1].pages.start, one.pages.end))
                else:
                    rows.append(SavedRange(one.pages, held=True, first=first))
                first += one.pages.npages
            end = copy.finish()
        rows = sorted([*rows, *unheld([one.pages for one in rows], looked, left)], key=lambda one: one.pages)
        footer = snapshot.pack_footer(rows, bytes(entries), facts, time.time_ns())
        length = sum(map(len, footer))
        self._room.check(self._state_dir)
        write_all(fd, b"".join(footer), end)
        # Last: until here the file does not even begin as a store does.
        digest = snapshot.digest_of(footer)
        write_all(fd, replace(header, footer_offset=end, footer_bytes=length, footer_digest=digest).pack(), 0)
        return end + length

    def _name(self, fd: int, partial: str, directory: int) -> None:
        """Give the whole file its name, and see the name to the disk."""
        try:
            if partial:
                os.link(partial, self.path.name, src_dir_fd=directory, dst_dir_fd=directory)
            else:
                # By /proc: an empty path would take a privilege that a user's own daemon lacks.
                os.link(f"/proc/self/fd/{fd}", self.path.name, dst_dir_fd=directory, follow_symlinks=True)
        except FileExistsError:
            raise SnapshotExists(self._wish.name) from None
        os.fsync(directory)


def _open_without_name(directory: int) -> tuple[int, str]:
    """Return a new file that a crash removes, mode 0600; where the file system cannot, one with a name for now."""
    flags = os.O_RDWR | os.O_CLOEXEC
    partial = ""
    try:
        fd = os.open(".", os.O_TMPFILE | flags, FILE_MODE, dir_fd=directory)
    except OSError as error:
        if error.errno not in NO_TMPFILE:
            raise
        partial = f"{PARTIAL}{secrets.token_hex(8)}"
        fd = os.open(partial, os.O_CREAT | os.O_EXCL | flags, FILE_MODE, dir_fd=directory)
    os.fchmod(fd, FILE_MODE)  # whatever the umask took away
    return fd, partial


def _unlink_quietly(name: str, directory: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=directory)


def sweep(state_dir: Path) -> None:
    """At a daemon's start: remove what a crash left unfinished where files have to have names."""
    for path in (state_dir / DIRECTORY).glob(f"*/{PARTIAL}*"):
        with contextlib.suppress(OSError):
            path.unlink()
