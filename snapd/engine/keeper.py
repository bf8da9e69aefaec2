"""The keeper, the registry of what the next daemon needs, and the page maps that a former one has left.

Owns the names of descriptors that are handed over. Knows nothing of how a daemon finds them, nor what it makes of them.
"""

from __future__ import annotations

import enum
import errno
import os
import select
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from snapd import engine
from snapd.engine._engine import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Letter(enum.StrEnum):
    """What a descriptor that is handed over is: `enum keeper_letter`."""

    USERFAULTFD = "u"
    PAGE_MAP = "m"
    STORE = "s"
    FORK = "f"
    REGISTRY = "r"
    WATCHED = "k"
    OTHER = "o"


class Ending(enum.IntEnum):
    """Why a daemon ends: `enum keeper_ending`."""

    NONE = 0
    STOP = 1
    UPGRADE = 2


PHASES: Final = ("idle", "move", "pin", "store", "drop", "cut")
"""How far a span of a piece is: `enum phase`."""


@dataclass(frozen=True, slots=True)
class PageMapInfo:
    """What the header of a page map says of its session; numbers are the registry's, 0 is nobody's.

    `phases` has the spans that are on their way, `events` is how many were read and not applied (16 at most).
    """

    pid: int
    uid: int
    number: int
    store_number: int
    parent: int
    source: int
    flags: int
    born: int
    sentinel: int
    store_id: bytes
    phases: dict[str, int]
    events: int


def open_registry(fd: int = -1) -> int:
    """Make a registry, or go on with a former daemon's; returns its descriptor. OSError EPROTO: it is none of ours."""
    return engine.check(lib.sn_keeper_open(fd))


def start(path: str, argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Make a keeper that executes `path` when this process dies; returns its pid. It replaces a former one."""
    words = [ffi.new("char[]", word.encode(errors="surrogateescape")) for word in argv]
    values = [
        ffi.new("char[]", f"{name}={value}".encode(errors="surrogateescape"))
        for name, value in environ.items()
        if not name.startswith("LISTEN_")
    ]
    program = ffi.new("char[]", path.encode(errors="surrogateescape"))
    return engine.check(
        lib.sn_keeper_start(program, ffi.new("char *[]", [*words, ffi.NULL]), ffi.new("char *[]", [*values, ffi.NULL]))
    )


def pid() -> int | None:
    """Return the keeper's pid, or None without one."""
    return max(0, lib.sn_keeper_pid()) or None


def formats() -> dict[str, str]:
    """Return what a successor must be able to read, by name: the registry and the page maps of this version."""
    registry, page_map, version = ffi.new("char[8]"), ffi.new("char[8]"), ffi.new("uint32_t *")
    lib.sn_keeper_format(registry)
    lib.sn_page_map_format(page_map, version)
    names = (bytes(ffi.buffer(one)).decode() for one in (registry, page_map))
    return dict(zip(("registry", "page map"), (next(names), f"{next(names)}.{version[0]}"), strict=True))


def lives() -> bool:
    """Whether there is a keeper that would take over if this process died now."""
    try:
        fd = os.pidfd_open(pid() or 0)
    except OSError:
        return False
    try:
        return not select.select([fd], [], [], 0)[0]
    finally:
        os.close(fd)


def hand_over(letter: Letter, number: int, fd: int) -> None:
    """Have a descriptor handed over to the next daemon; OSError ENOSPC."""
    engine.check(lib.sn_hand_over(ord(letter), number, fd))


def withhold(letter: Letter, number: int) -> None:
    """Forget a descriptor before it is closed."""
    lib.sn_withhold(ord(letter), number)


def handed_over() -> set[tuple[Letter, int]]:
    """Return the names of all descriptors that the next daemon would get."""
    room = 1024
    while True:
        raw = ffi.new("uint32_t[]", 2 * room)
        found = lib.sn_handed_over(raw, room)
        if found <= room:
            return {(Letter(chr(raw[2 * i])), int(raw[2 * i + 1])) for i in range(found)}
        room = 2 * found


def duplicate(letter: Letter, number: int) -> int:
    """Return a new descriptor of what is handed over by this name; OSError ENOENT when it is no longer."""
    return engine.check(lib.sn_duplicate(ord(letter), number))


def numbers_from(last: int) -> None:
    """Give out no number up to `last`: descriptors that were kept by somebody else have them."""
    lib.sn_keeper_numbers_from(last)


def ending(why: Ending) -> None:
    """Tell the keeper why this process is about to end."""
    lib.sn_keeper_ending(why)


def serving() -> float | None:
    """Say that targets are served from now on; returns for how many seconds they were not, or None."""
    return (lib.sn_keeper_serving() / 1e9) or None


def same_file(fd: int, other: int) -> bool:
    """Whether two descriptors are of one open file."""
    return bool(lib.sn_same_file(fd, other) == 1)


def look(page_map: int) -> PageMapInfo:
    """Return what a page map's header says; DamagedPageMapError when it is none, or a file that could change its size.

    Raises OSError.
    """
    raw = ffi.new("struct sn_page_map_info *")
    error = lib.sn_page_map_look(page_map, raw)
    if error == -errno.EPROTO:
        raise DamagedPageMapError("it is none that this version can trust")
    engine.check(error)
    values = {name: getattr(raw, name) for name in PageMapInfo.__slots__ if name not in ("store_id", "phases")}
    phases = {name: count for name, count in zip(PHASES, raw.phases, strict=True) if count and name != PHASES[0]}
    return PageMapInfo(**values, store_id=bytes(ffi.buffer(raw.store_id)), phases=phases)


def renumber(page_map: int) -> None:
    """Let the page map have a new number: its own is another registry's."""
    engine.check(lib.sn_page_map_renumber(page_map))


class DamagedPageMapError(Exception):
    """A page map that can't be believed; says what is wrong with it."""


def adopt(info: PageMapInfo, store: engine.Store, store_bytes: int, *, uffd: int, page_map: int) -> engine.Session:
    """Make a session of a former daemon's; takes the descriptors over, and then waits for `resume`.

    Raises DamagedPageMapError, and OSError; then takes none.
    """
    target = ffi.new("struct sn_target *")
    target.pid, target.uffd, target.page_map, target.agent_sock = info.pid, uffd, page_map, -1
    target.sentinel = info.sentinel
    error, what = ffi.new("int *"), ffi.new("const char **")
    handle = lib.sn_session_adopt(target, store.handle, store_bytes, error, what)
    if handle:
        return engine.Session(handle)
    if what[0] != ffi.NULL:
        raise DamagedPageMapError(ffi.string(what[0]).decode())
    engine.check(error[0])
    raise MemoryError


def depend(session: engine.Session, source: engine.Session) -> None:
    """Pages that the child `session` does not have yet are in the staging of `source`."""
    lib.sn_session_depend(session.handle, source.handle)


def resume(session: engine.Session) -> None:
    """Serve it."""
    engine.check(lib.sn_session_resume(session.handle))
