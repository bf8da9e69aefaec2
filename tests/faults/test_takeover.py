"""A daemon may be killed at any instruction: its keeper takes over, every byte is there, and nobody waits long.

SNAPD_TEST_KILLS makes the random test longer; the torture-marked one has 300, or SNAPD_TEST_TORTURE_KILLS, and that of
daemon and keeper together has 50 deaths, or SNAPD_TEST_TORTURE_DEATHS.
"""

import contextlib
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import pytest

from tests.faults.deaths import (
    SETTLED_S,
    Busy,
    Dumping,
    Killer,
    PageMap,
    allow_deaths,
    daemon_of,
    found_phases,
    kill_pid,
    pause,
    start_by_hand,
    waits_ms,
)
from tests.harness import Daemon, HarnessError, Spawner, Target, wait_until
from tests.kernel.driving import MIB, Figures, out_bytes

KILLS = int(os.environ.get("SNAPD_TEST_KILLS", "8"))
TORTURE_KILLS = int(os.environ.get("SNAPD_TEST_TORTURE_KILLS", "300"))
TORTURE_BREATH_S = 4.5
TAKEOVER_S = 0.15
DEATHS_APART_S = 4.5
SHORT_STOP_S, LONG_STOP_S = 3.0, 30.0
TORTURE_DEATHS = int(os.environ.get("SNAPD_TEST_TORTURE_DEATHS", "50"))
LONGEST_WAIT_MS = 1000.0
MEDIAN_WAIT_MS = 200.0
LEAST_OF_A_PHASE = 10 * TORTURE_KILLS // 300


def test_a_killed_daemon_is_succeeded_and_nothing_is_lost(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 48)
    before = hold.ask("sum")["sum"]
    daemon.dump(hold.pid)
    assert out_bytes(daemon, hold.pid) > 40 * MIB
    keeper_pid = daemon.status().daemon.keeper_pid
    allow_deaths(daemon)
    daemon.kill()
    assert hold.ask("touch", 200, 7)["ok"]
    assert daemon.wait_for_successor() == keeper_pid
    assert hold.ask("sum")["sum"] == before
    daemon.wait_for_session(hold.pid)
    daemon.dump(hold.pid)
    assert out_bytes(daemon, hold.pid) > 40 * MIB
    assert hold.ask("sum")["sum"] == before
    assert daemon.status().daemon.keeper_pid not in (None, keeper_pid)


CUT = ("move", "pin")
"""A stop that is cut: pages are in two or three places."""


@pytest.mark.parametrize("phases", [CUT, ("store",), ("drop",)], ids="-".join)
def test_what_was_on_its_way(daemon: Daemon, spawn: Spawner, phases: tuple[str, ...]) -> None:
    hold = spawn("hold", "--mib", 48)
    _kill_in(daemon, hold, phases, Busy(hold, ("write", 400)))
    assert hold.ask("sum")["ok"]
    daemon.dump(hold.pid)
    daemon.restore(hold.pid)
    assert hold.ask("sum")["ok"]


def test_forks_while_a_stop_is_cut(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 32)
    _kill_in(daemon, hold, CUT, Busy(hold, ("write", 200), ("fork", 100)))
    assert hold.ask("sum")["ok"]


def test_discards_while_a_stop_is_cut(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 32)
    _kill_in(daemon, hold, CUT, Busy(hold, ("write", 200), ("discard", 20)))
    assert hold.ask("sum")["ok"]


def test_the_kernels_own_accesses_while_a_stop_is_cut(daemon: Daemon, spawn: Spawner) -> None:
    # A thread inside such a call can't be stopped before it has its page.
    hold = spawn("hold", "--mib", 32)
    _kill_in(daemon, hold, CUT, Busy(hold, ("kernel", 400)))
    assert hold.ask("sum")["ok"]


def _kill_in(daemon: Daemon, hold: Target, phases: tuple[str, ...], busy: Busy) -> None:
    """Kill the daemon in one of these phases, three times."""
    page_map, killer, found = PageMap(hold.pid), Killer(daemon), 0
    with busy, Dumping(daemon, hold, Counter()):
        for number in range(24):
            page_map.wait_for(phases)
            killer.kill()
            daemon.wait_for_successor()
            found = sum(found_phases(daemon.log())[phase] for phase in phases)
            if found >= 3:
                break
            if number % 3 == 2:
                time.sleep(SETTLED_S)
    page_map.close()
    assert found >= 3


def test_a_killed_keeper_is_replaced(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 16)
    daemon.dump(hold.pid)
    daemon.allow("WARNING: the keeper has died; another one is made")
    allow_deaths(daemon)
    first = daemon.status().daemon.keeper_pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    second = wait_until(lambda: _keeper_but(daemon, first), "another keeper", 20)
    daemon.kill()
    assert hold.ask("sum")["ok"]
    assert daemon.wait_for_successor() == second


def _keeper_but(daemon: Daemon, former: int) -> int | None:
    pid = daemon.status().daemon.keeper_pid
    return pid if pid != former else None


def test_the_keeper_keeps_little_memory(daemon: Daemon, figures: Figures) -> None:
    pid = daemon.status().daemon.keeper_pid
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    private_kib = sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Private_"))
    figures.note(keeper_private_kib=private_kib)
    assert private_kib < 256


def test_daemons_that_die_young_are_started_less_and_less_often(daemon: Daemon) -> None:
    killer = Killer(daemon)
    daemon.allow("ERROR: the daemon has died young [567] times in a row")
    for _ in range(7):
        killer.kill()
    daemon.wait_for_successor()
    assert "the next one starts in 1 s" in daemon.log()
    assert "the next one starts in 2 s" in daemon.log()


def test_daemon_and_keeper_die_together(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 32)
    churn = spawn("churn", "--seconds", 100, "--mib", 16, "--threads", 2, "--pace", 1000, "--seed", 5)
    for target in (hold, churn):
        daemon.dump(target.pid)
    before = hold.ask("sum")["sum"]
    allow_deaths(daemon)
    daemon.dump(hold.pid)
    with _ended_together(daemon, 1):
        assert hold.ask("sum")["sum"] == before
        for target in (hold, churn):
            daemon.wait_for_session(target.pid)
            daemon.dump(target.pid)
        assert hold.ask("sum")["sum"] == before
        churn.signal(signal.SIGTERM)
        assert churn.result(60)["errors"] == 0


def test_a_child_without_an_agent_is_kept_by_its_parents(daemon: Daemon, spawn: Spawner) -> None:
    """When both die nobody else has its userfaultfd, and the kernel would give it zeros without a word."""
    family = spawn("family", "--mib", 16, env={"SNAPD_NO_FOLLOW_FORKS": "1"})
    daemon.dump(family.pid)
    os.kill(family.pid, signal.SIGUSR2)
    child = int(family.receive(60)["pid"])
    daemon.wait_for_session(child)
    allow_deaths(daemon)
    with _ended_together(daemon, 2):
        daemon.wait_for_session(child)
        for pid in (child, family.pid):
            os.kill(pid, signal.SIGUSR1)
            assert family.receive(60)["pid"] == pid
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: not daemon.session(child), "the end of the child's session")


def test_an_agent_says_when_its_daemon_is_gone_for_good(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 8)
    daemon.dump(hold.pid)
    daemon.expect_successors()
    status = daemon.status().daemon
    os.kill(status.keeper_pid or 0, signal.SIGKILL)
    kill_pid(status.pid)
    line = f"To get it back: snapd daemon --runtime-dir {daemon.runtime_dir}"
    wait_until(lambda: line in hold.stderr(), "a line of the agent on its program's stderr", 20)
    successor = start_by_hand(daemon)
    try:
        assert hold.ask("sum")["ok"]
        assert hold.stderr().count(line) == 1
    finally:
        successor.terminate()
        successor.wait(30)


def test_targets_of_a_stopped_daemon_wait_and_go_on(daemon: Daemon, spawn: Spawner) -> None:
    _stopped(daemon, spawn, SHORT_STOP_S)


@pytest.mark.torture
def test_targets_of_a_daemon_that_is_stopped_for_long_wait_and_go_on(daemon: Daemon, spawn: Spawner) -> None:
    _stopped(daemon, spawn, LONG_STOP_S)


def _stopped(daemon: Daemon, spawn: Spawner, seconds: float) -> None:
    """Stop the daemon by a signal: a thread that touches what is out waits for all of it, and has the right bytes."""
    hold = spawn("hold", "--mib", 16)
    pid = daemon.pid
    daemon.dump(hold.pid)
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(seconds, os.kill, (pid, signal.SIGCONT)).start()
    began = time.monotonic()
    reply = hold.ask("touch", 50, 1)
    waited_s = time.monotonic() - began
    assert reply["ok"]
    assert waited_s > seconds - 1
    assert hold.ask("sum")["ok"]
    assert daemon.status().daemon.pid == pid  # nobody took it for dead
    daemon.dump(hold.pid)
    assert hold.ask("sum")["ok"]


@contextlib.contextmanager
def _ended_together(
    daemon: Daemon, times: int, pause_before: Callable[[], object] = lambda: None
) -> Iterator[list[int]]:
    """Kill daemon and keeper so many times, and start another one by hand each time; yields the instants."""
    daemon.expect_successors()
    successor: subprocess.Popen[bytes] | None = None
    kills_ns = []
    try:
        for _ in range(times):
            status = daemon.status().daemon
            pause_before()
            os.kill(status.pid, signal.SIGSTOP)  # or it might make another keeper
            os.kill(status.keeper_pid or 0, signal.SIGKILL)
            kill_pid(status.pid)
            if successor:
                successor.wait(30)
            kills_ns.append(time.monotonic_ns())
            successor = start_by_hand(daemon)
            daemon.wait_for_successor()
        yield kills_ns
    finally:
        if successor:
            successor.terminate()
            successor.wait(60)


def _targets(spawn: Spawner, seconds: int) -> list[Target]:
    return [
        spawn(
            "churn", "--seconds", seconds, "--mib", 24, "--threads", 2, "--pace", 1000, "--seed", seed, "--slow", 10,
            "--ops", "fork=30", deadline_s=seconds + 60,
        )
        for seed in range(4)
    ]  # fmt: skip


def _random_kills(
    daemon: Daemon, spawn: Spawner, figures: Figures, kills: int, breath_s: float = 0
) -> tuple[Counter[str], Counter[str], float]:
    """Return what the deaths found, how the dumps ended, and how long the targets waited in the middle."""
    rng = random.Random(kills)
    targets = _targets(spawn, 60 + 8 * kills)
    killer, done = Killer(daemon), Counter[str]()
    page_maps = [PageMap(target.pid) for target in targets]
    with contextlib.ExitStack() as dumps:
        for target in targets:
            dumps.enter_context(Dumping(daemon, target, done))
        for number in range(kills):
            if breath_s and number % 8 == 5:  # the successor dies while it takes over
                time.sleep(rng.uniform(0, TAKEOVER_S))
            else:
                pause(rng, number, daemon.wait_for_successor)
                time.sleep(rng.uniform(0, breath_s))
            if number % 4 == 3:  # a stop is a hundredth of the time: a random instant seldom finds one
                daemon.wait_for_successor()
                with contextlib.suppress(HarnessError):
                    rng.choice(page_maps).wait_for(CUT[: 1 + number // 4 % 2], 5)
            killer.kill()
            for target in targets:
                assert target.process.poll() is None, f"a target died at kill {number}"
        daemon.wait_for_successor()
        time.sleep(SETTLED_S)
    waits: list[float] = []
    for target in targets:
        target.signal(signal.SIGTERM)
        result = target.result(60)
        assert result["errors"] == 0
        waits += waits_ms(killer.kills_ns, result["slow"])
    for page_map in page_maps:
        page_map.close()
    found = found_phases(daemon.log())
    found["takeover"] = kills - daemon.log().count("took over")
    figures.note(
        kills=kills, dumps_complete=done["complete"], dumps_cut=done.total() - done["complete"],
        longest_wait_ms=max(waits), median_wait_ms=median(waits), **found,
    )  # fmt: skip
    assert done["complete"] > 0
    assert max(waits) < LONGEST_WAIT_MS
    return found, done, median(waits)


@pytest.mark.timeout(90 + 6 * KILLS)
def test_random_kills(daemon: Daemon, spawn: Spawner, figures: Figures) -> None:
    _random_kills(daemon, spawn, figures, KILLS)


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_many_random_kills(daemon: Daemon, spawn: Spawner, figures: Figures) -> None:
    found, done, wait_ms = _random_kills(daemon, spawn, figures, TORTURE_KILLS, TORTURE_BREATH_S)
    assert wait_ms < MEDIAN_WAIT_MS
    wanted = ("move", "pin", "store", "drop", "takeover")
    assert {phase for phase in wanted if found[phase] < LEAST_OF_A_PHASE} == set()
    assert 2 * done["complete"] >= done.total()


@pytest.mark.torture
@pytest.mark.timeout(1800)
def test_many_deaths_of_daemon_and_keeper(daemon: Daemon, spawn: Spawner, figures: Figures) -> None:
    rng = random.Random(TORTURE_DEATHS)
    targets, done = _targets(spawn, 60 + 10 * TORTURE_DEATHS), Counter[str]()
    allow_deaths(daemon)
    with contextlib.ExitStack() as dumps:
        for target in targets:
            dumps.enter_context(Dumping(daemon, target, done))
        with _ended_together(daemon, TORTURE_DEATHS, lambda: time.sleep(rng.uniform(0, DEATHS_APART_S))) as kills_ns:
            for target in targets:
                assert target.process.poll() is None, "a target died"
                daemon.wait_for_session(target.pid)
            waits: list[float] = []
            for target in targets:
                target.signal(signal.SIGTERM)
                result = target.result(60)
                assert result["errors"] == 0
                waits += waits_ms(kills_ns, result["slow"])
    figures.note(
        deaths=TORTURE_DEATHS, dumps_complete=done["complete"], dumps_cut=done["ProtocolError"],
        longest_wait_ms=max(waits), median_wait_ms=median(waits),
    )  # fmt: skip
    assert max(waits) < LONGEST_WAIT_MS
    assert median(waits) < MEDIAN_WAIT_MS
    assert done["complete"] >= done["ProtocolError"], "more dumps were cut than came to their end"


def test_an_orderly_end_is_the_keepers_too() -> None:
    with Daemon() as daemon, Spawner(daemon) as spawn:
        hold = spawn("hold", "--mib", 16)
        daemon.dump(hold.pid)
        group = daemon.process.pid
        daemon.stop()  # which fails for a process that is left behind
        assert daemon_of(group) == 0
        assert hold.ask("sum")["ok"]
