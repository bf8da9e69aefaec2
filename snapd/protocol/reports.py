"""The figures that the daemon hands out, as frozen dataclasses, and their JSON form.

Owns names and units; the interface file says the same in Varlink's words, and a test compares the two.
Knows nothing of sockets or of how a figure came to be. Sizes are bytes, `_s` seconds, `_us` microseconds.
"""

from __future__ import annotations

import types
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Self, Union, cast, get_args, get_origin, get_type_hints

from snapd.errors import ProtocolError


class Report:
    """What all reports can do: become JSON and come back from it."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary of JSON types only, one key a field."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(cast("Any", self))}

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Return the report that `to_json` described; raises ProtocolError when a key is missing or of a wrong type.

        Keys that this version does not know are left out, so that an older client reads a newer daemon.
        """
        if not isinstance(data, dict):
            raise ProtocolError(f"a {cls.__name__} was expected and something else came")
        values = {}
        hints = get_type_hints(cls)
        for item in fields(cast("type[Any]", cls)):
            where = f"{cls.__name__}.{item.name}"
            hint = hints[item.name]
            if item.name in data or _optional(hint):
                values[item.name] = _typed(hint, data.get(item.name), where)
            else:
                raise ProtocolError(f"{where} is missing")
        return cls(**values)


def _optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def _plain(value: Any) -> Any:
    if isinstance(value, Report):
        return value.to_json()
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return dict(value) if isinstance(value, dict) else value


def _typed(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if _optional(hint):
        return None if value is None else _typed(next(one for one in args if one is not types.NoneType), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(args[0], one, f"{where}[]") for one in value)
    if origin is dict and isinstance(value, dict):
        return {key: _typed(args[1], one, f"{where}[{key}]") for key, one in value.items()}
    if is_dataclass(hint) and isinstance(hint, type) and issubclass(hint, Report):
        return hint.from_json(value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ProtocolError(f"{where} has the wrong type")
    return value


@dataclass(frozen=True, slots=True)
class DumpProgress(Report):
    """How far a dump or a restore has come."""

    pid: int
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class DumpReport(Report):
    """What one dump did.

    `moved_bytes` went aside and did not return at once; of these `stored_bytes` is what their new frames take in
    the store, `zero_bytes` were all zero, and `clean_bytes` kept the frames that they had. `freed_bytes` is what
    the target's resident memory lost, `pinned_bytes` what the kernel held on to. `skipped_bytes` were looked at
    and left alone, and `skipped` has them by reason. A stop is a pause of the target; its times are microseconds.
    `snapshot` is the file of a dump that was kept, and `snapshot_bytes` its size.
    """

    pid: int
    moved_bytes: int
    stored_bytes: int
    zero_bytes: int
    clean_bytes: int
    skipped_bytes: int
    freed_bytes: int
    pinned_bytes: int
    duration_s: float
    stops: int
    longest_stop_us: int
    sum_stop_us: int
    pieces_put_off: int
    skipped: dict[str, int] = field(default_factory=dict, hash=False)
    snapshot: str | None = None
    snapshot_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class RestoreReport(Report):
    """What one restore brought back."""

    pid: int
    restored_bytes: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Refusal(Report):
    """A process of a tree that was not attached, and why: one sentence."""

    pid: int
    reason: str


@dataclass(frozen=True, slots=True)
class AttachReport(Report):
    """Which processes are managed now, and which of a tree are not."""

    attached: tuple[int, ...]
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True)
class DaemonInfo(Report):
    """The daemon itself; `keeper_pid` is None when it has no understudy.

    `unserved_s` is how long targets were without a daemon before this one took them over; None when it took over
    none, or when nobody knows.
    """

    pid: int
    keeper_pid: int | None
    version: str
    unserved_s: float | None = None


@dataclass(frozen=True, slots=True)
class HandOver(Report):
    """Who is about to hand everything over, and to which version."""

    pid: int
    version: str
    next_version: str


@dataclass(frozen=True, slots=True)
class UpgradeReport(Report):
    """Who was replaced by whom, and for how long targets were without a daemon; None when nobody knows."""

    pid: int
    version: str
    next_pid: int
    next_version: str
    unserved_s: float | None


@dataclass(frozen=True, slots=True)
class SessionInfo(Report):
    """One target.

    `resident_bytes` is in memory, `swapped_bytes` is out of it, `stored_bytes` is what that takes in the store.
    `fault_p50_us` and `fault_p99_us` are None until a fault was answered. `bad_pages` could not be read back.
    `parent` is the pid of the session that this process was forked from, or None.
    """

    pid: int
    uid: int
    comm: str
    state: str
    resident_bytes: int
    swapped_bytes: int
    stored_bytes: int
    faults: int
    fault_p50_us: float | None
    fault_p99_us: float | None
    bad_pages: int
    parent: int | None


@dataclass(frozen=True, slots=True)
class Totals(Report):
    """What the daemon did for sessions since it began, those that have ended included.

    `faults` were answered with zeros, from a page that was aside, or from the store; `retries` is how often an answer
    had to wait for an event. `forks`, `removes`, `remaps` and `unmaps` are events of the programs' own doing. `replays`
    are resumes at which the working set or all that was out was brought unasked, `replayed` its pages; `replay_hits`
    and `replay_misses` are those that were held back to see whether they are asked for, and were or not.
    """

    sessions: int = 0
    faults: int = 0
    filled_zero: int = 0
    filled_aside: int = 0
    filled_stored: int = 0
    retries: int = 0
    bad_pages: int = 0
    forks: int = 0
    removes: int = 0
    remaps: int = 0
    unmaps: int = 0
    replays: int = 0
    replayed: int = 0
    replay_hits: int = 0
    replay_misses: int = 0

    def plus(self, *others: Totals) -> Totals:
        """Return the sum."""
        return Totals(**{item.name: sum(getattr(one, item.name) for one in (self, *others)) for item in fields(Totals)})


@dataclass(frozen=True, slots=True)
class StatusReport(Report):
    """The daemon, the sessions that the caller may see, and what all such sessions came to since the daemon began."""

    daemon: DaemonInfo
    sessions: tuple[SessionInfo, ...]
    totals: Totals = Totals()
