"""What a dump costs in memory: the daemon stays small, and the target never grows beyond where it was.

Also what a stored page costs on disk, beside lz4 on the same pages.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lz4.block
import pytest

from snapd.pages import PAGE
from snapd.store.reader import StoreReader
from tests.demo import OBJECTS_SHARE
from tests.harness import Daemon, Spawner, rss_bytes
from tests.kernel.driving import MIB, Figures, stores_of
from tests.keys import Keys
from tests.peers import require

DAEMON_BYTES = 64 * MIB
DAEMON_SHARE = 0.004
TARGET_BYTES = 64 * MIB
# By level: how many times smaller than lz4 the store is at least.
SMALLER = {1: 1.4, None: 1.3}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mib", [192, pytest.param(2048, marks=pytest.mark.torture)])
def test_daemon_and_target_stay_in_their_bounds_while_a_python_heap_goes_and_comes(
    daemon: Daemon, spawn: Spawner, figures: Figures, mib: int
) -> None:
    target = spawn("objects", "--mib", math.ceil(mib / OBJECTS_SHARE), deadline_s=900, wait=False)
    target.ready(600)
    daemon.wait_for_session(target.pid)
    started = rss_bytes(target.pid)
    daemon_started = rss_bytes(daemon.pid)
    for pid in (daemon.pid, target.pid):
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # VmHWM counts from here
    first = daemon.dump(target.pid)
    swapped = daemon.wait_for_session(target.pid).swapped_bytes
    digest = target.ask("sum", timeout_s=600)["sum"]
    daemon.dump(target.pid)
    swapped = min(swapped, daemon.wait_for_session(target.pid).swapped_bytes)
    daemon.restore(target.pid)
    assert target.ask("sum", timeout_s=600)["sum"] == digest
    daemon_most, most = rss_bytes(daemon.pid, "VmHWM"), rss_bytes(target.pid, "VmHWM")
    figures.note(
        daemon_start_mib=daemon_started / MIB, daemon_most_mib=daemon_most / MIB,
        bound_mib=(DAEMON_BYTES + DAEMON_SHARE * swapped) / MIB, target_start_mib=started / MIB,
        target_most_mib=most / MIB, swapped_mib=swapped / MIB,
        dump_s=first.duration_s, moved_mib=first.moved_bytes / MIB, longest_stop_us=first.longest_stop_us,
    )  # fmt: skip
    assert swapped > 0.9 * started > 0.9 * mib * MIB
    assert daemon_most < DAEMON_BYTES + DAEMON_SHARE * swapped
    assert most < started + TARGET_BYTES
    target.quit()


@contextmanager
def opened(store: Path) -> Iterator[int]:
    """Open a store for a while."""
    fd = os.open(store, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def compared_to_lz4(daemon: Daemon, figures: Figures, what: str) -> float:
    """Return how many times smaller the frames of the one store are, headers included, than lz4 makes their pages."""
    pages = frames = other = 0
    [store] = stores_of(daemon)
    with opened(store) as fd:
        for frame in StoreReader(fd).scan():
            pages += 1
            frames += frame.header.length_bytes
            # lz4 as well would keep what does not get smaller as it is, and would need no length for it.
            other += min(len(lz4.block.compress(frame.page, store_size=False)), PAGE)
    figures.note(heap=what, pages=pages, ratio=pages * PAGE / frames, lz4_ratio=pages * PAGE / other)
    return other / frames


@pytest.mark.parametrize("level", SMALLER)
def test_store_of_a_python_heap_is_smaller_than_lz4_makes_it(
    daemon: Daemon, spawn: Spawner, figures: Figures, level: int | None
) -> None:
    target = spawn("objects", "--mib", 64)
    report = daemon.dump(target.pid, level=level)
    assert report.moved_bytes > 60 * MIB
    assert compared_to_lz4(daemon, figures, f"python, level {level}") >= SMALLER[level]
    target.ask("sum")
    target.quit()


@pytest.mark.parametrize("level", SMALLER)
def test_store_of_a_redis_heap_is_smaller_than_lz4_makes_it(
    daemon: Daemon, spawn: Spawner, figures: Figures, level: int | None
) -> None:
    require("redis-server")
    keys = Keys(spawn, daemon, 40_000, options={"save": '""'})
    keys.prepare()
    report = daemon.dump(keys.pid, level=level)
    assert report.moved_bytes > 40 * MIB
    assert compared_to_lz4(daemon, figures, f"redis, level {level}") >= SMALLER[level]
    keys.verify()
    keys.end()
