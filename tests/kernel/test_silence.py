"""Targets whose agent does not answer, because something keeps it from running or because it never meant to.

The operation ends in time and by name, no byte is lost, nobody else waits, and the daemon ends. Nearly all of it is
waiting, so all of them wait at the same time, each under a daemon of its own.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Final

import pytest

from snapd.errors import AgentSilent, NotStopping, SnapdError, TargetStopped
from snapd.protocol.agent import Kind
from tests.harness import Daemon, Spawner, Target, build, rss_bytes, wait_until
from tests.kernel.driving import MIB, RunningDump, out_bytes
from tests.peers import lacking
from tests.processes import texts_of_threads

HEAP_MIB: Final = 16
LIMIT_S: Final = 10.0
LATE_S: Final = 13.0
SCHEDULING_S: Final = 15.0

MOODS: Final = [
    (Kind.STAGE, "before", "sleep"),
    (Kind.MOVE, "before", "sleep"),
    (Kind.MOVE, "after", "sleep"),
    (Kind.MOVE, "after", "spin"),
    (Kind.PIN, "before", "sleep"),
    (Kind.PIN, "half", "sleep"),
    (Kind.PIN, "after", "sleep"),
    (Kind.UNMAP, "before", "sleep"),
    (Kind.UNMAP, "after", "sleep"),
]


def sullen(spawn: Spawner, daemon: Daemon, kind: Kind, when: str, how: str) -> Target:
    """Start a program whose own agent says nothing more from a command of this kind on."""
    program = build("sullen")
    argv = [str(program), str(daemon.runtime_dir / "agent.sock"), "--at", str(int(kind)), "--when", when, "--how", how]
    target = spawn.program(argv, wait=False)
    target.ready()
    daemon.wait_for_session(target.pid)
    return target


Scenario = Callable[..., None]
"""May ask for `daemon`, for `spawn`, and for `alone`, which starts programs that bring an agent of their own."""

SCENARIOS: Final[dict[str, Scenario]] = {}


def run(scenario: Scenario) -> None:
    """Run one to its end; programs with an agent of their own are ended after the daemon."""
    with Spawner() as alone, Daemon() as daemon, Spawner(daemon) as spawn:
        given = {"daemon": daemon, "spawn": spawn, "alone": alone}
        try:
            scenario(**{name: given[name] for name in signature(scenario).parameters})
        except BaseException as error:
            error.add_note(daemon.log())
            raise


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[None]]]:
    """Yield the scenarios of the tests that were chosen, begun all at once."""
    chosen = {item.name for item in request.session.items} & SCENARIOS.keys()
    with ThreadPoolExecutor(max(1, len(chosen))) as pool:
        yield {name: pool.submit(run, SCENARIOS[name]) for name in sorted(chosen)}


def waits_with_the_others(scenario: Scenario) -> Callable[[dict[str, Future[None]]], None]:
    """Make a scenario a test."""
    name = scenario.__name__
    SCENARIOS[name] = scenario

    def test(running: dict[str, Future[None]]) -> None:
        running[name].result()

    test.__name__ = name
    return test


def failure(daemon: Daemon, pid: int) -> tuple[SnapdError | None, float]:
    """Dump; return what it fails with, and after how many seconds."""
    began = time.monotonic()
    error: SnapdError | None = None
    try:
        daemon.dump(pid)
    except SnapdError as caught:
        error = caught
    return error, time.monotonic() - began


@waits_with_the_others
def test_agents_that_fall_silent_cost_their_own_program_no_byte_and_nobody_else_anything(
    alone: Spawner, daemon: Daemon, spawn: Spawner
) -> None:
    daemon.allow("stays aside")
    other = spawn("hold", "--mib", HEAP_MIB)
    targets = [sullen(alone, daemon, *mood) for mood in MOODS]
    with ThreadPoolExecutor(len(targets)) as pool:
        dumps = [pool.submit(failure, daemon, target.pid) for target in targets]
        assert daemon.dump(other.pid).moved_bytes > 0.9 * HEAP_MIB * MIB
        other.ask("sum")
        assert not all(dump.done() for dump in dumps), "it waited for nobody"
        outcomes = [dump.result() for dump in dumps]
    for mood, target, (error, took_s) in zip(MOODS, targets, outcomes, strict=True):
        assert isinstance(error, AgentSilent), (mood, error)
        assert took_s < LIMIT_S + SCHEDULING_S, mood
        again, again_s = failure(daemon, target.pid)
        assert isinstance(again, AgentSilent), (mood, again)
        assert again_s < LIMIT_S / 2, mood
        target.ask("sum")
        daemon.restore(target.pid)
        assert out_bytes(daemon, target.pid) == 0, mood
        target.ask("sum")
        target.quit()


@waits_with_the_others
def test_program_stands_for_a_moment_only_while_its_agent_maps_no_staging(alone: Spawner, daemon: Daemon) -> None:
    target = sullen(alone, daemon, Kind.STAGE, "before", "sleep")
    longest_s = 0.0
    with ThreadPoolExecutor(1) as pool:
        dump = pool.submit(failure, daemon, target.pid)
        while not dump.done():
            began = time.monotonic()
            target.ask("sum")
            longest_s = max(longest_s, time.monotonic() - began)
            time.sleep(0.1)  # so many others wait for a CPU
        assert isinstance(dump.result()[0], AgentSilent)
    assert longest_s < LIMIT_S / 2
    target.quit()


@waits_with_the_others
def test_command_that_is_carried_out_late_does_no_harm(alone: Spawner, daemon: Daemon) -> None:
    daemon.allow("stays aside|was not told")
    kinds = (Kind.STAGE, Kind.UNMAP, Kind.MOVE)
    targets = [sullen(alone, daemon, kind, "before", "late") for kind in kinds]
    with ThreadPoolExecutor(len(targets)) as pool:
        for error, _ in pool.map(lambda target: failure(daemon, target.pid), targets):
            assert isinstance(error, AgentSilent), error
    time.sleep(LATE_S - LIMIT_S + 1)
    for kind, target in zip(kinds, targets, strict=True):
        target.ask("sum")
        error, _ = failure(daemon, target.pid)
        # Nobody may move memory of a program that runs: that agent has ended.
        assert isinstance(error, AgentSilent) if kind is Kind.MOVE else error is None, (kind, error)
        target.ask("sum")
        daemon.restore(target.pid)
        target.ask("sum")
        assert rss_bytes(target.pid) < 2 * HEAP_MIB * MIB
        target.quit()


@waits_with_the_others
def test_agent_that_stops_its_program_in_a_stop_keeps_the_daemon_from_nothing(alone: Spawner, daemon: Daemon) -> None:
    daemon.allow("stays aside|was not told")
    targets = [sullen(alone, daemon, kind, "after", "stop") for kind in (Kind.MOVE, Kind.PIN)]
    with ThreadPoolExecutor(len(targets)) as pool:
        dumps = [pool.submit(failure, daemon, target.pid) for target in targets]
        wait_until(lambda: all("t" in states_of(target) for target in targets), "the programs to stand")
        time.sleep(1)  # such an agent has as long as any other: as long as the daemon has time
        assert not any(dump.done() for dump in dumps)
        daemon.terminate()
        assert daemon.process.wait(30) == 0
        for dump in dumps:
            dump.result()
    for target in targets:
        target.signal(signal.SIGCONT)
        target.ask("sum")
        target.quit()


def states_of(target: Target) -> set[str]:
    """Return the letters that ps shows for its threads."""
    return {text.rpartition(")")[2].split()[0] for _, text in texts_of_threads(target.pid, "stat")}


@contextlib.contextmanager
def stopped(target: Target) -> Iterator[None]:
    """Stop a program by SIGSTOP for a while."""
    target.signal(signal.SIGSTOP)
    try:
        wait_until(lambda: "T" in states_of(target), "the stop of the program")
        yield
    finally:
        target.signal(signal.SIGCONT)


@waits_with_the_others
def test_program_that_is_stopped_in_a_dump_ends_it_by_name_and_is_dumped_when_it_goes_on(
    daemon: Daemon, spawn: Spawner
) -> None:
    daemon.allow("stays aside|could not be moved")
    hold = spawn("hold", "--mib", 256)
    dump = RunningDump(daemon, hold.pid)
    with stopped(hold):
        outcome = dump.outcome(LIMIT_S + SCHEDULING_S)
        assert isinstance(outcome, TargetStopped), outcome
        with pytest.raises(TargetStopped):
            daemon.dump(hold.pid)
        daemon.restore(hold.pid)
        assert out_bytes(daemon, hold.pid) == 0
    hold.ask("sum")
    # What could not be dropped goes when the agent answers again: nothing of the heap is there twice.
    wait_until(lambda: rss_bytes(hold.pid) < 300 * MIB, "the stagings to be dropped")
    daemon.dump(hold.pid)
    hold.ask("sum")
    hold.quit()


def is_back(pid: int) -> bool:
    """Whether the whole heap of a program is in memory."""
    return rss_bytes(pid) > HEAP_MIB * MIB


@waits_with_the_others
def test_daemon_gives_everybody_back_and_ends_though_one_program_is_stopped(daemon: Daemon, spawn: Spawner) -> None:
    daemon.allow("was not told|stays aside|could not be moved")
    others = [spawn("hold", "--mib", HEAP_MIB) for _ in range(3)]
    hold = spawn("hold", "--mib", 128)
    for target in (*others, hold):
        daemon.dump(target.pid)
    hold.ask("write", 30000, 1)
    dump = RunningDump(daemon, hold.pid)
    with stopped(hold):
        daemon.terminate()
        for target in others:
            wait_until(partial(is_back, target.pid), "the other programs to be back", 10)
        assert daemon.process.wait(30) == 0
        assert f"pid {hold.pid}: has everything back, and was not told" in daemon.log()
        dump.outcome()
    for target in (*others, hold):
        target.ask("sum")
        target.quit()


@contextlib.contextmanager
def frozen(target: Target) -> Iterator[None]:
    """Freeze a program by a cgroup of its own, of either version."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    places = [(Path(at), kind) for _, at, kind, options, *_ in mounts if kind == "cgroup2" or "freezer" in options]
    if not places:
        lacking("no cgroup file system with a freezer is mounted")
    top, kind = places[0]
    group = top / f"snapd-test-{target.pid}"
    switch, on, off = ("cgroup.freeze", "1", "0") if kind == "cgroup2" else ("freezer.state", "FROZEN", "THAWED")
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(target.pid))
        (group / switch).write_text(on)
        try:
            time.sleep(0.2)
            yield
        finally:
            (group / switch).write_text(off)
            (top / "cgroup.procs").write_text(str(target.pid))
    finally:
        group.rmdir()


@waits_with_the_others
def test_frozen_program_is_refused_restored_and_given_back(daemon: Daemon, spawn: Spawner) -> None:
    daemon.allow("was not told|stays aside|could not be moved")
    hold = spawn("hold", "--mib", HEAP_MIB)
    daemon.dump(hold.pid)
    hold.ask("write", 2000, 1)
    with frozen(hold):
        error, took_s = failure(daemon, hold.pid)
        assert isinstance(error, AgentSilent | NotStopping | TargetStopped), error
        assert took_s < LIMIT_S + SCHEDULING_S
        daemon.restore(hold.pid)
        assert out_bytes(daemon, hold.pid) == 0
    hold.ask("sum")
    wait_until(lambda: failure(daemon, hold.pid)[0] is None, "a dump of the program that goes on")
    with frozen(hold):
        daemon.terminate()
        assert daemon.process.wait(30) == 0
    hold.ask("sum")
    hold.quit()
