"""What drives a daemon while a target works: dumps back to back, samples of memory, figures for the summary.

Knows the harness, and nothing of what a test is about.
"""

import contextlib
import itertools
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from snapd.errors import NoSuchProcess, NotCooperating, SnapdError, TargetGone
from snapd.protocol.options import DumpOptions
from snapd.protocol.reports import DumpProgress, DumpReport
from tests.harness import Daemon, HarnessError, rss_bytes

PAGE: Final = 4096
MIB: Final = 1 << 20
SAMPLE_S: Final = 0.02
_PRESENT: Final = 1 << 63


class Figures:
    """Notes figures of one test; they are shown at the end of the run and judge nothing."""

    def __init__(self, test: str, write: Callable[[str], None]) -> None:
        """Note for `test` by `write`."""
        self._test = test
        self._write = write

    def note(self, **values: object) -> None:
        """Note figures by name; names have their unit."""
        shown = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )
        self._write(f"{self._test}: {', '.join(shown)}")

    def note_stops(self, reports: list[DumpReport]) -> None:
        """Note what the stops of these dumps were."""
        stops = sum(report.stops for report in reports)
        self.note(
            dumps=len(reports),
            stops=stops,
            longest_stop_us=max((report.longest_stop_us for report in reports), default=0),
            mean_stop_us=sum(report.sum_stop_us for report in reports) // max(stops, 1),
            pieces_put_off=sum(report.pieces_put_off for report in reports),
        )


class BackToBack:
    """Dumps of one process one after the other in a thread of its own, until told to end or until it is gone."""

    def __init__(
        self, daemon: Daemon, pid: int, *, pause_s: float = 0.0, ignore: tuple[type[SnapdError], ...] = ()
    ) -> None:
        """Dump `pid`; `pause_s` is how long to leave it alone after each dump, `ignore` what a dump may fail with."""
        self.reports: list[DumpReport] = []
        self.gone = False
        self._daemon = daemon
        self._pid = pid
        self._pause_s = pause_s
        self._ignore = ignore
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="back-to-back")

    def _run(self) -> None:
        try:
            with self._daemon.client() as client:
                while not self._stop.wait(self._pause_s):
                    with contextlib.suppress(*self._ignore):
                        self.reports.append(client.dump(self._pid))
        except (TargetGone, NoSuchProcess, NotCooperating):
            self.gone = True
        except Exception as error:  # noqa: BLE001 - whoever waits for the thread raises it
            self._error = error

    def total(self, field: str) -> int:
        """Return the sum of a field over all reports."""
        return sum(getattr(report, field) for report in self.reports)

    def until(self, dumps: int, timeout_s: float = 60) -> Iterator[int]:
        """Count for whoever works meanwhile, until so many dumps are done."""
        end = time.monotonic() + timeout_s
        for number in itertools.count():
            if len(self.reports) >= dumps or not self._thread.is_alive():
                return
            if time.monotonic() > end:
                raise HarnessError(f"{len(self.reports)} of {dumps} dumps were done within {timeout_s:g} s")
            yield number

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End after the dump that is running; raises what a dump raised, unless the process had simply ended."""
        self._stop.set()
        self._thread.join(60)
        if self._thread.is_alive():
            raise HarnessError("a dump did not end within 60 s")
        if self._error is not None and error is None:
            raise self._error
        if self._error is not None and error is not None:
            error.add_note(f"and a dump failed: {self._error!r}")


class Sampler:
    """Asks for figures of named sources all the time in a thread of its own, and keeps the largest of each."""

    def __init__(self, **sources: Callable[[], int]) -> None:
        """Ask `sources`; one that raises HarnessError or an OSError has nothing to say just then."""
        self.most = dict.fromkeys(sources, 0)
        self.samples = 0
        self._sources = sources
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")

    def _run(self) -> None:
        while True:
            for name, source in self._sources.items():
                with contextlib.suppress(HarnessError, OSError):
                    self.most[name] = max(self.most[name], source())
            self.samples += 1
            if self._stop.wait(SAMPLE_S):
                return

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._stop.set()
        self._thread.join(60)


def rss_of(pid: int) -> Callable[[], int]:
    """Return a source for a Sampler: the resident memory of a process."""
    return lambda: rss_bytes(pid)


def present(pid: int, start: int, end: int) -> list[bool]:
    """Tell of each page of an interval whether it is in memory."""
    npages = (end - start) // PAGE
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.seek(start // PAGE * 8)
        data = b""
        while len(data) < npages * 8:
            if not (more := pagemap.read(npages * 8 - len(data))):
                break
            data += more
    return [bool(entry & _PRESENT) for (entry,) in struct.iter_unpack("<Q", data)]


def stores_of(daemon: Daemon) -> list[Path]:
    """Return where the stores are that the daemon has open: its descriptors of files without a name, each file once."""
    device = Path(f"/proc/{daemon.pid}/root{daemon.state_dir}").stat().st_dev
    found: dict[int, Path] = {}
    for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            file = link.stat()
            if stat.S_ISREG(file.st_mode) and file.st_dev == device and not file.st_nlink:
                found.setdefault(file.st_ino, link)
    return list(found.values())


def out_bytes(daemon: Daemon, pid: int) -> int:
    """Return what of a process is out of memory, by its session."""
    session = daemon.session(pid)
    return session.swapped_bytes if session else 0


class RunningDump:
    """A dump that was seen to be under way; `outcome()` waits for its end."""

    def __init__(self, daemon: Daemon, pid: int, *, level: int | None = None) -> None:
        """Begin it, and wait for its first progress."""
        self._level = level
        self._result: DumpReport | Exception | None = None
        self._moving = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(daemon, pid), name="dump")
        self._thread.start()
        if not self._moving.wait(30):
            raise HarnessError("a dump moved nothing within 30 s")

    def _run(self, daemon: Daemon, pid: int) -> None:
        try:
            with daemon.client() as client:
                self._result = client.dump(pid, DumpOptions(self._level), progress=self._progress)
        except Exception as error:  # noqa: BLE001 - outcome() returns it
            self._result = error
        self._moving.set()

    def _progress(self, _: DumpProgress) -> None:
        self._moving.set()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._thread.is_alive()

    def outcome(self, timeout_s: float = 60) -> DumpReport | Exception:
        """Return its report, or the error that it ended with."""
        self._thread.join(timeout_s)
        if self._result is None:
            raise HarnessError(f"a dump did not end within {timeout_s:g} s")
        return self._result
