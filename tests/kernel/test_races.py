"""Discards, fills and many threads at one page: no old byte, and one answer that is right for all."""

import os

import pytest

from snapd.errors import NotStopping
from tests.harness import Daemon, Spawner
from tests.kernel.driving import BackToBack, Figures

pytestmark = pytest.mark.shares_daemon

PAGES = 32 * 256
ROUND = 8192


@pytest.mark.parametrize("discards", [15_000, pytest.param(1_000_000, marks=pytest.mark.torture)])
@pytest.mark.timeout(900)
def test_discards_that_race_fills_leave_no_old_byte(
    daemon: Daemon, spawn: Spawner, figures: Figures, discards: int
) -> None:
    races = spawn("races", "--mib", PAGES // 256, deadline_s=880)
    done = touched = 0
    with BackToBack(daemon, races.pid, ignore=(NotStopping,)) as dumps:
        while done < discards:
            reply = races.ask("race", ROUND, done, timeout_s=120)
            done += reply["discards"]
            touched = reply["touched"]
    races.ask("sum")
    figures.note(discards=done, touched=touched, dumps=len(dumps.reports), moved=dumps.total("moved_bytes") // 4096)
    assert dumps.total("moved_bytes") // 4096 > discards // 20
    races.quit()


def test_sixteen_threads_at_one_page_are_all_given_it(daemon: Daemon, spawn: Spawner, figures: Figures) -> None:
    threads = 16
    same_page = spawn("same_page", "--mib", 16, "--threads", threads)
    slowest = 0
    for seed in range(4):
        daemon.dump(same_page.pid)
        slowest = max(slowest, same_page.ask("read", 300, seed, timeout_s=60)["max_ns"])
        daemon.dump(same_page.pid)
        slowest = max(slowest, same_page.ask("write", 150, seed, timeout_s=60)["max_ns"])
    with BackToBack(daemon, same_page.pid, pause_s=0.02, ignore=(NotStopping,)):
        same_page.ask("read", 500, 9, timeout_s=100)
        same_page.ask("write", 200, 10, timeout_s=100)
    same_page.ask("sum")
    figures.note(threads=threads, slowest_us=slowest // 1000, cpus=len(os.sched_getaffinity(0)))
    same_page.quit()
