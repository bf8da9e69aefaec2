"""Background tabs of an unmodified, sandboxed chromium go to disk, and come back when somebody switches to them.

Each page has a checksum over all of its heap: objects, strings, DOM and typed arrays. `make tabs` runs this.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapd.bench import kernel
from snapd.errors import SwapUnusable
from snapd.protocol.reports import DumpReport
from tests.browser import Browser, Tab
from tests.harness import Daemon, private_ranges, wait_until
from tests.kernel.driving import MIB, Figures, out_bytes
from tests.kernel.test_attach import state_of
from tests.peers import require
from tests.processes import rollup_bytes

pytestmark = [pytest.mark.shares_daemon, pytest.mark.torture, pytest.mark.timeout(400)]

NAMES = ("sheet", "letter", "news")
HEAP_MIB = 230
"""Of a page's heap; measured, it comes to a little more."""
LEAST_HEAP_BYTES = 150 * MIB
LEAST_FREED = 0.6
CYCLES = 20
PROGRESS_S = 20
DUMPS = 8
CALM_S = 1.0
ROUNDS = 5


@pytest.fixture
def browser() -> Iterator[Browser]:
    """Yield a browser that no daemon knows of."""
    require("chromium")
    with Browser() as one:
        yield one


def status_of(pid: int, task: int | None = None) -> dict[str, str]:
    """Return the fields of a process's or a thread's status."""
    path = Path(f"/proc/{pid}/status") if task is None else Path(f"/proc/{pid}/task/{task}/status")
    return {name: value.strip() for name, _, value in (line.partition(":") for line in path.read_text().splitlines())}


def switches(pid: int) -> dict[int, int]:
    """Return how often each thread has been given the CPU and left it."""
    counts = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        status = status_of(pid, int(task.name))
        counts[int(task.name)] = int(status["voluntary_ctxt_switches"]) + int(status["nonvoluntary_ctxt_switches"])
    return counts


def assert_threads_go_on(pid: int) -> None:
    """Wait until more threads than the main one have run meanwhile."""
    before = switches(pid)

    def others() -> bool:
        now = switches(pid)
        return sum(now.get(task, 0) > count for task, count in before.items() if task != pid) >= 2

    wait_until(others, f"other threads of {pid} to run", PROGRESS_S)


Memory = dict[str, int]


def memory_of(pid: int) -> Memory:
    """Return what a process has in memory, in bytes."""
    return {field: rollup_bytes(pid, field) for field in ("Rss", "Pss", "Anonymous")}


def put_out(daemon: Daemon, tab: Tab, full: Memory) -> tuple[list[DumpReport], float]:
    """Dump a tab that nobody looks at until most of it is gone; returns the reports and the share of RSS that is freed.

    `full` is what it had when all of its heap was in memory. Its own collector walks the heap for some seconds after
    the last change, and brings back what is out then.
    """
    assert tab.hidden
    reports = [daemon.dump(tab.pid)]
    while (now := memory_of(tab.pid))["Rss"] > (1 - LEAST_FREED) * full["Rss"] and len(reports) < DUMPS:
        time.sleep(CALM_S)
        reports.append(daemon.dump(tab.pid))
    assert now["Rss"] <= (1 - LEAST_FREED) * full["Rss"], (tab.name, full, now, reports)
    assert now["Pss"] <= (1 - LEAST_FREED) * full["Pss"], (tab.name, full, now)
    assert_threads_go_on(tab.pid)
    return reports, 1 - now["Rss"] / full["Rss"]


def wait_for_end(daemon: Daemon, tab: Tab) -> None:
    """Wait until the daemon has let go of a tab that was closed."""
    wait_until(lambda: daemon.session(tab.pid) is None, f"the end of the session of {tab.name}")


@pytest.mark.timeout(900)
def test_background_tabs_go_out_and_come_back_at_each_switch(
    daemon: Daemon, browser: Browser, figures: Figures
) -> None:
    tabs = [browser.open(name) for name in NAMES]
    assert len({tab.pid for tab in tabs}) == len(tabs)
    sums = {tab: tab.build(HEAP_MIB) for tab in tabs}
    full = {}
    for tab in tabs:
        status = status_of(tab.pid)
        assert status["Seccomp"] == "2"
        assert len(status["NSpid"].split()) > 1
        full[tab] = memory_of(tab.pid)
        assert full[tab]["Anonymous"] > LEAST_HEAP_BYTES
        daemon.snapd("attach", tab.pid)

    firsts, wholes, reports, freed = [], [], [], []
    for cycle in range(CYCLES):
        shown = tabs[cycle % len(tabs)]
        shown.switch_to()
        began = time.monotonic()
        shown.evaluate("answer()")
        firsts.append(time.monotonic() - began)
        assert shown.sum() == sums[shown], (cycle, shown.name)
        wholes.append(time.monotonic() - began)
        sums[shown] = shown.mutate(cycle)
        full[shown] = memory_of(shown.pid)
        for tab in tabs:
            if tab is not shown:
                done, share = put_out(daemon, tab, full[tab])
                reports += done
                freed.append(share)
    assert len(freed) == CYCLES * (len(tabs) - 1)
    figures.note_stops(reports)
    figures.note(
        cycles=CYCLES,
        freed_percent=100 * statistics.median(freed),
        least_freed_percent=100 * min(freed),
        put_out=len(freed),
        first_answer_ms=1000 * statistics.median(firsts),
        longest_first_ms=1000 * max(firsts),
        checksum_ms=1000 * statistics.median(wholes),
    )

    for tab in tabs:
        assert tab.alive
        assert tab.sum() == sums[tab]
    for tab in tabs[:2]:
        daemon.dump(tab.pid)
        tab.close()
        wait_for_end(daemon, tab)
    daemon.snapd("detach", tabs[2].pid)
    assert tabs[2].sum() == sums[tabs[2]]
    browser.close()


def test_tab_that_is_let_go_has_nothing_of_ours(daemon: Daemon, browser: Browser) -> None:
    tab = browser.open("letter")
    digest = tab.build(40)
    _, descriptors, _ = state_of(tab.pid)
    daemon.snapd("attach", tab.pid)
    assert len(state_of(tab.pid)[1]) > len(descriptors)
    daemon.dump(tab.pid)
    daemon.snapd("detach", tab.pid)
    smaps = Path(f"/proc/{tab.pid}/smaps").read_text()
    assert "snapd" not in smaps
    assert not [line for line in smaps.splitlines() if line.startswith("VmFlags") and {"um", "uw"} & {*line.split()}]
    assert "userfaultfd" not in str(state_of(tab.pid)[1])
    assert tab.sum() == digest


def test_whole_browser_is_attached_and_opens_tabs_that_can_be_attached_too(daemon: Daemon, browser: Browser) -> None:
    first = browser.open("sheet")
    digest = first.build(40)
    attached = daemon.snapd_json("attach", "--tree", browser.process.pid)["attached"]
    assert first.pid in attached
    assert set(attached) <= {*browser.processes(), *attached}
    for pid in attached:
        if daemon.session(pid) is not None:  # utility processes end when they have nothing to do
            daemon.dump(pid)
    second = browser.open("news")
    other = second.build(40)
    daemon.snapd("attach", second.pid)
    assert daemon.dump(second.pid).moved_bytes > 30 * MIB
    assert second.sum() == other
    assert first.sum() == digest
    browser.close()
    wait_until(lambda: not daemon.status().sessions, "the end of all sessions")


@pytest.mark.timeout(200)
def test_tabs_that_are_out_outlive_the_daemon(browser: Browser) -> None:
    with Daemon() as daemon:
        tabs = [browser.open(name) for name in NAMES[:2]]
        sums = [tab.build(60) for tab in tabs]
        for tab in tabs:
            daemon.snapd("attach", tab.pid)
            daemon.dump(tab.pid)
        assert out_bytes(daemon, tabs[0].pid) > 40 * MIB
        daemon.allow("the daemon has died")
        daemon.kill()
        assert [tab.sum() for tab in tabs] == sums
        daemon.wait_for_successor()
        for tab in tabs:
            assert daemon.dump(tab.pid).moved_bytes > 40 * MIB
        assert [tab.sum() for tab in tabs] == sums
        for tab in tabs:
            daemon.snapd("detach", tab.pid)
        assert [tab.sum() for tab in tabs] == sums


def page_out(tab: Tab) -> None:
    """Let the kernel take what a dump would take."""
    for start, end in private_ranges(tab.pid, 64 << 10):
        with contextlib.suppress(SwapUnusable):  # the mapping has gone meanwhile
            kernel.advise_once(tab.pid, start, end - start)


def time_first_answer(tab: Tab, front: Tab, put_away: Callable[[], object], digest: int) -> tuple[float, float]:
    """Put a tab in the background out, come back, and return the seconds until its first answer and its checksum."""
    front.switch_to()
    full = memory_of(tab.pid)["Anonymous"]
    for _ in range(DUMPS):
        put_away()
        if memory_of(tab.pid)["Anonymous"] < full / 4:
            break
        time.sleep(CALM_S)
    assert memory_of(tab.pid)["Anonymous"] < full / 4
    began = time.monotonic()
    tab.switch_to()
    tab.evaluate("answer()")
    first = time.monotonic() - began
    assert tab.sum() == digest
    return first, time.monotonic() - began


def test_first_answer_takes_at_most_twice_as_long_as_from_zram(
    daemon: Daemon, browser: Browser, figures: Figures, tmp_path: Path
) -> None:
    """A dump that stays cached is in memory as zram is; what comes from the disk is noted beside it."""
    tab = browser.open("letter")
    digest = tab.build(HEAP_MIB)
    front = browser.open("empty")
    ways: dict[str, Callable[[], object]] = {
        "zram": lambda: page_out(tab),
        "cached": lambda: daemon.dump(tab.pid, keep_cached=True),
        "disk": lambda: daemon.dump(tab.pid),
    }
    taken: dict[str, list[tuple[float, float]]] = {}
    with kernel.set_up("zram", 1 << 30, tmp_path) as swap, swap.on():
        taken["zram"] = [time_first_answer(tab, front, ways["zram"], digest) for _ in range(ROUNDS)]
    daemon.snapd("attach", tab.pid)
    for way in ("cached", "disk"):
        taken[way] = [time_first_answer(tab, front, ways[way], digest) for _ in range(ROUNDS)]
    daemon.snapd("detach", tab.pid)
    first = {name: statistics.median(one for one, _ in times) for name, times in taken.items()}
    whole = {name: statistics.median(one for _, one in times) for name, times in taken.items()}
    figures.note(
        **{f"first_answer_{name}_ms": 1000 * seconds for name, seconds in first.items()},
        **{f"longest_first_answer_{name}_ms": 1000 * max(one for one, _ in times) for name, times in taken.items()},
        **{f"checksum_{name}_ms": 1000 * seconds for name, seconds in whole.items()},
        rounds=ROUNDS,
    )
    assert first["cached"] <= 2 * first["zram"]
