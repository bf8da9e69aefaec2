"""`python -m tests.demo`: a Python process and a redis-server go to disk while they work, and come back on touch.

Owns the story: a private daemon, two programs with a small load, one dump each, what it cost, and the check of every
object and every value. Exit status 0 means that all was verified.
"""

import argparse
import contextlib
import json
import math
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import redis
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from snapd import __version__
from snapd.cli import output
from snapd.errors import SnapdError
from snapd.protocol.reports import DumpReport
from tests.harness import Daemon, HarnessError, Spawner, rss_bytes
from tests.keys import BUSY_SHARE, Keys

COLUMNS: Final = 80
START_S: Final = 120.0
MB: Final = 1e6
OBJECTS_SHARE: Final = 0.875
"""What objects.py's objects take at least of the size that it is asked for, with CPython 3.11."""


class Work:
    """What a program is busy with in the meantime: one small operation after another, each of them checked."""

    def __init__(self, operation: Callable[[], None], pause_s: float) -> None:
        """Start nothing yet; between two operations is `pause_s`."""
        self._operation = operation
        self._pause_s = pause_s
        self._ending = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run)
        self._times_s: list[float] = []
        self._began: float | None = None

    def _run(self) -> None:
        try:
            while not self._ending.wait(self._pause_s):
                self._began = began = time.monotonic()
                self._operation()
                self._times_s.append(time.monotonic() - began)
                self._began = None
        except (HarnessError, redis.RedisError, OSError) as error:
            self._error = error

    def take(self) -> tuple[int, float]:
        """Return the number of operations since the last call and how long the slowest took so far, in seconds."""
        began = self._began
        taken, self._times_s = self._times_s, []
        return len(taken), max([*taken, time.monotonic() - began if began else 0.0])

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Work until the end of the block; then raise what went wrong."""
        self._thread.start()
        try:
            yield
        finally:
            self._ending.set()
            self._thread.join()
        if self._error is not None:
            raise self._error


class Objects:
    """A Python process full of dicts, lists, strings, floats, arrays and bytes; it checks its own digests."""

    name = "python"
    operation = "change"
    pause_s = 0.1

    def __init__(self, spawn: Spawner, mib: int) -> None:
        """Start it; it makes its heap meanwhile."""
        asked_mib = math.ceil(mib / OBJECTS_SHARE)
        self._target = spawn("objects", "--mib", asked_mib, wait=False, deadline_s=START_S + mib)
        self._changes = 0
        self._nparts = 0
        self._timeout_s = START_S + mib
        self.pid = self._target.pid

    def prepare(self) -> None:
        """Wait until the heap is made."""
        self._nparts = self._target.ready(timeout_s=self._timeout_s)["parts"]

    def work(self) -> None:
        """Have it verify one part of its heap, change it and note the new digest."""
        self._changes += 1
        self._target.ask("mutate", 1, self._changes, timeout_s=self._timeout_s)

    def verify(self) -> str:
        """Have it walk every object; returns what was verified. HarnessError when a digest is not as noted."""
        digest = self._target.ask("sum", timeout_s=self._timeout_s)["sum"]
        return f"{self._nparts:,} parts, digest {digest[:8]}"

    def end(self) -> None:
        """End it; its exit status must be 0."""
        self._target.quit()


@dataclass(slots=True)
class Figures:
    """What one program's trip to disk and back cost; `faults` and their times are the daemon's, of the way back."""

    name: str
    rss_before_bytes: int
    rss_after_bytes: int
    dump: DumpReport
    operation: str
    operations: int
    slowest_s: float
    back_s: float = 0.0
    faults: int = 0
    fault_p50_us: float | None = None
    fault_p99_us: float | None = None
    rss_back_bytes: int = 0
    verified: str = ""

    @property
    def packed_bytes(self) -> int:
        """Return what went into frames."""
        return self.dump.moved_bytes - self.dump.zero_bytes - self.dump.clean_bytes

    @property
    def mb_s(self) -> float:
        """Return the speed of the dump, in 10^6 bytes a second."""
        return self.dump.moved_bytes / MB / self.dump.duration_s

    def to_json(self) -> dict[str, Any]:
        """Return all figures."""
        ratio = self.packed_bytes / self.dump.stored_bytes if self.dump.stored_bytes else None
        return {**asdict(self), "dump": self.dump.to_json(), "ratio": ratio, "mb_s": self.mb_s}


def dump(daemon: Daemon, subject: Objects | Keys, work: Work) -> Figures:
    """Take one program out of memory while it works."""
    work.take()
    before = rss_bytes(subject.pid)
    report = daemon.dump(subject.pid)
    operations, slowest_s = work.take()
    return Figures(subject.name, before, rss_bytes(subject.pid), report, subject.operation, operations, slowest_s)


def bring_back(daemon: Daemon, subject: Objects | Keys, figures: Figures) -> None:
    """Verify everything, which touches it, and note what that cost."""
    before = daemon.wait_for_session(subject.pid).faults
    began = time.monotonic()
    figures.verified = subject.verify()
    figures.back_s = time.monotonic() - began
    session = daemon.wait_for_session(subject.pid)
    figures.faults = session.faults - before
    figures.fault_p50_us, figures.fault_p99_us = session.fault_p50_us, session.fault_p99_us
    figures.rss_back_bytes = rss_bytes(subject.pid)
    if session.bad_pages:
        raise HarnessError(f"{session.bad_pages} pages of {subject.name} could not be read back")


def demonstrate(mib: int, keys: int, say: Callable[[str], None]) -> list[Figures]:
    """Tell the whole story; returns the figures of each program. HarnessError where anything was not as it must be."""
    with Daemon() as daemon, Spawner(daemon) as spawn:
        say(f"a Python process makes {mib} MiB of objects")
        subjects: list[Objects | Keys] = [Objects(spawn, mib)]
        if shutil.which("redis-server"):
            say(f"a redis-server takes {keys:,} keys")
            subjects.append(Keys(spawn, daemon, keys))
        else:
            say("redis-server is not installed, and left out")
        for subject in subjects:
            subject.prepare()
            daemon.wait_for_session(subject.pid)
        figures = []
        works = [Work(subject.work, subject.pause_s) for subject in subjects]
        with contextlib.ExitStack() as stack:
            for work in works:
                stack.enter_context(work.going_on())
            for subject, work in zip(subjects, works, strict=True):
                say(f"dump of {subject.name}, which goes on working")
                figures.append(dump(daemon, subject, work))
        for subject, one in zip(subjects, figures, strict=True):
            say(f"check of all that {subject.name} holds, which brings it back")
            bring_back(daemon, subject, one)
        say("end of both programs and of the daemon")
        for subject in subjects:
            subject.end()
    return figures


def table(figures: list[Figures]) -> Table:
    """Return the figures, one column a program."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    shown.add_column("", no_wrap=True)
    for one in figures:
        shown.add_column(one.name, justify="right", no_wrap=True)
    rows: list[tuple[str, Callable[[Figures], str]]] = [
        ("resident before", lambda one: output.size(one.rss_before_bytes)),
        ("resident after", lambda one: output.size(one.rss_after_bytes)),
        ("moved out", lambda one: output.size(one.dump.moved_bytes)),
        ("stored", lambda one: output.size(one.dump.stored_bytes)),
        ("ratio", lambda one: output.ratio(one.packed_bytes, one.dump.stored_bytes)),
        ("dump", lambda one: f"{one.mb_s:.0f} MB/s"),
        ("took", lambda one: output.duration(one.dump.duration_s)),
        ("stops", lambda one: f"{one.dump.stops}"),
        ("longest stop", lambda one: output.duration(one.dump.longest_stop_us / 1e6)),
        ("work meanwhile", lambda one: f"{one.operations:,} {one.operation}s"),
        ("the slowest", lambda one: output.duration(one.slowest_s)),
        ("faults on the way back", lambda one: f"{one.faults:,}"),
        ("p50 / p99 of all faults", lambda one: _both(one.fault_p50_us, one.fault_p99_us)),
        ("all back and checked in", lambda one: output.duration(one.back_s)),
        ("resident then", lambda one: output.size(one.rss_back_bytes)),
        ("verified", lambda one: one.verified),
    ]
    for number, (title, cell) in enumerate(rows):
        shown.add_row(title, *(cell(one) for one in figures), end_section=number in (1, 6, 8, 10))
    return shown


def _both(p50_us: float | None, p99_us: float | None) -> str:
    return f"{output.latency(p50_us)} / {output.latency(p99_us)}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description=__doc__)
    parser.add_argument("--mib", type=int, default=512, metavar="N", help="size of the Python heap (default: 512)")
    parser.add_argument("--keys", type=int, default=200_000, metavar="N", help="keys of redis (default: 200000)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args(arguments)
    if options.mib < 4 or options.keys < BUSY_SHARE:
        parser.error(f"--mib must be 4 and --keys {BUSY_SHARE} at least")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration; returns the exit status."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as Ctrl-C: leave nothing behind
    console = Console(highlight=False, width=COLUMNS)
    began = time.monotonic()

    def say(what: str) -> None:
        if not options.json:
            console.print(f"{time.monotonic() - began:5.1f} s  {what}", style="dim")

    try:
        figures = demonstrate(options.mib, options.keys, say)
    except (HarnessError, SnapdError, redis.RedisError, OSError) as error:
        notes = "\n".join(getattr(error, "__notes__", []))
        print(f"demo: {error}\n{notes}".rstrip(), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    duration_s = time.monotonic() - began
    if options.json:
        print(json.dumps({"ok": True, "duration_s": duration_s, "programs": [one.to_json() for one in figures]}))
        return 0
    console.print()
    console.print(Text(f"snapd {__version__} on Linux {platform.release()}", style="bold"))
    console.print(table(figures))
    console.print(Text(f"Every object and every value is as it must be; {output.duration(duration_s)} in all."))
    return 0


if __name__ == "__main__":
    sys.exit(main())
