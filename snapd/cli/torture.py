"""`snapd torture`: runs a command under a daemon of its own, which dumps random parts of it until it ends.

Owns the two processes, their signals and the command's end. What is dumped when is snapd/torture.py's.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import secrets
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from snapd.cli import output, run
from snapd.client import Client
from snapd.errors import CommandNotFound, Internal, NoDaemon, NotManageable, SnapdError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from snapd.torture import TortureReport

START_S: Final = 30.0
STOP_S: Final = 120.0
POLL_S: Final = 0.02
LAST_LINES: Final = 10
"""What is shown of the log at most."""
_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_PR_SET_PDEATHSIG: Final = 1
_MAX_SEED: Final = (1 << 32) - 1
_ALARM: Final = re.compile(r"^snapd: (?:WARNING|ERROR|CRITICAL): |^Traceback |^Fatal Python error")
_FORWARDED: Final = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGCONT,
    signal.SIGWINCH,
)


def _seconds(_ctx: click.Context, _param: click.Parameter, value: str) -> float:
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)(us|ms|s)", value)
    if not found or not float(found[1]):
        raise click.BadParameter("a time above zero with its unit is wanted, such as 20ms or 1.5s")
    return float(found[1]) * _UNITS[found[2]]


@click.command(
    short_help="Run a command and dump random parts of it until it ends.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", metavar="-- CMD [ARG]...", nargs=-1, required=True, type=click.UNPROCESSED)
@click.option(
    "--seed",
    type=click.IntRange(0, _MAX_SEED),
    metavar="N",
    help="What decides when and what is dumped; a random number, which is said, when left out.",
)
@click.option(
    "--interval",
    "interval_s",
    callback=_seconds,
    default="20ms",
    show_default=True,
    metavar="TIME",
    help="How long a process is left alone between two dumps, on average.",
)
@click.option("--attach", is_flag=True, help="Start CMD without an agent, and attach it and its children.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object behind what the command prints.")
def command(arguments: tuple[str, ...], seed: int | None, interval_s: float, attach: bool, as_json: bool) -> None:
    """Run CMD as 'snapd run' does, and dump random parts of it and its children at random moments until it ends.

    The daemon is a private one, in a temporary directory (TMPDIR). Exit status: CMD's own, ended by its signal if it
    was. The figures go to stderr, with --json to stdout. Whatever goes wrong, the seed is said.
    """
    seed = secrets.randbelow(_MAX_SEED + 1) if seed is None else seed
    with output.errors_as_json(as_json):
        reason = None if attach else run.obstacle_to_managing(arguments[0])
        if reason is not None:
            raise NotManageable(arguments[0], reason)
        if shutil.which(arguments[0]) is None:
            raise CommandNotFound(arguments[0])
        try:
            report, alarms = _torture(arguments, seed, interval_s, attach=attach)
        except BaseException:
            output.complain(f"the seed was {seed}")
            raise
    _show(report, as_json=as_json)
    for line in alarms[:LAST_LINES]:
        output.complain(f"the daemon said: {line}")
    if len(alarms) > LAST_LINES:
        output.complain(f"and {len(alarms) - LAST_LINES} lines more of that kind")
    if report.exit_status or report.signal or alarms:
        output.complain(f"the seed was {seed}")
    output.flush()
    if report.bad_pages or (alarms and not report.exit_status and not report.signal):
        raise Internal(f"{report.bad_pages} pages were lost" if report.bad_pages else "the daemon complained")
    _end_as(report.exit_status, report.signal)


def _torture(
    arguments: Sequence[str], seed: int, interval_s: float, *, attach: bool
) -> tuple[TortureReport, list[str]]:
    from snapd.torture import Torture

    with tempfile.TemporaryDirectory(prefix="snapd-torture-") as directory:
        # A command that changes its user must reach the sockets.
        Path(directory).chmod(0o755)
        runtime_dir, log = Path(directory, "run"), Path(directory, "daemon.log")
        with _daemon(runtime_dir, Path(directory, "state"), log) as daemon_fd:
            began = time.monotonic()
            environ = dict(os.environ) if attach else run.environment(runtime_dir)
            with _program(arguments, environ) as child:
                torture = Torture(
                    runtime_dir,
                    arguments[0],
                    seed=seed,
                    interval_s=interval_s,
                    attach_pid=child.pid if attach else None,
                )
                _torment(torture, child, daemon_fd)
                status = child.wait()
            duration_s = time.monotonic() - began
        exit_status = os.waitstatus_to_exitcode(status)
        report = torture.report(
            exit_status=exit_status if exit_status >= 0 else None,
            signal=-exit_status if exit_status < 0 else None,
            duration_s=duration_s,
        )
        return report, [one for one in _lines(log) if _ALARM.search(one)]


def _torment(torture: Any, child: _Child, daemon_fd: int) -> None:
    import trio

    trio.run(torture.until, child.fd, daemon_fd)


class _Child:
    """A child of ours, known by its pidfd; signals that come to us go to it."""

    def __init__(self, work: Callable[[], None]) -> None:
        """Start a process that does `work` and then ends."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _be_child(work)
        self.fd = os.pidfd_open(self.pid)
        self._status: int | None = None

    def wait(self) -> int:
        """Return how it ended, as waitpid does; waits for that."""
        if self._status is None:
            self._status = os.waitpid(self.pid, 0)[1]
        return self._status

    def ended(self, within_s: float = 0.0) -> bool:
        """Whether it has ended, or does so in time."""
        end = time.monotonic() + within_s
        while self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = status
            elif time.monotonic() >= end:
                return False
            else:
                time.sleep(POLL_S)
        return True

    def signal(self, number: int) -> None:
        """Send a signal; nothing happens when it has ended."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, number)


def _be_child(work: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        work()
        code = 0
    except SnapdError as error:
        output.complain(error.render())
        code = error.exit_code
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


@contextmanager
def _daemon(runtime_dir: Path, state_dir: Path, log: Path) -> Generator[int, None, None]:
    """Serve for a while; yields the daemon's pidfd."""

    def serve() -> None:
        from snapd.daemon import start
        from snapd.daemon.room import MinFree

        # Ctrl-C is for the command. Without us nobody would end the daemon; it gives everything back first.
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        with Path(os.devnull).open("rb") as nothing, log.open("ab", buffering=0) as said:
            os.dup2(nothing.fileno(), 0)
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        start.serve(runtime_dir, state_dir, MinFree(), None)

    child = _Child(serve)
    try:
        _wait_for_daemon(child, runtime_dir, log)
        yield child.fd
    except BaseException:
        for line in _lines(log)[-LAST_LINES:]:
            output.complain(f"the daemon said: {line}")
        raise
    finally:
        child.signal(signal.SIGTERM)
        if not child.ended(STOP_S):
            child.signal(signal.SIGKILL)
            child.wait()
            raise Internal(f"the daemon did not end within {STOP_S:g} s")
    if child.wait():
        raise Internal(f"the daemon ended with status {child.wait():#x}: {_last_line(log)}")


def _wait_for_daemon(child: _Child, runtime_dir: Path, log: Path) -> None:
    end = time.monotonic() + START_S
    while True:
        with suppress(NoDaemon), Client(runtime_dir) as client:
            client.status()
            return
        if child.ended(POLL_S) or time.monotonic() > end:
            raise Internal(f"the daemon does not start: {_last_line(log)}")


def _last_line(log: Path) -> str:
    return (_lines(log) or ["it said nothing"])[-1]


def _lines(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines() if log.exists() else []


@contextmanager
def _program(arguments: Sequence[str], environ: dict[str, str]) -> Generator[_Child, None, None]:
    """Run the command in the foreground, signals passed on; it is killed when the block ends by an error."""
    child = _Child(lambda: run.execute(tuple(arguments), environ))

    def forward(number: int, _frame: object) -> None:
        if number not in (signal.SIGINT, signal.SIGQUIT) or not _in_foreground():
            child.signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield child
    except BaseException:
        child.signal(signal.SIGKILL)
        child.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    """Whether Ctrl-C comes from a terminal, which sends it to the command as well."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _end_as(exit_status: int | None, number: int | None) -> NoReturn:
    if number:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command has left one, if any
        with suppress(OSError):  # SIGKILL needs no handler taken away
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        sys.exit(128 + number)
    sys.exit(exit_status or 0)


def _show(report: TortureReport, *, as_json: bool) -> None:
    if as_json:
        output.json_line(report.to_json())
        return
    sources = ", ".join(f"{count} from {name}" for name, count in report.fills_by_source.items())
    events = ", ".join(f"{count} {name}" for name, count in report.events.items())
    for words in (
        (
            f"torture with --seed {report.seed}: {output.duration(report.duration_s)}",
            output.counted(report.sessions, "session"),
            output.counted(report.dumps, "dump"),
            f"{report.moved_pages} pages moved",
            f"{report.pinned_pages} pinned",
        ),
        (
            f"  {output.counted(report.stops, 'stop')}",
            f"the longest {output.duration(report.longest_stop_us / 1e6)}",
            output.counted(report.faults, "fault"),
            f"{output.counted(report.fills, 'fill')} ({sources})",
            f"{report.retries} retries",
        ),
        (f"  events: {events}",),
        (
            f"  out of memory: {_share(report.out_share_least)} at least",
            f"{_share(report.out_share_median)} median",
            f"{_share(report.out_share_random)} at a random moment",
            f"in {output.counted(report.looks, 'look')}",
        ),
    ):
        click.echo("snapd: " + ", ".join(words), err=True)


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
