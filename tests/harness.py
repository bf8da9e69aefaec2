"""A daemon in a private directory, and what starts targets under it or alone.

Owns that whatever happens nothing is left behind. It knows the command line and snapd.Client as any user does, and
nothing of what a test is about.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from snapd import Client
from snapd.agent import library_path
from snapd.errors import SnapdError
from snapd.protocol.options import DumpOptions
from snapd.protocol.reports import DumpReport, RestoreReport, SessionInfo, StatusReport
from tests.processes import (
    ASK_S,
    REAP_S,
    HarnessError,
    ended,
    living,
    private_ranges,
    rss_bytes,
    signal_group,
    threads_state,
    undisturbed,
    wait_until,
)
from tests.target import C_FLAGS, DEADLINE_S, TARGETS, Reply, Target, build

__all__ = [
    "C_FLAGS",
    "TARGETS",
    "Daemon",
    "HarnessError",
    "Reply",
    "Spawner",
    "Target",
    "build",
    "private_ranges",
    "rss_bytes",
    "snapd",
    "wait_until",
]

SNAPD = (sys.executable, "-m", "snapd")
START_S = 30.0
STOP_S = 60.0

_ALARMING = re.compile(r"\b(?:WARNING|ERROR|CRITICAL)\b|^<[0-4]>|^Traceback |^Fatal Python error|Exception ignored")


def snapd(
    *args: str | int | Path, runtime_dir: Path, check: bool = True, timeout_s: float = ASK_S
) -> subprocess.CompletedProcess[str]:
    """Run a command of the command line; with `check`, HarnessError unless it succeeds."""
    done = subprocess.run(
        [*SNAPD, *map(str, args)],
        env={**os.environ, "SNAPD_RUNTIME_DIR": str(runtime_dir)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if check and done.returncode != 0:
        raise HarnessError(f"snapd {' '.join(map(str, args))} exited {done.returncode}: {done.stderr}{done.stdout}")
    return done


class Daemon:
    """`snapd daemon` with directories of its own; a context manager.

    At the end it must stop in time, leave no process behind, and have logged nothing of level WARNING or above that was
    not allowed.
    """

    def __init__(
        self,
        *args: str,
        env: dict[str, str] | None = None,
        user: int | None = None,
        wrap: Callable[[list[str]], list[str]] | None = None,
    ) -> None:
        """Start it and wait until it answers; `args` go behind `daemon`.

        Its directories are `user`'s. `wrap` makes the command what is to be executed instead, as that user or as
        whoever is wanted; without it the daemon runs as `user`.
        """
        self.directory = Path(tempfile.mkdtemp(prefix="snapd-test-"))
        self.directory.chmod(0o755)
        if user is not None:
            os.chown(self.directory, user, user)
        self.runtime_dir = self.directory / "run"
        self.state_dir = self.directory / "state"
        self.log_path = self.directory / "daemon.log"
        self._allowed: list[re.Pattern[str]] = []
        self._judged = 0
        self._killed = self._ending = False
        environ = {
            "PYTHONFAULTHANDLER": "1",
            "SNAPD_RUNTIME_DIR": str(self.runtime_dir),
            "SNAPD_STATE_DIR": str(self.state_dir),
        }
        with undisturbed(), self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                wrap([*SNAPD, "daemon", *args]) if wrap else [*SNAPD, "daemon", *args],
                env={**os.environ, **environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=None if wrap else user,
                group=None if wrap else user,
            )
        try:
            wait_until(self._answers, "an answer on the daemon's control socket", START_S)
        except BaseException as error:
            self._clean_up()
            raise HarnessError(f"the daemon did not start: {error}\n{self._last_log}") from error

    def _answers(self) -> bool:
        if not self._killed and self.process.poll() is not None:
            raise HarnessError(f"it exited with status {self.process.returncode}")
        with contextlib.suppress(SnapdError), self.client() as client:
            client.status()
            return True
        return False

    def client(self) -> Client:
        """Return a new client of this daemon."""
        return Client(self.runtime_dir)

    def status(self) -> StatusReport:
        """Return the daemon's figures and all sessions."""
        with self.client() as client:
            return client.status()

    def session(self, pid: int) -> SessionInfo | None:
        """Return the session of a process, if it has one."""
        return next((session for session in self.status().sessions if session.pid == pid), None)

    def wait_for_session(self, pid: int, timeout_s: float = START_S) -> SessionInfo:
        """Wait until the process is managed."""
        return wait_until(lambda: self.session(pid), f"a session of process {pid}", timeout_s)

    def dump(
        self,
        pid: int,
        *,
        level: int | None = None,
        share_percent: int = 100,
        seed: int = 0,
        keep_cached: bool = False,
    ) -> DumpReport:
        """Dump once."""
        with self.client() as client:
            return client.dump(pid, DumpOptions(level, share_percent, seed, keep_cached=keep_cached))

    def restore(self, pid: int) -> RestoreReport:
        """Bring every page back."""
        with self.client() as client:
            return client.restore(pid)

    def snapd(
        self, *args: str | int | Path, check: bool = True, timeout_s: float = ASK_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command against this daemon."""
        return snapd(*args, runtime_dir=self.runtime_dir, check=check, timeout_s=timeout_s)

    def snapd_json(self, *args: str | int | Path, timeout_s: float = ASK_S) -> Reply:
        """Run a command with --json against this daemon and return its object."""
        reply: Reply = json.loads(self.snapd(*args, "--json", timeout_s=timeout_s).stdout)
        return reply

    @property
    def pid(self) -> int:
        """The daemon that serves now: the one that was started, or a successor."""
        return self.status().daemon.pid if self._killed else self.process.pid

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the daemon that serves now as a crash does; a keeper may bring up a successor."""
        pid = self.pid
        pidfd = os.pidfd_open(pid)
        try:
            self._killed = True
            signal.pidfd_send_signal(pidfd, number)
            if pid == self.process.pid:
                self.process.wait(REAP_S)
            elif not ended(pidfd, REAP_S):
                raise HarnessError(f"daemon {pid} did not end within {REAP_S:g} s of {number.name}")
        finally:
            os.close(pidfd)

    def expect_successors(self) -> None:
        """Somebody else ends the daemon: from now on the one that serves is whoever answers."""
        self._killed = True

    def wait_for_successor(self, timeout_s: float = START_S) -> int:
        """After kill(): wait until a daemon answers again and return its pid."""
        wait_until(self._answers, "a successor of the killed daemon", timeout_s)
        return self.pid

    def log(self) -> str:
        """Return all that the daemon has logged."""
        return self.log_path.read_text(errors="replace")

    def allow(self, pattern: str) -> None:
        """Let lines of any level that match the regular expression be; tracebacks have to be allowed line by line."""
        self._allowed.append(re.compile(pattern))

    @property
    def as_new(self) -> bool:
        """Whether it serves, and nobody has told it to end or has killed one of its line."""
        return not (self._killed or self._ending) and self.process.poll() is None

    @contextlib.contextmanager
    def lent(self) -> Iterator[Callable[[], str]]:
        """Judge one borrower at a time: what it allows in the log is allowed to no other, and no session may be left.

        Yields what returns the log since then.
        """
        first = len(self.log())
        yield lambda: self.log()[first:]
        if not self.as_new:
            return  # stop() judges it
        wait_until(lambda: not self.status().sessions, "the end of all sessions", REAP_S)
        lines, self._judged, self._allowed = self.unexpected_log_lines(), len(self.log()), []
        if lines:
            raise HarnessError("the daemon logged:\n" + "\n".join(lines))

    def unexpected_log_lines(self) -> list[str]:
        """Return the lines of level WARNING and above that nobody allowed."""
        return [
            line
            for line in self.log()[self._judged :].splitlines()
            if _ALARMING.search(line) and not any(pattern.search(line) for pattern in self._allowed)
        ]

    def terminate(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Tell it to end and do not wait: `stop` does, at the end at the latest."""
        self._ending = True
        self.process.send_signal(number)

    def stop(self, timeout_s: float = STOP_S) -> None:
        """End it by SIGTERM, or by SIGKILL when that takes too long; HarnessError for all that was not right."""
        if not self.directory.exists():
            return
        faults = []
        try:
            faults = self._stop(timeout_s)
            if lines := self.unexpected_log_lines():
                faults.append("it logged:\n" + "\n".join(lines))
        finally:
            self._clean_up()
        if faults:
            raise HarnessError("the daemon: " + "; ".join(faults) + f"\n{self._last_log}")

    def _stop(self, timeout_s: float) -> list[str]:
        faults = []
        group = self.process.pid
        if self._killed:
            signal_group(group, signal.SIGTERM)
        elif self.process.poll() is not None and not self._ending:
            faults.append(f"it had ended by itself with status {self.process.returncode}")
        else:
            if not self._ending:
                self.terminate()
            try:
                if self.process.wait(timeout_s) != 0:
                    faults.append(f"it was told to end, and did with status {self.process.returncode}")
            except subprocess.TimeoutExpired:
                faults.append(f"it was still there {timeout_s:g} s after it was told to end\n{threads_state(group)}")
        if not faults:
            try:
                wait_until(lambda: not living(group), "the end of all its processes", timeout_s)
            except HarnessError:
                faults.append(f"it left processes behind: {living(group)}")
        return faults

    def _clean_up(self) -> None:
        if self.process.poll() is None or living(self.process.pid):
            signal_group(self.process.pid, signal.SIGKILL)
        self.process.wait(REAP_S)
        self._last_log = self.log()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it; where a test has failed already, its error comes first."""
        try:
            self.stop()
        except HarnessError as fault:
            if error is None:
                raise
            error.add_note(str(fault))


class Spawner:
    """Starts targets, under a daemon or alone, and ends what is left of them; a context manager."""

    def __init__(self, daemon: Daemon | None = None) -> None:
        """Start nothing yet."""
        self.daemon = daemon
        self.targets: list[Target] = []

    def __call__(
        self,
        name: str,
        *args: str | int | Path,
        flags: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        user: int | None = None,
        deadline_s: float = DEADLINE_S,
        wait: bool = True,
    ) -> Target:
        """Start tests/targets/NAME.c or NAME.py and wait until it is ready and managed.

        `flags` are for the compiler. With `user`, it runs as that uid from its first instruction.
        """
        script = TARGETS / f"{name}.py"
        argv = [sys.executable, str(script)] if script.exists() else [str(build(name, *flags))]
        return self.program([*argv, *map(str, args)], env=env, user=user, deadline_s=deadline_s, wait=wait)

    def program(
        self,
        argv: list[str],
        *,
        env: dict[str, str] | None = None,
        user: int | None = None,
        deadline_s: float = DEADLINE_S,
        wait: bool = True,
    ) -> Target:
        """Start any program that speaks as the targets do (or does not, with `wait` false)."""
        environ: dict[str, str] = {}
        if self.daemon is not None and user is not None:
            environ = self._preload(self.daemon)
        elif self.daemon is not None:
            argv = [*SNAPD, "run", "--runtime-dir", str(self.daemon.runtime_dir), "--", *argv]
        with undisturbed():
            target = Target(argv, env={**environ, **(env or {})}, user=user, deadline_s=deadline_s)
            self.targets.append(target)
        if wait:
            target.ready()
            if self.daemon is not None:
                self.daemon.wait_for_session(target.pid)
        return target

    @staticmethod
    def _preload(daemon: Daemon) -> dict[str, str]:
        # `snapd run` is out of reach of another user where the interpreter or the package is in somebody's home.
        library = daemon.directory / "libsnapd-agent.so"
        if not library.exists():
            shutil.copy(library_path(), library)
        return {"LD_PRELOAD": str(library), "SNAPD_AGENT_SOCKET": str(daemon.runtime_dir / "agent.sock")}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all; where a test has failed already, its error comes first."""
        faults = []
        for target in self.targets:
            try:
                target.close()
            except HarnessError as fault:
                faults.append(str(fault))
        if faults and error is None:
            raise HarnessError("\n".join(faults))
        if faults and error is not None:
            error.add_note("\n".join(faults))
