"""Memory that must not move is left alone, counted by its reason, and works on; what lies beside it goes out."""

import mmap

import pytest

from tests.harness import Daemon, Spawner, Target
from tests.kernel.driving import MIB, BackToBack, present
from tests.peers import lacking

pytestmark = pytest.mark.shares_daemon

REASONS = {
    "locked": "locked",
    "on_fault": "locked",
    "sealed": "sealed",
    "no_access": "no_access",
    "grows_down": "stack",
    "read_only": "read_only",
}


@pytest.fixture
def stays(spawn: Spawner) -> Target:
    """Return a target with an area of each kind."""
    return spawn("stays")


def all_present(target: Target, start: int) -> bool:
    """Whether each page of an area of 1 MiB is in memory."""
    return all(present(target.pid, start, start + MIB))


def test_each_kind_stays_and_has_its_reason(stays: Target, daemon: Daemon) -> None:
    areas = stays.ask("areas")
    if not areas["sealed"]:
        lacking("the kernel has no mseal")
    report = daemon.dump(stays.pid)
    for kind in REASONS:
        assert all_present(stays, areas[kind]), kind
    assert not any(present(stays.pid, areas["plain"], areas["plain"] + MIB))
    least = {reason: list(REASONS.values()).count(reason) * MIB for reason in REASONS.values()}
    for reason, size in least.items():
        assert report.skipped.get(reason, 0) >= size, (reason, report.skipped)
    stays.ask("look")
    daemon.dump(stays.pid)
    stays.ask("look")
    stays.quit()


def test_program_with_a_userfaultfd_of_its_own_is_served_by_both(stays: Target, daemon: Daemon) -> None:
    stays.ask("own", 200)
    report = daemon.dump(stays.pid)
    own = stays.ask("areas")["own"]
    assert all(present(stays.pid, own, own + 200 * mmap.PAGESIZE))
    assert report.skipped["foreign"] >= 190 * mmap.PAGESIZE  # a thread's stack may be beside it
    with BackToBack(daemon, stays.pid):
        for _ in range(20):
            stays.ask("own", 100)
    stays.ask("look")
    stays.quit()


def test_stacks_and_tls_in_the_middle_of_a_heap_work_under_back_to_back_dumps(stays: Target, daemon: Daemon) -> None:
    with BackToBack(daemon, stays.pid) as dumps:
        for _ in dumps.until(5):
            stays.ask("threads", 64, timeout_s=60)
    assert max(report.skipped.get("stack", 0) for report in dumps.reports) > 0
    stays.ask("look")
    stays.quit()
