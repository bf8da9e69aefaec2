"""One target: how it is compiled, started, asked and ended. Knows nothing of daemons and sessions.

A target is any of tests/targets, or another program: it speaks lines of JSON, each an object, and fails by its status.
"""

import contextlib
import hashlib
import json
import os
import select
import signal
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

from tests.processes import ASK_S, REAP_S, HarnessError, ended, living, signal_group, threads_state

TARGETS = Path(__file__).parent / "targets"
HEADERS = (*sorted(TARGETS.glob("*.h")), *sorted((Path(__file__).parents[1] / "snapd/bench").glob("*.h")))
C_FLAGS = ("-std=gnu11", "-O2", "-g", "-pthread")
DEADLINE_S = 100.0
"""Below pytest's own limit for a test, so that a target which hangs is the first to be ended, with its state shown."""

Reply = dict[str, Any]


def build(name: str, *flags: str) -> Path:
    """Compile tests/targets/NAME.c, or find it compiled: the cache's key is the sources, the compiler and the flags."""
    compiler = os.environ.get("CC", "cc")
    key = hashlib.blake2b(" ".join((compiler, *C_FLAGS, *flags)).encode(), digest_size=12)
    for source in (TARGETS / f"{name}.c", *HEADERS):
        key.update(source.read_bytes())
    cache = _cache()
    binary = cache / key.hexdigest() / name
    if not binary.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / name
            subprocess.run([compiler, *C_FLAGS, *flags, str(TARGETS / f"{name}.c"), "-o", str(made)], check=True)
            made.chmod(0o755)
            binary.parent.mkdir(mode=0o755, exist_ok=True)
            made.replace(binary)
    return binary


def _cache() -> Path:
    # In a place that other users can reach: some tests run their target as somebody else.
    given = os.environ.get("SNAPD_TEST_CACHE")
    cache = Path(given or f"{tempfile.gettempdir()}/snapd-tests-{os.geteuid()}")
    cache.mkdir(mode=0o755, parents=True, exist_ok=True)
    found = cache.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise HarnessError(f"{cache} is somebody else's; SNAPD_TEST_CACHE can name another directory")
    return cache


class Target:
    """One target in a process group of its own; ends by SIGKILL at its deadline, however it is stuck."""

    def __init__(
        self,
        argv: list[str],
        *,
        env: dict[str, str] | None = None,
        user: int | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        """Start it; `ready()` waits until it has built its heap."""
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        self.process = subprocess.Popen(
            argv,
            env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
        self.pid = self.process.pid
        self.pidfd = os.pidfd_open(self.pid)
        assert self.process.stdout is not None
        self._stdout = self.process.stdout.fileno()
        self._pending = b""
        self._failure_expected = False
        self.overdue = False
        self._state_at_deadline = ""
        self._lock = threading.Lock()
        self._guard = threading.Timer(deadline_s, self._end_at_deadline)
        self._guard.daemon = True
        self._guard.start()

    def _end_at_deadline(self) -> None:
        with self._lock:
            if self.process.returncode is None:
                self.overdue = True
                self._state_at_deadline = threads_state(self.pid)
                signal_group(self.pid, signal.SIGKILL)

    def stderr(self) -> str:
        """Return what it has written to its standard error."""
        return os.pread(self._stderr.fileno(), 1 << 20, 0).decode(errors="replace")

    def _fail(self, what: str) -> HarnessError:
        why = f"; it was ended at its deadline\n{self._state_at_deadline}" if self.overdue else ""
        return HarnessError(f"target {self.pid}: {what}{why}\n{self.stderr()}")

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet."""
        return not ended(self.pidfd, 0)

    def send(self, command: str, *arguments: int) -> None:
        """Give it a command and do not wait; `receive()` has the reply."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{' '.join([command, *map(str, arguments)])}\n".encode())
            self.process.stdin.flush()
        except OSError as error:
            raise self._fail(f"it does not take {command!r}: {error}") from error

    def receive(self, timeout_s: float = ASK_S) -> Reply:
        """Return its next line as an object; HarnessError when none comes, or when it is the line of a failure."""
        end = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        while b"\n" not in self._pending:
            if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                raise self._fail(f"no line within {timeout_s:g} s\n{threads_state(self.pid)}")
            data = os.read(self._stdout, 1 << 16)
            if not data:
                raise self._fail("it ended before its line")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        reply: Reply = json.loads(line)
        if reply.get("ok") is False:
            raise self._fail(f"it answered {reply}")
        return reply

    def ask(self, command: str, *arguments: int, timeout_s: float = ASK_S) -> Reply:
        """Give it a command and return the reply."""
        self.send(command, *arguments)
        return self.receive(timeout_s)

    def ready(self, timeout_s: float = ASK_S) -> Reply:
        """Wait until its heap is built."""
        reply = self.receive(timeout_s)
        if not reply.get("ready"):
            raise self._fail(f"its first line was {reply}")
        return reply

    def wait(self, timeout_s: float = ASK_S) -> int:
        """Wait for its end and return its status, negative for a signal; for the test that expects a failure."""
        if not ended(self.pidfd, timeout_s):
            raise self._fail(f"it did not end within {timeout_s:g} s\n{threads_state(self.pid)}")
        self._failure_expected = True
        with self._lock:
            return self.process.wait(REAP_S)

    def result(self, timeout_s: float = ASK_S) -> Reply:
        """Wait for its end, which must be a good one, and return its last line."""
        end = time.monotonic() + timeout_s
        reply = self.receive(timeout_s)
        if status := self.wait(end - time.monotonic() + REAP_S):
            raise self._fail(f"it exited with status {status} after {reply}")
        return reply

    def quit(self) -> None:
        """End a target with a command loop; its exit status must be 0."""
        self.ask("quit")
        if status := self.wait():
            raise self._fail(f"it exited with status {status} after quit")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the target, not to its children."""
        signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        """End it and its children now, and reap it; that it had to be is no failure."""
        self._failure_expected = True
        self._reap()

    def _reap(self) -> None:
        with self._lock:
            # Also where the target itself has ended: its children are in the group, which nobody else can have yet.
            if self.process.returncode is None or living(self.pid):
                signal_group(self.pid, signal.SIGKILL)
            if not ended(self.pidfd, REAP_S):
                raise self._fail(f"SIGKILL did not end it within {REAP_S:g} s\n{threads_state(self.pid)}")
            self.process.wait(REAP_S)

    def close(self) -> None:
        """Make sure that nothing of it is left; HarnessError when it had ended badly and nobody had asked."""
        self._guard.cancel()
        try:
            by_itself = not self.alive
            self._reap()
            if self.overdue or (by_itself and self.process.returncode and not self._failure_expected):
                raise self._fail(f"it ended with status {self.process.returncode}")
        finally:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            for stream in (self.process.stdin, self.process.stdout, self._stderr):
                with contextlib.suppress(OSError):
                    stream.close()
            os.close(self.pidfd)
