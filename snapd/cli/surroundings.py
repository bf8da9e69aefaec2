"""What surrounds a program that is about to be started: whether the agent can work there.

Owns limits and inherited seccomp filters, which hold for this process as they will for the program. What a filter does
is tried, since nobody can read it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Final

FILES: Final = 8
"""Descriptors that the agent has at most: two connections, the session's three, and what a message brings."""

_MAYMOVE_DONTUNMAP: Final = 5
_UNIX_SEQPACKET: Final = (1, 5, 0)
_NOBODY: Final = -1
_PAGE: Final = 4096

# Each of the agent's calls, with its number on x86-64, in a form that changes nothing: the kernel finds the arguments
# wrong, a filter does not come to look at them. `exit` is what every program calls.
CALLS: Final[dict[str, tuple[int, ...]]] = {
    "capset": (126, 0, 0),
    "chdir": (80, 0),
    "clock_gettime": (228, 1, 0),
    "clone": (56, 0x10000),  # CLONE_THREAD without what it needs
    "close": (3, _NOBODY),
    "close_range": (436, 1, 0, 2),
    "connect": (42, _NOBODY, 0, 0),
    "futex": (202, 1, 129, 0),
    "getpid": (39,),
    "getsockopt": (55, _NOBODY, 1, 17, 0, 0),
    "gettid": (186,),
    "ioctl": (16, _NOBODY, 0xAA00, 0),
    "madvise": (28, 1, _PAGE, 4),
    "mmap": (9, 0, 0, 3, 0x22, _NOBODY, 0),
    "mprotect": (10, 1, _PAGE, 3),
    "mremap": (25, 1, _PAGE, _PAGE, _MAYMOVE_DONTUNMAP, 0),
    "munmap": (11, 1, _PAGE),
    "nanosleep": (35, 0, 0),
    "pidfd_getfd": (438, _NOBODY, 0, 0),
    "pidfd_open": (434, 0, 0),
    "ppoll": (271, 0, 0xFFFFFFFF, 0, 0, 8),
    "prctl": (157, _NOBODY),
    "recvmsg": (47, _NOBODY, 0, 0),
    "rt_sigprocmask": (14, 0, 0, 0, 8),
    "sendmsg": (46, _NOBODY, 0, 0),
    "shutdown": (48, _NOBODY, 2),
    "socket": (41, *_UNIX_SEQPACKET),
    "tgkill": (234, _NOBODY, _NOBODY, 0),
    "write": (1, _NOBODY, 0, 0),
}


def obstacle() -> str | None:
    """Return why the agent could not work in a program that is started from here, or None when nothing is seen."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit != resource.RLIM_INFINITY and limit < FILES:
        return f"it may open {limit} files only and the agent needs {FILES}"
    if not _is_filtered():
        return None
    call = _forbidden_call()
    return None if call is None else f"a seccomp filter forbids {call}, which the agent needs"


def _is_filtered() -> bool:
    try:
        return "\nSeccomp:\t2\n" in Path("/proc/self/status").read_text()
    except OSError:
        return False


def _forbidden_call() -> str | None:
    """Try every call in a child, which a filter may kill; return the first that is refused, or None."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            _try_calls(writing)
        finally:
            os._exit(0)
    os.close(writing)
    said = b""
    while data := os.read(reading, 4096):
        said += data
    os.close(reading)
    os.waitpid(child, 0)
    *_, last = said.decode().split("\n")
    return last or None


def _try_calls(writing: int) -> None:
    """Write each call's name before it, and a line end behind what was not refused; end at the first that was."""
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    for name, words in CALLS.items():
        os.write(writing, name.encode())
        ctypes.set_errno(0)
        if syscall(*map(ctypes.c_long, words)) < 0 and ctypes.get_errno() in (errno.EPERM, errno.EACCES, errno.ENOSYS):
            return
        os.write(writing, b"\n")
