"""Fault points while threads of a program without an agent are lent: the next daemon finds it whole, and scheduled as
it was.

As in test_points.py, and a borrowed thread besides: the daemon's death finds it in code that is not the program's.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd.errors import SnapdError
from tests.faults.deaths import allow_deaths
from tests.faults.plan import Plan, Step
from tests.faults.test_points import HEAP_MIB, IN_A_STOP, IN_ITS_STOP, Scene, dumping
from tests.harness import Daemon, HarnessError, Spawner, wait_until
from tests.kernel.driving import MIB
from tests.kernel.scheduling import Scheduling, give, scheduling
from tests.kernel.test_attach import filtered
from tests.users import NOBODY

_scenes: list[tuple[Scene, dict[int, Scheduling], contextlib.ExitStack]] = []


def _end_scene() -> None:
    while _scenes:
        scene, _, stack = _scenes.pop()
        scene.plan.disarm()
        stack.close()


@pytest.fixture(scope="module", autouse=True)
def _scenes_end() -> Iterator[None]:
    yield
    _end_scene()


@pytest.fixture
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Yield the scene of the test before, or a new one where that has failed."""
    if not _scenes:
        with contextlib.ExitStack() as stack:
            plan = stack.enter_context(Plan(tmp_path_factory.mktemp("plan") / "plan"))
            daemon = stack.enter_context(Daemon(env=plan.environment()))
            target = stack.enter_context(Spawner())("steps", "--mib", HEAP_MIB, user=NOBODY, deadline_s=600)
            give(target.pid, policy="batch", nice=5, slack_ns=77_000)
            daemon.snapd("attach", target.pid)
            allow_deaths(daemon)
            daemon.expect_successors()
            _scenes.append((Scene(plan, daemon, target), scheduling(target.pid), stack.pop_all()))
    one, before, _ = _scenes[0]
    logged = len(one.daemon.log())
    one.right = False
    yield one
    if one.right:
        assert scheduling(one.target.pid) == before
    else:
        print(one.daemon.log()[logged:])  # pytest shows it where the test fails
        with contextlib.suppress(HarnessError):
            _end_scene()


OFTEN = ("STAGED", "CLAIMED", "MOVED", "PINNED", "SETTLING", "LETTING_GO", "CUT_LOOKED")


def seldom(points: tuple[str, ...]) -> list[object]:
    """Return the points, all but a few of them for torture alone."""
    return [one if one in OFTEN else pytest.param(one, marks=pytest.mark.torture) for one in points]


@pytest.mark.parametrize("point", seldom(IN_A_STOP))
def test_in_a_dump(scene: Scene, point: str) -> None:
    scene.dies_at(Step(point), doing=dumping)


@pytest.mark.parametrize("point", seldom(IN_ITS_STOP))
def test_in_the_stop_of_a_takeover(scene: Scene, point: str) -> None:
    scene.target.ask("guard", 40, 3)
    try:
        scene.dies_at(Step("LOOKED"), Step(point), doing=dumping)
        assert scene.target.ask("look")["guards"] > 30
    finally:
        scene.target.ask("unguard")


def test_before_the_keeper_knows_of_a_program_its_forks_wait_for_nobody(tmp_path: Path) -> None:
    with Plan(tmp_path / "plan") as plan, Daemon(env=plan.environment()) as daemon, Spawner() as spawn:
        allow_deaths(daemon)
        daemon.expect_successors()
        target = spawn("hold", "--mib", HEAP_MIB)
        plan.arm(Step("SESSION_BEGINNING"))
        assert daemon.snapd("attach", target.pid, check=False).returncode
        plan.wait()
        daemon.wait_for_successor()
        assert target.ask("fork", 10, 1, timeout_s=10)["ok"]
        daemon.snapd("attach", target.pid)
        assert daemon.dump(target.pid).moved_bytes > HEAP_MIB * MIB / 2
        assert target.ask("fork", 10, 2, timeout_s=10)["ok"]
        assert target.ask("sum")["ok"]
        target.quit()


def test_in_a_drop(scene: Scene) -> None:
    scene.dies_at(Step("DROPPING"), doing=dumping)


def test_program_behind_a_filter_is_scheduled_as_before_by_the_next_daemon(tmp_path: Path) -> None:
    """The lent thread itself could be killed for the call."""
    with Plan(tmp_path / "plan") as plan, Daemon(env=plan.environment()) as daemon, filtered() as program:
        allow_deaths(daemon)
        daemon.expect_successors()
        give(program.pid, nice=6, slack_ns=88_000)
        before = scheduling(program.pid)
        daemon.snapd("attach", program.pid)
        served_by = daemon.pid
        plan.arm(Step("MOVED"))
        with contextlib.suppress(SnapdError, OSError):
            daemon.dump(program.pid)
        plan.wait()
        wait_until(lambda: daemon_of(daemon) not in (0, served_by), "a successor", 30)
        wait_until(lambda: scheduling(program.pid) == before, "its former scheduling")
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write("\n")
        program.stdin.flush()
        assert program.stdout.readline() == "True\n"


def daemon_of(daemon: Daemon) -> int:
    """Return who serves, or 0."""
    with contextlib.suppress(SnapdError, OSError):
        return daemon.pid
    return 0
