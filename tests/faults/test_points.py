"""At each fault point the daemon dies: its successor finds what is on its way, no byte is wrong, and a clean run works.

One daemon after the other serves one program, which verifies all its memory after each death.
"""

from __future__ import annotations

import contextlib
import errno
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

import snapd.engine
from snapd.errors import SnapdError
from snapd.protocol.options import DumpOptions
from snapd.store.verify import verify_snapshot
from tests.faults.deaths import SETTLED_S, allow_deaths
from tests.faults.plan import FAULTS, Action, Plan, Step, fails
from tests.harness import Daemon, HarnessError, Spawner, Target, wait_until
from tests.kernel.driving import MIB, RunningDump, out_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEAP_MIB: Final = 8
HEAP_PAGES: Final = HEAP_MIB * 256
SLOW_LEVEL: Final = 19
LATE_MS: Final = 500
"""An agent comes again sooner than that."""
YOUNG_DEATHS: Final = 3
"""After so many deaths in a row a daemon is left alone for a second, or its keeper makes the next one wait."""


@dataclass
class Scene:
    """A program whose daemons die one after the other."""

    plan: Plan
    daemon: Daemon
    target: Target
    served_at: float = 0.0
    young: int = 0
    right: bool = False

    def dies_at(self, *steps: Step, doing: Callable[[Scene], None]) -> None:
        """Do something in which daemons die as the plan says; then all must be right, now and in a second run."""
        age_s = time.monotonic() - self.served_at
        self.young = self.young + len(steps) if age_s < SETTLED_S else len(steps)
        if self.young > YOUNG_DEATHS:
            time.sleep(max(0.0, SETTLED_S - age_s))
            self.young = len(steps)
        served_by = self.daemon.pid
        self.plan.arm(*steps)
        doing(self)
        self.plan.wait()
        wait_until(lambda: self._successor(served_by), "a successor", 30)
        self.served_at = time.monotonic()
        wait_until(self._attached, "the end of what was on its way", 30)
        self.look()
        self.clean_run()
        self.right = True

    def fails_at(self, step: Step, doing: Callable[[Scene], None]) -> None:
        """Do something in which a call fails as the plan says; then all must be right, now and in a second run."""
        served_by = self.daemon.pid
        self.plan.arm(step)
        doing(self)
        self.plan.wait()
        self.look()
        self.clean_run()
        assert self.daemon.pid == served_by
        self.right = True

    def _successor(self, former: int) -> bool:
        with contextlib.suppress(SnapdError, OSError):
            return self.daemon.pid != former
        return False

    def _attached(self) -> bool:
        with contextlib.suppress(SnapdError, OSError):
            session = self.daemon.session(self.target.pid)
            return session is not None and session.state == "attached"
        return False

    def look(self) -> None:
        """See that every page is right."""
        seen = self.target.ask("look", timeout_s=30)
        assert seen["lost"] == 0
        assert seen["right"] + seen["guards"] == HEAP_PAGES

    def clean_run(self) -> None:
        """Dump, look, write, dump, restore and look, as if nothing had been."""
        self.daemon.dump(self.target.pid)
        assert out_bytes(self.daemon, self.target.pid) > 0.9 * HEAP_MIB * MIB
        self.look()
        self.target.ask("write", 300, 1)
        self.daemon.dump(self.target.pid)
        self.daemon.restore(self.target.pid)
        assert out_bytes(self.daemon, self.target.pid) == 0
        self.look()

    def dump(self, *, keep: str | None = None) -> None:
        """Dump, whatever becomes of it."""
        with contextlib.suppress(SnapdError, OSError), self.daemon.client() as client:
            client.dump(self.target.pid, DumpOptions(keep=keep))


_scenes: list[tuple[Scene, contextlib.ExitStack]] = []


def _end_scene() -> None:
    while _scenes:
        scene, stack = _scenes.pop()
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
            target = stack.enter_context(Spawner(daemon))("steps", "--mib", HEAP_MIB, deadline_s=600)
            allow_deaths(daemon)
            daemon.expect_successors()
            _scenes.append((Scene(plan, daemon, target), stack.pop_all()))
    one = _scenes[0][0]
    logged = len(one.daemon.log())
    one.right = False
    yield one
    if not one.right:
        print(one.daemon.log()[logged:])  # pytest shows it where the test fails
        with contextlib.suppress(HarnessError):
            _end_scene()


def dumping(scene: Scene) -> None:
    """Dump what is written."""
    scene.target.ask("write", 2000, 2)
    scene.dump()


IN_A_STOP: Final = (
    "STAGE_MAPPED", "STAGED", "STANDING", "WATCHED", "CLAIMED", "OWN_MOVE_READ", "OWN_MOVE_NOTED", "MOVED", "LOOKED",
    "GUARDED", "PINNED", "RETURNED", "SETTLING", "SETTLED", "LETTING_GO",
)  # fmt: skip
AFTER_IT: Final = (
    "PACK_READ", "FRAMES_WRITE", "FRAMES_WRITTEN", "PUBLISHING", "STAGING_LEFT", "DROPPING", "SLICE_DROPPED",
    "PIECE_ENDING",
)  # fmt: skip


@pytest.mark.parametrize("point", [*IN_A_STOP, *AFTER_IT])
def test_in_a_dump(scene: Scene, point: str) -> None:
    scene.dies_at(Step(point), doing=dumping)


@pytest.mark.torture
@pytest.mark.parametrize("skip", [1, 7])
@pytest.mark.parametrize("point", [*IN_A_STOP, *AFTER_IT])
def test_later_in_a_dump(scene: Scene, point: str, skip: int) -> None:
    scene.dies_at(Step(point, skip=100 * skip if point in ("SETTLING", "PUBLISHING") else skip), doing=dumping_often)


def dumping_often(scene: Scene) -> None:
    """Dump until the daemon dies; a heap of this size is few pieces."""
    for _ in range(20):
        dumping(scene)
        if scene.plan.happened:
            return


def test_guards_in_a_cut_stop(scene: Scene) -> None:
    """Guards have moved along, and their addresses are not guarded when the daemon dies."""
    scene.target.ask("guard", 40, 3)
    try:
        scene.dies_at(Step("LOOKED"), doing=dumping)
        assert scene.target.ask("look")["guards"] > 30
    finally:
        scene.target.ask("unguard")


def looking(scene: Scene) -> None:
    """Touch what is out."""
    seen = scene.target.ask("look", timeout_s=30)
    assert seen["right"] == HEAP_PAGES


@pytest.mark.parametrize("point", ["FRAME_READ", "FILLING", "FILLED"])
def test_in_a_fill(scene: Scene, point: str) -> None:
    scene.daemon.dump(scene.target.pid)
    scene.dies_at(Step(point, skip=5), doing=looking)


@pytest.mark.parametrize("point", ["BULK_READ", "RESTORED"])
def test_in_a_restore(scene: Scene, point: str) -> None:
    scene.daemon.dump(scene.target.pid)
    scene.dies_at(Step(point, skip=3), doing=restoring)


def restoring(scene: Scene) -> None:
    """Restore, whatever becomes of it."""
    with contextlib.suppress(SnapdError, OSError):
        scene.daemon.restore(scene.target.pid)


EVENTS: Final = ("discard", "move", "keep", "hole", "over")
"""mremap moves no heap of more than one mapping, as it is from a hole on: such a program ends its scene."""


def raising(event: str) -> Callable[[Scene], None]:
    """Return what raises events, and verifies what they mean."""
    arguments = {"discard": (40, 1), "hole": (100, 64), "over": (300, 64)}

    def raise_it(scene: Scene) -> None:
        scene.target.ask(event, *arguments.get(event, ()), timeout_s=30)

    return raise_it


@pytest.mark.parametrize("point", ["EVENT_READ", "EVENT_APPLIED"])
@pytest.mark.parametrize("event", EVENTS)
def test_in_an_event(scene: Scene, point: str, event: str) -> None:
    scene.daemon.dump(scene.target.pid)
    scene.dies_at(Step(point), doing=raising(event))
    scene.target.ask("write", HEAP_PAGES, 5)
    if event in ("hole", "over"):
        _end_scene()


@pytest.mark.parametrize("point", ["FORK_READ", "FORK_SERVED", "HALF_HANDED"])
def test_in_a_fork(scene: Scene, point: str) -> None:
    scene.daemon.dump(scene.target.pid)
    scene.dies_at(Step(point), doing=forking)


def forking(scene: Scene) -> None:
    """Fork: the child and its child verify all memory."""
    assert scene.target.ask("grandchild", timeout_s=30)["right"] == HEAP_PAGES


@pytest.mark.parametrize("point", ["FORK_READ", "FORK_SERVED", "CHILD_COPYING"])
def test_in_a_fork_in_a_dump(scene: Scene, point: str) -> None:
    scene.target.ask("write", 2000, 6)
    dump = RunningDump(scene.daemon, scene.target.pid, level=SLOW_LEVEL)
    scene.dies_at(Step(point), doing=forking)
    dump.outcome()


IN_A_RECOVERY: Final = (
    "CUT_CLAIMED", "CUT_COMMITTED", "ADOPTED", "RESUMED", "RING_APPLIED", "SERVING", "CUT_SEEN", "CUT_POINTED",
    "CUT_SETTLING", "CUT_MOVED", "CUT_SETTLED", "PIECE_ADOPTED",
)  # fmt: skip
IN_ITS_STOP: Final = ("CUT_STANDING", "CUT_LOOKED", "CUT_PINNED", "CUT_RETURNED")
CUTS: Final = ("OWN_MOVE_READ", "MOVED", "PINNED", "SETTLING")


@pytest.mark.parametrize("point", IN_A_RECOVERY)
def test_in_a_takeover(scene: Scene, point: str) -> None:
    scene.dies_at(Step("MOVED"), Step(point), doing=dumping)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_last_move_of_a_cut_stop_stands_in_the_ring_only(scene: Scene, skip: int) -> None:
    """Its reader is late; the mover needs nothing of it, and answers the successor at once."""
    late = Step("RING_LEFT", Action.DELAY, LATE_MS)
    scene.dies_at(Step("OWN_MOVE_READ", skip=skip), late, doing=dumping_often)


def test_span_of_a_cut_stop_whose_pages_were_aside_already(scene: Scene) -> None:
    """They could not be stored, and could not return: the stop has left the span alone, and its successor does."""
    scene.daemon.allow("a piece stays aside")
    scene.target.ask("write", HEAP_PAGES, 7)
    scene.plan.arm(Step("FRAMES_WRITE", Action.ERROR, errno.ENOSPC), fails("FILLING"))
    scene.dump()
    scene.plan.disarm()
    scene.target.ask("write", 100, 8)
    scene.dies_at(Step("MOVED"), doing=Scene.dump)


@pytest.mark.parametrize("point", IN_ITS_STOP)
def test_in_the_stop_of_a_takeover(scene: Scene, point: str) -> None:
    """Guards are installed again, and that takes a stop."""
    scene.target.ask("guard", 40, 3)
    try:
        scene.dies_at(Step("LOOKED"), Step(point), doing=dumping)
        assert scene.target.ask("look")["guards"] > 30
    finally:
        scene.target.ask("unguard")


@pytest.mark.torture
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("point", IN_A_RECOVERY)
def test_twice_in_any_takeover(scene: Scene, point: str, cut: str) -> None:
    scene.dies_at(Step(cut), Step(point), Step(point), doing=dumping)


@pytest.mark.parametrize("point", ["PACK_READ", "FRAMES_WRITTEN", "SLICE_DROPPED", "STAGING_LEFT", "PIECE_ENDING"])
def test_in_what_a_successor_packs_and_drops(scene: Scene, point: str) -> None:
    scene.dies_at(Step("LETTING_GO"), Step(point), doing=dumping)


@pytest.mark.parametrize("point", ["COMPACT_WRITTEN", "COMPACT_PUBLISHING", "PUNCHED"])
def test_in_making_room(scene: Scene, point: str) -> None:
    scene.daemon.dump(scene.target.pid)
    scene.dies_at(Step(point), doing=replacing)


def replacing(scene: Scene) -> None:
    """Replace more than half of each segment."""
    for seed in range(8):
        scene.target.ask("write", 1300, 10 + seed)
        scene.dump()
        if scene.plan.happened:
            return


KEEPING: Final = ("COPY_WRITE", "SNAPSHOT_WRITE", "SNAPSHOT_SYNC", "SNAPSHOT_NAMING")
NAMED: Final = ((Step("SNAPSHOT_NAMED"), True), (Step("SNAPSHOT_SYNC", skip=1), True))


@pytest.mark.parametrize(("step", "is_there"), [*((Step(point), False) for point in KEEPING), *NAMED], ids=str)
def test_in_keeping(scene: Scene, step: Step, is_there: bool) -> None:
    name = f"{step.point}-{step.skip}"
    scene.dies_at(step, doing=keeping(name))
    assert [one.name for one in snapshots(scene, name)] == ([f"{name}.snapd"] if is_there else [])
    scene.dump(keep=f"{name}-again")
    assert all(verify_snapshot(one).ok for one in snapshots(scene, name))
    assert len(snapshots(scene, name)) == 1 + is_there


def keeping(name: str) -> Callable[[Scene], None]:
    """Return what dumps what is written, and keeps all of it."""

    def keep_it(scene: Scene) -> None:
        scene.target.ask("write", 300, 9)
        scene.dump(keep=name)

    return keep_it


def snapshots(scene: Scene, name: str) -> list[Path]:
    """Return the files whose names begin so, or that are no snapshots yet."""
    there = [one for one in (scene.daemon.state_dir / "snapshots").rglob("*") if one.is_file()]
    return [one for one in there if one.name.startswith((name, "."))]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("point", KEEPING)
def test_what_fails_in_keeping_leaves_no_file(scene: Scene, point: str, error: int) -> None:
    scene.fails_at(fails(point, error, times=1), doing=keeping("failed"))
    assert snapshots(scene, "failed") == []


def test_no_room_for_frames_ends_the_dump(scene: Scene) -> None:
    scene.fails_at(fails("RESERVE", errno.ENOSPC, times=1), doing=dumping)


def test_room_that_is_not_given_back_is_given_back_the_next_time(scene: Scene) -> None:
    scene.daemon.dump(scene.target.pid)
    scene.fails_at(fails("PUNCH", errno.EOPNOTSUPP, times=1), doing=replacing)


def test_in_poisoning(scene: Scene) -> None:
    """The page is lost, and its entry does not say so."""
    scene.daemon.allow("is lost")
    served_by = scene.daemon.pid
    scene.daemon.dump(scene.target.pid)
    scene.plan.arm(Step("FRAME_READ", Action.SHORT), Step("POISONED"))
    for _ in range(2):
        seen = scene.target.ask("look", timeout_s=30)
        assert seen["lost"] <= 1, "it may be had again by its frame"
        assert seen["right"] + seen["lost"] == HEAP_PAGES
        wait_until(lambda: scene._successor(served_by), "a successor", 30)
        wait_until(scene._attached, "its session", 30)
        scene.daemon.dump(scene.target.pid)
    assert scene.plan.happened == 2
    scene.right = True
    _end_scene()  # its page stays lost


def test_only_the_tests_own_build_has_fault_points(plan: Plan) -> None:
    assert plan.environment()
    (ours,) = FAULTS.glob("_engine.*.so")
    normal = Path(snapd.engine.__file__).with_name(ours.name)
    assert b"SNAPD_FAULT" in ours.read_bytes()
    assert b"SNAPD_FAULT" not in normal.read_bytes()
    assert b"fault_point" not in normal.read_bytes()
