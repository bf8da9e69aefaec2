"""Memory that a device writes while it is being dumped: fixed buffers stay, transfers in flight arrive."""

import signal
import time
from pathlib import Path

import pytest

from snapd.errors import NotStopping
from tests.harness import Daemon, Spawner
from tests.kernel.driving import MIB, PAGE, BackToBack, Figures, present
from tests.peers import lacking

pytestmark = pytest.mark.shares_daemon

FIXED_PAGES = 8
DUMPS = 100


def test_devices_read_and_write_the_programs_memory_under_back_to_back_dumps(
    daemon: Daemon, spawn: Spawner, figures: Figures, tmp_path: Path
) -> None:
    pins = spawn("pins", "--seconds", 5, "--mib", 48, "--dir", tmp_path, "--pace", 500, "--threads", 2, wait=False)
    first = pins.receive()
    if "skipped" in first:
        assert pins.wait() == 77
        lacking(first["skipped"])
    daemon.wait_for_session(pins.pid)
    buffers = first["fixed_address"]
    for _ in range(3):
        assert daemon.dump(pins.pid).pinned_bytes >= FIXED_PAGES * PAGE
        assert all(present(pins.pid, buffers, buffers + FIXED_PAGES * PAGE))
    with BackToBack(daemon, pins.pid) as dumps:
        result = pins.result()
    figures.note_stops(dumps.reports)
    figures.note(**{name: result[name] for name in ("fixed_reads", "async_reads", "thread_reads")})
    assert result["errors"] == result["interrupted"] == 0
    assert result["fixed_reads"] > 10
    assert dumps.total("moved_bytes") > 24 * MIB


@pytest.mark.timeout(300)
def test_fixed_buffers_of_an_io_uring_are_right_across_a_hundred_dumps(
    daemon: Daemon, spawn: Spawner, figures: Figures, tmp_path: Path
) -> None:
    pins = spawn("pins", "--seconds", 250, "--mib", 8, "--dir", tmp_path, "--pace", 2000, "--threads", 1, wait=False)
    first = pins.receive()
    if "skipped" in first:
        assert pins.wait() == 77
        lacking(first["skipped"])
    daemon.wait_for_session(pins.pid)
    buffers = first["fixed_address"]
    with BackToBack(daemon, pins.pid, ignore=(NotStopping,)) as dumps:
        for _ in dumps.until(DUMPS, 200):
            time.sleep(0.02)
    assert all(present(pins.pid, buffers, buffers + FIXED_PAGES * PAGE))
    pins.signal(signal.SIGTERM)
    result = pins.result()
    assert len(dumps.reports) >= DUMPS
    assert all(report.pinned_bytes >= FIXED_PAGES * PAGE for report in dumps.reports)
    figures.note(dumps=len(dumps.reports), **{name: result[name] for name in ("fixed_reads", "fixed_writes")})
    assert result["errors"] == result["interrupted"] == 0
    assert result["fixed_reads"] > DUMPS


def test_pages_that_are_pinned_on_both_sides_of_a_border_between_spans_keep_their_bytes(
    daemon: Daemon, spawn: Spawner
) -> None:
    """Mappings that follow each other lie side by side in the asides too, and a run of pinned pages may be of both."""
    hold = spawn("hold", "--mib", 48)
    hold.ask("split", 300)
    before = hold.ask("sum")["sum"]
    pinned = hold.ask("pin", 2000, 8000)
    if "skipped" in pinned:
        lacking(pinned["skipped"])
    for _ in range(2):
        assert daemon.dump(hold.pid).pinned_bytes >= 8000 * PAGE
        assert hold.ask("sum")["sum"] == before
    hold.quit()


def test_child_has_the_pages_that_were_pinned_in_its_parent(daemon: Daemon, spawn: Spawner) -> None:
    """An aside is kept from children, and a page that returns from it must not stay so."""
    hold = spawn("hold", "--mib", 8)
    pinned = hold.ask("pin", 300, 200)
    if "skipped" in pinned:
        lacking(pinned["skipped"])
    for seed in range(2):
        assert daemon.dump(hold.pid).pinned_bytes >= 200 * PAGE
        hold.ask("fork", 100, seed)
    hold.quit()
