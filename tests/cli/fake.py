"""A control server over a backend that only pretends, in a thread, and the command line as a subprocess.

Owns what the tests of server, clients and commands share; the socket, the protocol and the processes are real.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

import trio

import snapd
from snapd import errors
from snapd.daemon.server import Peer, listen, serve_control
from snapd.directories import RuntimeLock
from snapd.protocol.options import DumpOptions
from snapd.protocol.reports import (
    AttachReport,
    DaemonInfo,
    DumpProgress,
    DumpReport,
    HandOver,
    RestoreReport,
    SessionInfo,
    StatusReport,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

MIB = 1 << 20
UNSERVED_S = 0.125
WAIT_S = 20

GOOD, CHILD, SLOW, BROKEN = 100, 101, 102, 103

REFUSED: dict[int, errors.SnapdError] = {
    200: errors.NoSuchProcess(200),
    201: errors.NotCooperating(201),
    202: errors.NotPermitted(202, 1000),
    203: errors.SessionBusy(203),
    204: errors.TargetGone(204),
    205: errors.TargetStopped(205),
    206: errors.TargetTraced(206),
    207: errors.SharedMemory(207, 208),
    208: errors.StoreFull("/var/lib/heap-snapd"),
    209: errors.StoreFailed("/var/lib/heap-snapd", "Input/output error"),
    210: errors.NotEnoughMemory(210, 4096),
    211: errors.KernelLacks("UFFDIO_MOVE"),
    212: errors.UserfaultfdDenied("/dev/userfaultfd", "Permission denied"),
}

SESSIONS = (
    SessionInfo(GOOD, 1000, "redis-server", "idle", 20 * MIB, 180 * MIB, 50 * MIB, 1234, 16, 85.5, 0, None),
    SessionInfo(CHILD, 1000, "redis-server", "child", 21 * MIB, 179 * MIB, 50 * MIB, 7, 12, 40, 0, GOOD),
    SessionInfo(SLOW, 0, "evil \x1b[31m\nname", "dumping", 0, 0, 0, 0, None, None, 2, None),
)

DUMP = DumpReport(
    pid=GOOD,
    moved_bytes=100 * MIB,
    stored_bytes=30 * MIB,
    zero_bytes=10 * MIB,
    clean_bytes=0,
    skipped_bytes=3 * MIB,
    freed_bytes=99 * MIB,
    pinned_bytes=4096,
    duration_s=1.25,
    stops=4,
    longest_stop_us=1300,
    sum_stop_us=4200,
    pieces_put_off=1,
    skipped={"stack": 2 * MIB, "locked": MIB},
)


class FakeBackend:
    """Answers by pid: GOOD does what is asked, SLOW only after `release`, BROKEN fails as a bug does."""

    def __init__(self) -> None:
        """Start with no calls seen and SLOW held back."""
        self.sessions: tuple[SessionInfo, ...] = SESSIONS
        self.peers: list[Peer] = []
        self.calls: list[tuple[str, int | None]] = []
        self.levels: list[int | None] = []
        self.kept: list[str | None] = []
        self.started = threading.Event()
        self.finished = threading.Event()
        self.pid = os.getpid()
        self.refusal: errors.SnapdError | None = None
        self.waits: list[int] = []
        self._release: trio.Event | None = None

    def release(self) -> None:
        """Let SLOW go on; in the trio thread."""
        assert self._release is not None
        self._release.set()

    async def _work(self, name: str, peer: Peer, pid: int, progress: Callable[[DumpProgress], None]) -> None:
        self.calls.append((name, pid))
        self.peers.append(peer)
        if pid in REFUSED:
            raise REFUSED[pid]
        if pid == BROKEN:
            raise ZeroDivisionError("division by zero")
        progress(DumpProgress(pid, 0, 100 * MIB))
        if pid == SLOW:
            self._release = trio.Event()
            self.started.set()
            await self._release.wait()
            self.finished.set()
        for step in range(1, 4):
            # A little longer than the server waits between two reports of progress.
            await trio.sleep(0.06)
            progress(DumpProgress(pid, step * 25 * MIB, 100 * MIB))

    async def dump(
        self, peer: Peer, pid: int, *, options: DumpOptions, progress: Callable[[DumpProgress], None]
    ) -> DumpReport:
        """Pretend a dump."""
        self.levels.append(options.level)
        self.kept.append(options.keep)
        await self._work("dump", peer, pid, progress)
        snapshot = {"snapshot": f"/var/lib/heap-snapd/snapshots/0/{options.keep}.snapd", "snapshot_bytes": 31 * MIB}
        return DumpReport.from_json({**DUMP.to_json(), "pid": pid, **(snapshot if options.keep else {})})

    async def restore(self, peer: Peer, pid: int, *, progress: Callable[[DumpProgress], None]) -> RestoreReport:
        """Pretend a restore."""
        await self._work("restore", peer, pid, progress)
        return RestoreReport(pid, 64 * MIB, 0.5)

    async def attach(self, peer: Peer, pid: int, *, tree: bool) -> AttachReport:
        """Pretend an attach; a tree has one process more."""
        await self._work("attach", peer, pid, lambda _: None)
        return AttachReport((pid, pid + 1) if tree else (pid,))

    async def detach(self, peer: Peer, pid: int) -> None:
        """Pretend a detach."""
        await self._work("detach", peer, pid, lambda _: None)

    async def upgrade(self, peer: Peer, *, wait_s: int, answer: Callable[[HandOver], Awaitable[None]]) -> None:
        """Pretend that another daemon serves from now on."""
        self.peers.append(peer)
        self.waits.append(wait_s)
        if self.refusal is not None:
            raise self.refusal
        await answer(HandOver(self.pid, snapd.__version__, "0.0"))
        self.pid += 1

    async def status(self, peer: Peer, pid: int | None) -> StatusReport:
        """Return the sessions, or that of `pid`."""
        self.calls.append(("status", pid))
        self.peers.append(peer)
        if pid in REFUSED:
            raise REFUSED[pid]
        chosen = tuple(one for one in self.sessions if pid in (None, one.pid))
        if pid is not None and not chosen:
            raise errors.NotCooperating(pid)
        return StatusReport(DaemonInfo(self.pid, None, snapd.__version__, UNSERVED_S), chosen)


class Served:
    """A runtime directory that is served over a FakeBackend, from a thread, while the context lasts."""

    def __init__(self, runtime_dir: Path) -> None:
        """Mean `runtime_dir`; nothing is served yet."""
        self.runtime_dir = runtime_dir
        self.backend = FakeBackend()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))
        self._ready = threading.Event()

    @property
    def path(self) -> str:
        """The control socket."""
        return str(self.runtime_dir / "control.sock")

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._stopped = trio.Event()
        with RuntimeLock(self.runtime_dir) as lock:
            sock = listen(lock)
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_control, sock, self.backend)
                self._ready.set()
                await self._stopped.wait()
                nursery.cancel_scope.cancel()

    def call(self, function: Callable[[], None]) -> None:
        """Call `function` in the trio thread, soon."""
        self._token.run_sync_soon(function)

    def stop(self) -> None:
        """Ask the server to end, without waiting for it."""
        self._token.run_sync_soon(self._stopped.set)

    def join(self) -> None:
        """Wait for the server's end."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def __enter__(self) -> Self:
        """Serve."""
        self._thread.start()
        assert self._ready.wait(WAIT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        if self._thread.is_alive():
            self.stop()
        self.join()


Completed = subprocess.CompletedProcess[str]


class Cli:
    """Runs `snapd` as a process of its own, with nothing of ours in its environment but what is given."""

    def __init__(self, runtime_dir: Path) -> None:
        """Let commands find `runtime_dir` by SNAPD_RUNTIME_DIR."""
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("SNAPD_", "COLUMNS"))}
        self.env["SNAPD_RUNTIME_DIR"] = str(runtime_dir)
        package_parent = str(Path(snapd.__file__).parent.parent)
        self.env["PYTHONPATH"] = os.pathsep.join(filter(None, [package_parent, os.environ.get("PYTHONPATH")]))

    @property
    def argv(self) -> list[str]:
        """How to start the command."""
        return [sys.executable, "-m", "snapd"]

    def __call__(self, *arguments: str, **env: str) -> Completed:
        """Run it to its end; `env` adds to its environment."""
        return subprocess.run(
            [*self.argv, *arguments], env={**self.env, **env}, capture_output=True, text=True, timeout=60, check=False
        )
