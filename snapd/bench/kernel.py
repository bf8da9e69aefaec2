"""The kernel's own swap, to compare with: a zram device or a swap file that is ours, for as long as it is measured.

Owns that the machine's swap is afterwards as it was, also after a failure or a signal. It takes no device that exists
already, and no other swap is turned off: ours goes first, by its priority.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from snapd.bench import memory
from snapd.errors import SwapUnusable
from snapd.pages import PAGE

if TYPE_CHECKING:
    from collections.abc import Generator

    from snapd.bench.group import Group

KINDS: Final = ("zram", "swapfile")
ALGORITHM: Final = "lz4"
ROOM: Final = 1.25
"""What is set up, as a multiple of the heap."""
LEAST_SHARE: Final = 0.97
"""Of the heap, that has to be out for a figure to be one of the whole heap."""
PASSES: Final = 4

_CONTROL: Final = Path("/sys/class/zram-control")
_SYS_PROCESS_MADVISE: Final = 440
_MADV_PAGEOUT: Final = 21
_MOST_BYTES: Final = 1 << 30
_FIRST: Final = 0x8000 | 0x7FFF  # SWAP_FLAG_PREFER and the highest priority
_LABEL: Final = b"SWAPSPACE2"
_HEADER_OFFSET: Final = 1024
_ENDING: Final = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Swap(Protocol):
    """Kernel swap that is set up; `label` is for people."""

    label: str

    def on(self) -> contextlib.AbstractContextManager[None]:
        """Let the kernel use it, and no longer afterwards: then everything is back in memory."""

    def stored_bytes(self) -> tuple[int, int] | None:
        """Return the bytes that are in it and what they take, where that is known."""

    def forget_caches(self, group: Group | None) -> None:
        """Let nothing that is out be in memory still; `group` is that of the process."""


@contextlib.contextmanager
def set_up(kind: str, size_bytes: int, state_dir: Path) -> Generator[Swap, None, None]:
    """Make a swap for `size_bytes`; a swap file is in `state_dir`. Raises SwapUnusable."""
    if os.geteuid() != 0:
        raise SwapUnusable(kind, "only root may set it up")
    pages = int(size_bytes * ROOM) // PAGE
    with _zram(pages) if kind == "zram" else _swap_file(pages, state_dir) as swap:
        yield swap


def page_out(pid: int, address: int, nbytes: int) -> float:
    """Let the kernel take an interval of `pid` out of memory; returns the seconds that took. Raises SwapUnusable."""
    pidfd = os.pidfd_open(pid)
    try:
        began = time.perf_counter()
        for _ in range(PASSES):
            _advise(pidfd, address, nbytes)
            took_s = time.perf_counter() - began
            if memory.interval(pid, address, nbytes).resident_bytes <= (1 - LEAST_SHARE) * nbytes:
                return took_s
        raise SwapUnusable("the kernel's swap", "the kernel left most of the heap in memory")
    finally:
        os.close(pidfd)


def advise_once(pid: int, address: int, nbytes: int) -> None:
    """Let the kernel take an interval of `pid` out of memory, as far as it gets in one pass. Raises SwapUnusable."""
    pidfd = os.pidfd_open(pid)
    try:
        _advise(pidfd, address, nbytes)
    finally:
        os.close(pidfd)


def _advise(pidfd: int, address: int, nbytes: int) -> None:
    done = 0
    while done < nbytes:
        vector = _IoVec(address + done, min(_MOST_BYTES, nbytes - done))
        taken = _libc.syscall(
            ctypes.c_long(_SYS_PROCESS_MADVISE),
            ctypes.c_long(pidfd),
            ctypes.byref(vector),
            ctypes.c_ulong(1),
            ctypes.c_long(_MADV_PAGEOUT),
            ctypes.c_ulong(0),
        )
        if taken <= 0:
            raise SwapUnusable("the kernel's swap", f"process_madvise: {os.strerror(ctypes.get_errno())}")
        done += taken


def _write_header(path: Path, pages: int) -> None:
    """Do what mkswap(8) does."""
    page = bytearray(PAGE)
    page[_HEADER_OFFSET : _HEADER_OFFSET + 8] = (1).to_bytes(4, "little") + (pages - 1).to_bytes(4, "little")
    page[-len(_LABEL) :] = _LABEL
    with path.open("r+b", buffering=0) as file:
        file.write(page)
        os.fsync(file.fileno())


@contextlib.contextmanager
def undisturbed() -> Generator[None, None, None]:
    """No Ctrl-C cuts short what is being put back."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _on(path: Path) -> Generator[None, None, None]:
    name = os.fsencode(path)
    if _libc.swapon(name, _FIRST):
        raise SwapUnusable(str(path), f"swapon: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        with undisturbed():
            failed = _libc.swapoff(name)
            reason = os.strerror(ctypes.get_errno())
        if failed:
            raise SwapUnusable(str(path), f"it is still in use, swapoff: {reason}")


class _Zram:
    label = f"zram, {ALGORITHM}"

    def __init__(self, number: int) -> None:
        self._sys = Path(f"/sys/block/zram{number}")
        self._device = Path(f"/dev/zram{number}")

    def prepare(self, pages: int) -> None:
        (self._sys / "comp_algorithm").write_text(ALGORITHM)
        (self._sys / "disksize").write_text(str(pages * PAGE))
        end = time.monotonic() + 5
        while not self._device.exists() and time.monotonic() < end:  # udev may take its time
            time.sleep(0.01)
        _write_header(self._device, pages)

    def on(self) -> contextlib.AbstractContextManager[None]:
        return _on(self._device)

    def stored_bytes(self) -> tuple[int, int] | None:
        original, compressed, *_ = (int(word) for word in (self._sys / "mm_stat").read_text().split())
        return original, compressed

    def forget_caches(self, group: Group | None) -> None:
        """Pages go to zram at once, and leave no copy."""


@contextlib.contextmanager
def _zram(pages: int) -> Generator[Swap, None, None]:
    with _zram_module():
        try:
            number = int((_CONTROL / "hot_add").read_text())
        except OSError as error:
            raise SwapUnusable("zram", os.strerror(error.errno or 0)) from error
        try:
            swap = _Zram(number)
            try:
                swap.prepare(pages)
            except OSError as error:
                raise SwapUnusable(f"zram{number}", f"{error.filename}: {os.strerror(error.errno or 0)}") from error
            yield swap
        finally:
            with undisturbed():
                # Whoever looks at new block devices (udev, a desktop) may have it open for a moment.
                for left in reversed(range(50)):
                    try:
                        (_CONTROL / "hot_remove").write_text(str(number))
                        break
                    except OSError:
                        if not left:
                            raise
                        time.sleep(0.1)


@contextlib.contextmanager
def _zram_module() -> Generator[None, None, None]:
    """The module is loaded when it is not there, and unloaded again then."""
    if _CONTROL.exists():
        yield
        return
    try:
        subprocess.run(["modprobe", "zram", "num_devices=0"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SwapUnusable("zram", "the kernel has no zram") from error
    try:
        yield
    finally:
        with undisturbed():
            subprocess.run(["modprobe", "-r", "zram"], check=False, capture_output=True)


class _SwapFile:
    label = "swap file"

    def __init__(self, path: Path) -> None:
        self._path = path

    def on(self) -> contextlib.AbstractContextManager[None]:
        return _on(self._path)

    def stored_bytes(self) -> tuple[int, int] | None:
        return None

    def forget_caches(self, group: Group | None) -> None:
        """Let the kernel reclaim what it keeps of what it has written."""
        if group is not None:
            group.reclaim()


@contextlib.contextmanager
def _swap_file(pages: int, state_dir: Path) -> Generator[Swap, None, None]:
    path = state_dir / "swap"
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, pages * PAGE)
        finally:
            os.close(fd)
        _write_header(path, pages)
    except OSError as error:
        with undisturbed():
            path.unlink(missing_ok=True)
        raise SwapUnusable(str(path), os.strerror(error.errno or 0)) from error
    try:
        yield _SwapFile(path)
    finally:
        with undisturbed():
            path.unlink()
