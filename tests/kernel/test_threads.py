"""Threads: stacks and TLS stay, they end and are joined, are born in the middle of a dump, and take their signals."""

import pytest

from tests.harness import Daemon, Spawner, Target
from tests.kernel.driving import MIB, BackToBack, Figures

pytestmark = pytest.mark.shares_daemon


@pytest.fixture
def joins(daemon: Daemon, spawn: Spawner) -> Target:
    """Return a target with 16 threads asleep on stacks in the middle of its heap, which has just gone out."""
    target = spawn("joins", "--mib", 32, "--threads", 16)
    target.ask("start")
    assert daemon.dump(target.pid).moved_bytes > 30 * MIB
    return target


def test_threads_on_stacks_in_a_dumped_heap_end_and_are_joined(joins: Target, daemon: Daemon) -> None:
    joins.ask("join", timeout_s=20)
    joins.ask("start")
    daemon.dump(joins.pid)
    daemon.dump(joins.pid)
    joins.ask("join", timeout_s=20)
    joins.ask("sum")
    joins.quit()


def test_thread_whose_memory_the_kernel_is_the_first_to_want_ends_and_is_joined(daemon: Daemon, spawn: Spawner) -> None:
    # With restartable sequences the kernel touches the thread's block after each stop, and so brings it back by chance.
    joins = spawn("joins", "--mib", 16, env={"GLIBC_TUNABLES": "glibc.pthread.rseq=0"})
    for _ in range(3):
        joins.ask("leave")
        daemon.dump(joins.pid)
        assert joins.ask("left")["joined"]
    joins.ask("sum")
    joins.quit()


def test_signals_reach_handlers_on_signal_stacks_that_are_out(joins: Target, daemon: Daemon) -> None:
    for _ in range(3):
        assert joins.ask("signal", timeout_s=20)["handled"] == 16
        daemon.dump(joins.pid)
    joins.ask("join", timeout_s=20)
    joins.quit()


def test_robust_mutex_of_a_thread_that_ends_is_given_to_the_next_one(daemon: Daemon, spawn: Spawner) -> None:
    joins = spawn("joins", "--mib", 16)
    joins.ask("dead")
    daemon.dump(joins.pid)
    assert joins.ask("bury", timeout_s=20)["owner_dead"]
    joins.ask("sum")
    joins.quit()


def test_threads_are_born_and_end_under_back_to_back_dumps(joins: Target, daemon: Daemon) -> None:
    with BackToBack(daemon, joins.pid) as dumps:
        for _ in dumps.until(10):
            joins.ask("cycle", 50, timeout_s=30)
            joins.ask("signal", timeout_s=30)
    joins.ask("join", timeout_s=20)
    joins.ask("sum")
    joins.quit()


def test_stops_with_eight_sleeping_threads_are_short(daemon: Daemon, spawn: Spawner, figures: Figures) -> None:
    hold = spawn("hold", "--mib", 64)
    hold.ask("threads", 8)
    reports = []
    for seed in range(20):
        reports.append(daemon.dump(hold.pid))
        # Other programs may want the CPUs that this one stands on: one quiet dump is enough, of pages that stand alone.
        if seed >= 2 and min(report.longest_stop_us for report in reports[1:]) <= 2000:
            break
        hold.ask("write", 4000, seed)
    figures.note_stops(reports)
    assert max(report.longest_stop_us for report in reports) < 40_000
    assert min(report.longest_stop_us for report in reports[1:]) <= 2000
    assert all(report.stops > 5 for report in reports)
    assert hold.ask("threads", 0)["interrupted"] == 0
    hold.ask("sum")
    hold.quit()
