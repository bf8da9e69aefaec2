"""Torture: random parts of a program and of all its children are dumped at random moments until it ends.

Owns when and what is dumped, all of it drawn from one seed, and what is noted meanwhile. It drives a daemon through its
control socket as any client does; who started daemon and program is not its business. Nothing is restored to make life
easy: whatever the program does it does to memory that is partly out.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from snapd.client import AsyncClient
from snapd.errors import (
    Internal,
    NoDaemon,
    NoSuchProcess,
    NotCooperating,
    NotManageable,
    NotStopping,
    ProtocolError,
    SessionBusy,
    SharedMemory,
    TargetGone,
    TargetStopped,
    TargetTraced,
)
from snapd.pages import PAGE
from snapd.protocol.options import DumpOptions
from snapd.protocol.reports import DumpReport, Report, Totals

if TYPE_CHECKING:
    from pathlib import Path

    from snapd.protocol.reports import StatusReport

WATCH_S: Final = 0.1
"""How often sessions are looked for and their memory is looked at, on average: each look is a walk over page maps."""

ATTACH_S: Final = 15.0
"""A program that was not managed after this time never will be."""

MIN_PERCENT: Final = 5
_ENDED: Final = (TargetGone, NoSuchProcess, NotCooperating)
_LATER: Final = (NotStopping, SessionBusy, SharedMemory, TargetStopped, TargetTraced)


@dataclass(frozen=True, slots=True)
class TortureReport(Report):
    """What became of a program under torture.

    `exit_status` or `signal` is the program's own. `out_share_least`, `_median` and `_random` are of all looks, each at
    a moment that nothing chose: the share of the managed processes' memory that was out of it; None without any look.
    `put_off` has the dumps that could not be done, by the error's name, `skipped` the most that any dump left alone, by
    reason. The other figures are sums over all dumps and all processes.
    """

    seed: int
    interval_s: float
    exit_status: int | None
    signal: int | None
    duration_s: float
    sessions: int
    dumps: int
    moved_pages: int
    clean_pages: int
    zero_pages: int
    pinned_pages: int
    stored_bytes: int
    stops: int
    longest_stop_us: int
    pieces_put_off: int
    faults: int
    fills: int
    fills_by_source: dict[str, int]
    retries: int
    bad_pages: int
    events: dict[str, int]
    out_share_least: float | None
    out_share_median: float | None
    out_share_random: float | None
    looks: int
    skipped: dict[str, int] = field(default_factory=dict, hash=False)
    put_off: dict[str, int] = field(default_factory=dict, hash=False)


class Torture:
    """One run: dumps whatever the daemon of `runtime_dir` manages until told that the program has ended."""

    def __init__(
        self, runtime_dir: Path, cmd: str, *, seed: int, interval_s: float, attach_pid: int | None = None
    ) -> None:
        """Torment `cmd` by what `seed` decides; a process is left alone for `interval_s` between dumps, on average.

        With `attach_pid` it has no agent: that process is attached, and all its descendants.
        """
        self._runtime_dir = runtime_dir
        self._attach_pid = attach_pid
        self._cmd = cmd
        self._seed = seed
        self._interval_s = interval_s
        self._rng = random.Random(f"{seed}")  # noqa: S311 - it must repeat
        self._sums: Counter[str] = Counter()
        self._longest_stop_us = 0
        self._skipped: Counter[str] = Counter()
        self._put_off: Counter[str] = Counter()
        self._shares: list[float] = []
        self._tormented: set[int] = set()
        self._seen = 0
        self._totals = Totals()

    async def until(self, program_fd: int, daemon_fd: int) -> None:
        """Torment until the pidfd `program_fd` says that the program has ended.

        Raises NotManageable when the program does not come to be managed, Internal when the daemon ended.
        """
        try:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                nursery.start_soon(self._watch, nursery)
                nursery.start_soon(_daemon_must_live, daemon_fd)
                await trio.lowlevel.wait_readable(program_fd)
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as errors:
            error = _first(errors)
            if isinstance(error, (NoDaemon, ProtocolError)):  # which may be what a dying daemon looks like
                with trio.move_on_after(1):
                    await _daemon_must_live(daemon_fd)
            raise error from errors
        async with AsyncClient(self._runtime_dir) as client:
            self._totals = (await client.status()).totals

    async def _watch(self, nursery: trio.Nursery) -> None:
        began = trio.current_time()
        async with AsyncClient(self._runtime_dir) as client:
            while True:
                if self._attach_pid is not None:
                    await self._attach(client, self._attach_pid)
                status = await client.status()
                self._look(status)
                for pid in sorted({one.pid for one in status.sessions if one.pid} - self._tormented):
                    self._tormented.add(pid)
                    self._seen += 1
                    nursery.start_soon(self._torment, pid, self._seen)
                if not status.totals.sessions and trio.current_time() - began > ATTACH_S:
                    raise NotManageable(self._cmd, f"it was not managed within {ATTACH_S:g} s")
                # At moments with exponential gaps a look sees what any moment sees.
                await trio.sleep(self._rng.expovariate(1 / WATCH_S))

    async def _attach(self, client: AsyncClient, pid: int) -> None:
        try:
            await client.attach(pid, tree=True)
        except (*_ENDED, *_LATER) as error:  # it is between two programs, or about to end
            self._put_off[type(error).__name__] += 1

    def _look(self, status: StatusReport) -> None:
        out = sum(one.swapped_bytes for one in status.sessions)
        if everything := out + sum(one.resident_bytes for one in status.sessions):
            self._shares.append(out / everything)

    async def _torment(self, pid: int, number: int) -> None:
        rng = random.Random(f"{self._seed}/{number}")  # noqa: S311 - it must repeat
        try:
            async with AsyncClient(self._runtime_dir) as client:
                while True:
                    await trio.sleep(rng.expovariate(1 / self._interval_s))
                    options = DumpOptions(
                        level=rng.choice((-5, 1)),
                        share_percent=rng.randint(MIN_PERCENT, 100),
                        seed=rng.getrandbits(31),
                    )
                    try:
                        self._add(await client.dump(pid, options))
                    except _LATER as error:
                        self._put_off[type(error).__name__] += 1
        except _ENDED as error:
            self._put_off[type(error).__name__] += 1
        finally:
            # The pid may be another's soon, or have another program after an exec, or an agent at last.
            self._tormented.discard(pid)

    def _add(self, report: DumpReport) -> None:
        self._sums["dumps"] += 1
        for name in ("moved", "clean", "zero", "pinned"):
            self._sums[f"{name}_pages"] += getattr(report, f"{name}_bytes") // PAGE
        for name in ("stored_bytes", "stops", "pieces_put_off"):
            self._sums[name] += getattr(report, name)
        self._longest_stop_us = max(self._longest_stop_us, report.longest_stop_us)
        self._skipped |= Counter(report.skipped)

    def report(self, *, exit_status: int | None, signal: int | None, duration_s: float) -> TortureReport:
        """Return the figures so far."""
        totals, shares = self._totals, self._shares
        by_source = {"zero": totals.filled_zero, "aside": totals.filled_aside, "store": totals.filled_stored}
        return TortureReport(
            seed=self._seed,
            interval_s=self._interval_s,
            exit_status=exit_status,
            signal=signal,
            duration_s=duration_s,
            sessions=totals.sessions,
            longest_stop_us=self._longest_stop_us,
            **{name: self._sums[name] for name in _SUMS},
            faults=totals.faults,
            fills=sum(by_source.values()),
            fills_by_source=by_source,
            retries=totals.retries,
            bad_pages=totals.bad_pages,
            events={
                "fork": totals.forks,
                "remove": totals.removes,
                "remap": totals.remaps,
                "unmap": totals.unmaps,
            },
            out_share_least=min(shares, default=None),
            out_share_median=statistics.median(shares) if shares else None,
            out_share_random=self._rng.choice(shares) if shares else None,
            looks=len(shares),
            skipped=dict(self._skipped),
            put_off=dict(self._put_off),
        )


_SUMS: Final = (
    "dumps",
    "moved_pages",
    "clean_pages",
    "zero_pages",
    "pinned_pages",
    "stored_bytes",
    "stops",
    "pieces_put_off",
)


async def _daemon_must_live(daemon_fd: int) -> None:
    await trio.lowlevel.wait_readable(daemon_fd)
    raise Internal("the daemon ended by itself")


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return what went wrong first: when the daemon dies, that and not what its clients say."""
    flat: list[BaseException] = []
    pending: list[BaseException] = [errors]
    while pending:
        error = pending.pop()
        if isinstance(error, BaseExceptionGroup):
            pending += error.exceptions
        else:
            flat.append(error)
    return next((one for one in flat if isinstance(one, Internal)), flat[0])
