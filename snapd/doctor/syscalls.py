"""The system calls that the probes make, most of them on this very process: one wrapper each.

Owns numbers and layouts (the same as in snapd/agent/uapi.h, a test compares them) and turns -1 into OSError. Knows
nothing of checks. A wrapper leaves nothing behind: no mapping, no descriptor, no process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE: Final = mmap.PAGESIZE

# Calls that libc has no wrapper for, by their numbers on x86-64.
_NR_KCMP: Final = 312
_NR_USERFAULTFD: Final = 323

UFFD_API: Final = 0xAA
UFFD_USER_MODE_ONLY: Final = 1
USERFAULTFD_IOC_NEW: Final = 0xAA00
UFFDIO_API: Final = 0xC018AA3F
PAGEMAP_SCAN: Final = 0xC0606610
PROCMAP_QUERY: Final = 0xC0686611
PAGE_IS_PRESENT: Final = 1 << 3
PAGE_IS_GUARD: Final = 1 << 8
PROCMAP_COVERING_OR_NEXT: Final = 0x10
MADV_GUARD_INSTALL: Final = 102
MREMAP_MAYMOVE: Final = 1
MREMAP_DONTUNMAP: Final = 4

FEATURES: Final = {
    "PAGEFAULT_FLAG_WP": 1 << 0,
    "EVENT_FORK": 1 << 1,
    "EVENT_REMAP": 1 << 2,
    "EVENT_REMOVE": 1 << 3,
    "EVENT_UNMAP": 1 << 6,
    "WP_UNPOPULATED": 1 << 13,
    "POISON": 1 << 14,
    "WP_ASYNC": 1 << 15,
    "MOVE": 1 << 16,
}

_UFFDIO_API: Final = struct.Struct("=3Q")  # api, features, ioctls
_PM_SCAN: Final = struct.Struct("=12Q")
_PAGE_REGION: Final = struct.Struct("=3Q")  # start, end, categories
_PROCMAP_QUERY: Final = struct.Struct("=9Q4I2Q")

_KCMP_VM: Final = 1
_SO_PEERPIDFD: Final = 77
_WALL: Final = 0x40000000
_PTRACE_DETACH: Final = 17
_PTRACE_SEIZE: Final = 0x4206
_PTRACE_INTERRUPT: Final = 0x4207
_FALLOC_KEEP_SIZE: Final = 1
_FALLOC_PUNCH_HOLE: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("syscall", "ptrace"):
    getattr(_libc, _name).restype = ctypes.c_long
_libc.mremap.restype = ctypes.c_void_p


def _checked(result: int | None) -> int:
    if result is None or ctypes.c_long(result).value == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _long(*values: int) -> tuple[ctypes.c_long, ...]:
    return tuple(map(ctypes.c_long, values))


@contextlib.contextmanager
def memory() -> Iterator[tuple[mmap.mmap, int]]:
    """Yield one page of private anonymous memory and its address."""
    area = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = ctypes.c_char.from_buffer(area)
    try:
        yield area, ctypes.addressof(view)
    finally:
        del view
        area.close()


@contextlib.contextmanager
def child() -> Iterator[int]:
    """Yield the pid of a child with the same memory that only waits; it ends with the context, or with us."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(writing)
            os.read(reading, 1)
        finally:
            os._exit(0)
    os.close(reading)
    try:
        yield pid
    finally:
        os.close(writing)
        os.waitpid(pid, _WALL)


def userfaultfd() -> int:
    """Return a new userfaultfd for faults from user mode alone, which any user may have; good for questions only."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK | UFFD_USER_MODE_ONLY
    return _checked(_libc.syscall(*_long(_NR_USERFAULTFD, flags)))


def userfaultfd_by_device(device: str) -> int:
    """Return a new userfaultfd as the daemon makes one, through `device`."""
    fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(fd, USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(fd)


def uffd_api(uffd: int, features: int) -> int:
    """Ask a new userfaultfd for `features`; returns all that the kernel offers. Once a descriptor."""
    argument = bytearray(_UFFDIO_API.pack(UFFD_API, features, 0))
    fcntl.ioctl(uffd, UFFDIO_API, argument)
    offered: int = _UFFDIO_API.unpack(argument)[1]
    return offered


def move_aside(address: int) -> None:
    """Move the page at `address` by MREMAP_DONTUNMAP and give it up; the address keeps an empty page.

    glibc passes its fifth argument along: it has to be a page's address.
    """
    flags = MREMAP_MAYMOVE | MREMAP_DONTUNMAP
    moved = _checked(_libc.mremap(*_long(address, PAGE, PAGE, flags, 0)))
    _checked(_libc.munmap(*_long(moved, PAGE)))


def pagemap_scan(address: int, categories: int) -> int:
    """Return which of `categories` the page at `address` is in, 0 for none."""
    region = ctypes.create_string_buffer(_PAGE_REGION.size)
    fields = (
        _PM_SCAN.size,
        0,
        address,
        address + PAGE,
        0,
        ctypes.addressof(region),
        1,
        0,
        0,
        0,
        categories,
        categories,
    )
    with open("/proc/self/pagemap", "rb", buffering=0) as file:  # noqa: PTH123 - a descriptor is all that is wanted
        found = fcntl.ioctl(file, PAGEMAP_SCAN, bytearray(_PM_SCAN.pack(*fields)))
    return int(_PAGE_REGION.unpack(region.raw)[2]) if found else 0


def procmap_query(address: int) -> tuple[int, int]:
    """Return start and end of the mapping that holds `address`."""
    query = bytearray(_PROCMAP_QUERY.size)
    struct.pack_into("=3Q", query, 0, _PROCMAP_QUERY.size, 0, address)
    with open("/proc/self/maps", "rb", buffering=0) as file:  # noqa: PTH123
        fcntl.ioctl(file, PROCMAP_QUERY, query)
    start, end = _PROCMAP_QUERY.unpack(query)[3:5]
    return start, end


def read_memory(pid: int, address: int, nbytes: int) -> bytes:
    """Return memory of another process."""
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, nbytes, address)
    finally:
        os.close(fd)


def stop(pid: int) -> bool:
    """Stop a child as the engine stops threads, and let it go on; whether it stood."""
    _checked(_libc.ptrace(*_long(_PTRACE_SEIZE, pid, 0, 0)))
    try:
        _checked(_libc.ptrace(*_long(_PTRACE_INTERRUPT, pid, 0, 0)))
        _, status = os.waitpid(pid, _WALL)
        return os.WIFSTOPPED(status)
    finally:
        _checked(_libc.ptrace(*_long(_PTRACE_DETACH, pid, 0, 0)))


def same_memory(pid: int, other: int) -> bool:
    """Whether two processes share one address space."""
    return _checked(_libc.syscall(*_long(_NR_KCMP, pid, other, _KCMP_VM, 0, 0))) == 0


def peer_pidfd() -> int:
    """Return a pidfd of the peer of a socket, as the kernel gives it: our own."""
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        return int(struct.unpack("i", left.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0])


def punch_hole(fd: int) -> None:
    """Give the first page of a file back to its file system."""
    arguments = ctypes.c_int(fd), ctypes.c_int(_FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE), *_long(0, PAGE)
    _checked(_libc.fallocate(*arguments))
