"""A daemon of the bench's own, and the programs that are measured under it; whatever happens nothing is left behind.

It starts both as any user does, by the command line and the preloaded library. Knows nothing of what is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Self, cast

from snapd import directories
from snapd.agent import library_path
from snapd.bench import program_path
from snapd.client import Client
from snapd.errors import Internal, NoDaemon, NotManageable

if TYPE_CHECKING:
    from types import TracebackType

    from snapd.protocol.reports import SessionInfo

START_S: Final = 30.0
STOP_S: Final = 120.0
POLL_S: Final = 0.01
_PR_SET_PDEATHSIG: Final = 1
_ALARM: Final = re.compile(r"^snapd: (?:WARNING|ERROR|CRITICAL): |^Traceback |^Fatal Python error")

Reply = dict[str, Any]


class PrivateDaemon:
    """`snapd daemon` with directories of its own; a context manager. Start it before there are other threads."""

    def __init__(self, state_dir: Path) -> None:
        """Serve; the stores are below `state_dir`, which is made when it is missing and removed again then."""
        self._scratch = Path(tempfile.mkdtemp(prefix="snapd-bench-"))
        self.runtime_dir = self._scratch / "run"
        self._log = self._scratch / "daemon.log"
        self._made = [one for one in (state_dir, *state_dir.parents) if not one.exists()]
        try:
            directories.make_state_dir(state_dir)
            self.state_dir = Path(tempfile.mkdtemp(prefix="bench-", dir=state_dir))
            self._process = self._start()
        except BaseException:
            self._remove()
            raise

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "snapd", "daemon"]
        # Wherever the package was installed, the daemon is the one that came with it.
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environ = {
            **os.environ,
            "PYTHONPATH": path,
            "SNAPD_RUNTIME_DIR": str(self.runtime_dir),
            "SNAPD_STATE_DIR": str(self.state_dir),
        }
        libc = ctypes.CDLL(None)
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                # A bench that is killed leaves no daemon. There is no other thread yet that could hold a lock.
                preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),  # noqa: PLW1509
            )

    @property
    def pid(self) -> int:
        """The daemon's pid."""
        return self._process.pid

    def client(self) -> Client:
        """Return a client of it."""
        return Client(self.runtime_dir)

    def wait_for_answer(self) -> None:
        """Wait until it serves; raises Internal with what it said when it does not."""
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(NoDaemon), self.client() as client:
                client.status()
                return
            if self._process.poll() is not None or time.monotonic() > end:
                raise Internal(f"the daemon does not start: {self.last_line()}")
            time.sleep(POLL_S)

    def wait_for_session(self, pid: int) -> SessionInfo:
        """Wait until a process is managed; raises NotManageable with what the daemon said when it comes not to be."""
        end = time.monotonic() + START_S
        with self.client() as client:
            while True:
                for one in client.status().sessions:
                    if one.pid == pid:
                        return one
                if time.monotonic() > end:
                    raise NotManageable("load", f"it did not come to be managed; the daemon said: {self.last_line()}")
                time.sleep(POLL_S)

    def last_line(self) -> str:
        """Return the last line of the log."""
        return (self._lines() or ["nothing"])[-1]

    def alarms(self) -> list[str]:
        """Return what it complained of."""
        return [line for line in self._lines() if _ALARM.search(line)]

    def _lines(self) -> list[str]:
        return self._log.read_text(errors="replace").splitlines() if self._log.exists() else []

    def __enter__(self) -> Self:
        """Wait until it serves."""
        try:
            self.wait_for_answer()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it; where something went wrong before, what the daemon said of it is a note of that error."""
        alarms = self.alarms()
        status = self._end()
        if error is not None:
            for line in alarms[:10]:
                error.add_note(f"the daemon said: {line}")
        elif status:
            raise Internal(f"the daemon of the bench ended with status {status}: {' / '.join(alarms[:3])}")

    def _end(self) -> int:
        self._process.terminate()
        try:
            return self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            if self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)
        if (state_dir := getattr(self, "state_dir", None)) is not None:
            shutil.rmtree(state_dir, ignore_errors=True)
        for directory in self._made:
            with contextlib.suppress(OSError):  # somebody else may use it by now
                directory.rmdir()


class Load:
    """One process of the program "load", by default under the daemon; a context manager that ends it."""

    def __init__(
        self,
        daemon: PrivateDaemon,
        *arguments: str | int,
        members: Path | None = None,
        deadline_s: float = 600.0,
    ) -> None:
        """Start it; entering waits until its heap is there and managed. One reply may take `deadline_s`.

        `members` is the file of a control group to which it writes its pid first.
        """
        library = str(library_path())
        if any(c in library for c in ": "):
            raise NotManageable("load", "the agent's path has a colon or a space in it")
        socket = directories.socket_address(daemon.runtime_dir, directories.AGENT_SOCKET)
        self._daemon = daemon
        self._deadline_s = deadline_s
        self._pending = b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        command = [str(program_path("load")), *map(str, arguments)]
        if members is not None:
            command += ["--members", str(members)]
        self._process = subprocess.Popen(
            command,
            env={**os.environ, "LD_PRELOAD": library, "SNAPD_AGENT_SOCKET": socket},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._stdin = cast("IO[bytes]", self._process.stdin)
        self._stdout = cast("IO[bytes]", self._process.stdout)

    def __enter__(self) -> Self:
        """Wait until it is managed."""
        try:
            self.receive()
            self._daemon.wait_for_session(self.pid)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.close()

    def ask(self, command: str, *arguments: int) -> Reply:
        """Give it a command and return the reply; raises Internal when a byte was wrong."""
        try:
            self._stdin.write(f"{' '.join([command, *map(str, arguments)])}\n".encode())
            self._stdin.flush()
        except OSError as error:
            raise self._failure(f"it does not take {command!r}") from error
        return self.receive()

    def receive(self) -> Reply:
        """Return its next line as an object."""
        end = time.monotonic() + self._deadline_s
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        while b"\n" not in self._pending:
            if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                raise self._failure(f"it did not answer within {self._deadline_s:g} s")
            data = os.read(self._stdout.fileno(), 1 << 16)
            if not data:
                raise self._failure("it ended")
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        reply: Reply = json.loads(line)
        if not reply.get("ok"):
            raise self._failure(f"it answered {reply}")
        return reply

    def _failure(self, what: str) -> Internal:
        said = os.pread(self._stderr.fileno(), 4096, 0).decode(errors="replace").strip()
        return Internal(f"the program that is measured failed: {what} {said}")

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        for stream in (self._stdin, self._stdout, self._stderr):
            with contextlib.suppress(OSError):
                stream.close()
