"""How a program's threads are scheduled: policy, nice value, whether children start anew, timer slack.

Knows the kernel's structure, and nothing of what a test is about.
"""

import ctypes
import os
import struct
from pathlib import Path
from typing import Final, NamedTuple

_SETATTR: Final = 314
_GETATTR: Final = 315
_ATTR: Final = struct.Struct("IIQiIQQQ")
_POLICIES: Final = {"other": os.SCHED_OTHER, "batch": os.SCHED_BATCH, "idle": os.SCHED_IDLE, "rr": os.SCHED_RR}
_RESET_ON_FORK: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Scheduling(NamedTuple):
    """Of one thread."""

    policy: int
    flags: int
    nice: int
    priority: int
    slice_ns: int
    slack_ns: int


def scheduling(pid: int) -> dict[int, Scheduling]:
    """Return how each thread of a process is scheduled, by its id."""
    return {int(one.name): _of_thread(int(one.name)) for one in Path(f"/proc/{pid}/task").iterdir()}


def _of_thread(tid: int) -> Scheduling:
    room = ctypes.create_string_buffer(_ATTR.size)
    _check(_libc.syscall(_GETATTR, tid, room, _ATTR.size, 0))
    _, policy, flags, nice, priority, slice_ns, _, _ = _ATTR.unpack(room.raw)
    return Scheduling(policy, flags, nice, priority, slice_ns, int(Path(f"/proc/{tid}/timerslack_ns").read_text()))


def give(
    tid: int,
    *,
    policy: str = "other",
    nice: int = 0,
    priority: int = 0,
    slice_ns: int = 0,
    slack_ns: int = 0,
    reset_on_fork: bool = False,
) -> None:
    """Have a thread scheduled so; 0 is what is usual."""
    flags = _RESET_ON_FORK if reset_on_fork else 0
    raw = _ATTR.pack(_ATTR.size, _POLICIES[policy], flags, nice, priority, slice_ns, 0, 0)
    _check(_libc.syscall(_SETATTR, tid, raw, 0))
    if slack_ns:
        Path(f"/proc/{tid}/timerslack_ns").write_text(str(slack_ns))


def _check(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
