"""What kills a daemon at a chosen or a random instant, and sees what it was doing then.

Knows the keeper's name and a page map's header; nothing of what a test is about.
"""

import contextlib
import itertools
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from snapd.engine import keeper
from snapd.errors import SnapdError
from tests.harness import Daemon, HarnessError, Target, wait_until
from tests.kernel.driving import PAGE

SUCCESSOR_S: Final = 60.0
JUST_AFTER_NS: Final = 50_000_000
SETTLED_S: Final = 1.1
"""After this a death is no young one: keepers make the next daemon wait when too many are."""


def allow_deaths(daemon: Daemon) -> None:
    """Let be what a death is expected to have logged."""
    daemon.allow(r"WARNING: the daemon has died; the next one starts")
    daemon.allow(r"WARNING: agent pid \d+ uid \d+: dropped: .*(Broken pipe|has an agent already)")


def processes_of(group: int) -> Iterator[tuple[int, str, str, int]]:
    """Yield pid, name, state and parent of the processes of a group."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                text = (entry / "stat").read_text()
                state, parent, its_group = text[text.rindex(")") + 2 :].split()[:3]
                if int(its_group) == group:
                    yield int(entry.name), text[text.index("(") + 1 : text.rindex(")")], state, int(parent)


def daemon_of(group: int) -> int:
    """Return the pid of the living daemon of a group, or 0; a keeper that has become one counts from its exec on."""
    return next((pid for pid, name, state, _ in processes_of(group) if state not in "ZX" and name != "snapd-keeper"), 0)


def kill_pid(pid: int) -> None:
    """End a process as a crash does, and wait until it is gone; it may be somebody else's child."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        wait_until(lambda: _has_ended(pid), f"the end of {pid}", SUCCESSOR_S)
    finally:
        os.close(pidfd)


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def _was_handed_descriptors(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return f"LISTEN_PID={pid}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


class Killer:
    """Kills the daemon of a harness again and again, and waits for its successors."""

    def __init__(self, daemon: Daemon) -> None:
        """Take over the harness's daemon: it is no longer its first process."""
        allow_deaths(daemon)
        self.daemon = daemon
        self.group = daemon.process.pid
        self.kills_ns: list[int] = []
        self.pid = self.group
        daemon.expect_successors()

    def kill(self) -> None:
        """Kill it now, and return when its keeper has become the next one, which need not serve yet."""
        self.kills_ns.append(time.monotonic_ns())
        old = self.pid
        os.kill(old, signal.SIGKILL)
        self.pid = wait_until(lambda: self._successor(old), "a keeper that becomes a daemon", SUCCESSOR_S)
        if old == self.group:
            self.daemon.process.wait(SUCCESSOR_S)

    def _successor(self, old: int) -> int:
        """Return who was a keeper and has been executed as the next daemon, or 0.

        Its environment says so. A keeper that a daemon has only just made has that daemon's name and environment for a
        moment, and ends when an older one takes the turn.
        """
        living = (pid for pid, _, state, _ in processes_of(self.group) if state not in "ZX" and pid != old)
        return next((pid for pid in living if _was_handed_descriptors(pid)), 0)


_INTENT: Final = struct.Struct("5Q")
INTENTS_AT: Final = 104
MAX_INTENTS: Final = 80
"""Where a page map's header has what is on its way: `struct page_map_header`."""


class PageMap:
    """A target's page map as its agent holds it, for who wants to see how far a dump is."""

    def __init__(self, pid: int) -> None:
        """Open it; HarnessError when the target's agent holds none."""
        self._fd = -1
        for task in Path(f"/proc/{pid}/task").iterdir():
            for link in (task / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if "heap-snapd-page-map" in str(link.readlink()):
                        self._fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
                        return
        raise HarnessError(f"the agent of {pid} holds no page map")

    def phases(self) -> dict[str, int]:
        """Return how many spans are in which phase."""
        return keeper.look(self._fd).phases

    def asides(self) -> list[tuple[int, int]]:
        """Return address and pages of each aside that a stop has made and that was not dropped."""
        return [(aside, npages) for _, _, npages, aside, _ in self._intents() if aside]

    def stagings(self) -> list[int]:
        """Return where the stagings are of what a stop has moved."""
        return [staging for _, _, _, aside, staging in self._intents() if aside]

    def staging_of(self, address: int) -> int:
        """Return where in a staging a page is, or is to be, that a stop has moved."""
        for _, start, npages, aside, staging in self._intents():
            if aside and start <= address < start + npages * PAGE:
                return staging + address - start
        raise HarnessError(f"{address:#x} is in no piece")

    def _intents(self) -> Iterator[tuple[int, ...]]:
        return _INTENT.iter_unpack(os.pread(self._fd, MAX_INTENTS * _INTENT.size, INTENTS_AT))

    def wait_for(self, phases: Collection[str], timeout_s: float = 20) -> None:
        """Spin until a span is in one of these phases: sleeping would miss it."""
        end = time.monotonic() + timeout_s
        while self.phases().keys().isdisjoint(phases):
            if time.monotonic() > end:
                raise HarnessError(f"no piece came to {phases} within {timeout_s:g} s")

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)


class Dumping:
    """Dumps a target in a loop, whatever daemons come and go; `done` has the outcomes by name."""

    def __init__(self, daemon: Daemon, target: Target, done: Counter[str]) -> None:
        """Prepare; a context manager."""
        self._daemon, self._pid, self._done = daemon, target.pid, done
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dumping")

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with self._daemon.client() as client:
                    client.dump(self._pid)
                self._done["complete"] += 1
            except (SnapdError, OSError) as error:
                self._done[type(error).__name__] += 1
                time.sleep(0.01)

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End after the dump that is running."""
        self._stop.set()
        self._thread.join(60)


class Busy:
    """Has a target do verified commands again and again, so that there is something to dump and to wait for."""

    def __init__(self, target: Target, *commands: tuple[str, int]) -> None:
        """Prepare commands with their numbers of pages; a context manager, which raises what went wrong."""
        self._target, self._commands = target, commands
        self._error: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="busy")

    def _run(self) -> None:
        try:
            for seed in itertools.count():
                if self._stop.is_set():
                    return
                for command, pages in self._commands:
                    if not self._target.ask(command, pages, seed)["ok"]:
                        raise HarnessError(f"{command} failed")
        except Exception as error:  # noqa: BLE001 - whoever waits for the thread raises it
            self._error = error

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End after the command that is running."""
        self._stop.set()
        self._thread.join(60)
        if self._error is not None and error is None:
            raise self._error


def start_by_hand(daemon: Daemon) -> subprocess.Popen[bytes]:
    """Start another daemon with the directories of one that is dead, in its process group and with its log."""
    environ = {"SNAPD_RUNTIME_DIR": str(daemon.runtime_dir), "SNAPD_STATE_DIR": str(daemon.state_dir)}
    with daemon.log_path.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "snapd", "daemon"],
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def found_phases(log: str) -> Counter[str]:
    """Return how many daemons found what on its way, by the lines of their log; "rest": nothing, of any session."""
    found: Counter[str] = Counter()
    of_one: set[str] = set()
    for line in log.splitlines():
        if "on its way: " in line:
            of_one.update(re.findall(r"\b(move|pin|store|drop|cut) \d", line))
            of_one.update(() if " 0 events" in line else ("events",))
        elif "took over " in line:
            found.update(of_one or {"rest"})
            of_one = set()
    return found


def waits_ms(kills_ns: list[int], slow: list[tuple[int, int]]) -> list[float]:
    """Return for each kill how long the longest operation that met it went on; 0 when none did.

    An operation that met several kills in a row is counted from the last one: that is what a successor took.
    """
    found = dict.fromkeys(kills_ns, 0.0)
    for start, duration in slow:
        met = [at for at in kills_ns if start - JUST_AFTER_NS < at < start + duration]
        if met:
            last = max(met)
            found[last] = max(found[last], (start + duration - max(last, start)) / 1e6)
    return list(found.values())


def pause(rng: random.Random, number: int, settle: Callable[[], object]) -> None:
    """Wait for some time after a death: sometimes none, and often enough so long that the next one is no young one."""
    if number % 3 == 2:
        settle()
        time.sleep(SETTLED_S)
    time.sleep(rng.choice([rng.uniform(0, 0.2), rng.uniform(0, 0.8)]))
