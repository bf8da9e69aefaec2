"""Processes that tests look at, wait for and end: what /proc and pidfds say. Knows nothing of daemons and targets."""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

ASK_S = 60.0
REAP_S = 10.0

_T = TypeVar("_T")


class HarnessError(AssertionError):
    """A daemon or a target did not do what every test expects of it."""


def wait_until(condition: Callable[[], _T | None], what: str, timeout_s: float = ASK_S) -> _T:
    """Ask until the answer is true and return it; HarnessError says what did not come."""
    end = time.monotonic() + timeout_s
    pause_s = 0.001
    while not (answer := condition()):
        if time.monotonic() > end:
            raise HarnessError(f"not within {timeout_s:g} s: {what}")
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, 0.05)
    return answer


def rss_bytes(pid: int, field: str = "VmRSS") -> int:
    """Return the resident memory of a process, or with `field` VmHWM, VmSize and the like, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise HarnessError(f"process {pid} has no {field}: it has ended")


def rollup_bytes(pid: int, field: str) -> int:
    """Return a field of all mappings together, Rss, Pss, Anonymous and the like, in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise HarnessError(f"process {pid} has no {field}")


def private_ranges(pid: int, at_least_bytes: int = 1 << 20) -> Iterator[tuple[int, int]]:
    """Yield start and end of a process's private, anonymous, writable mappings, without stacks, of some size."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, mode, *_, inode = line.split(maxsplit=5)[:5]
        start, end = (int(address, 16) for address in addresses.split("-"))
        if mode == "rw-p" and inode == "0" and "[stack" not in line and end - start >= at_least_bytes:
            yield start, end


def files_of(pid: int) -> Iterator[tuple[Path, str]]:
    """Yield each descriptor of a process with what it leads to; one that is closed meanwhile is passed over."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            yield link, str(link.readlink())


def texts_of_threads(pid: int, file: str) -> Iterator[tuple[int, str]]:
    """Yield the text of a file of each thread of a process, by its id; a thread that ends meanwhile is passed over."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield int(task.name), (task / file).read_text()


def signal_group(group: int, number: signal.Signals) -> None:
    """Send a signal to a process group, if there is one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def living(group: int) -> list[int]:
    """Return the processes of a group, without those that have ended and were not reaped."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state, _, pgrp = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(pgrp) == group and state not in "ZX":
                    found.append(int(entry.name))
    return found


def ended(pidfd: int, timeout_s: float) -> bool:
    """Wait for the process's end and tell whether it came."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000))


def threads_state(pid: int) -> str:
    """Say of each thread in which state, system call and kernel function it is."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(OSError):
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            lines.append(f"thread {task.name} {state} in {(task / 'syscall').read_text().strip()}")
            lines.append((task / "stack").read_text())
    return "\n".join(lines)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put SIGTERM and Ctrl-C off: a process that was just started must be known to who ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    # Only handlers of this program: what is ignored or left to the kernel is so in the new process too.
    handlers = {one: handler for one in numbers if callable(handler := signal.getsignal(one))}
    try:
        for one in handlers:
            signal.signal(one, lambda number, _: caught.append(number))
        yield
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
        for number in caught:
            signal.raise_signal(number)
