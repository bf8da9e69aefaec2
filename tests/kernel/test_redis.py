"""A redis-server goes to disk again and again while a client reads and writes and the server saves itself."""

import shutil
import threading
from pathlib import Path

import pytest

from snapd.protocol.reports import DumpReport
from tests.demo import Work
from tests.harness import Daemon, Spawner, rss_bytes, wait_until
from tests.kernel.driving import MIB, Figures
from tests.keys import Keys
from tests.peers import require

AUTOSAVE = {"save": "2 1"}
FREED_SHARE = 0.9
DUMPS = 5


class Busy:
    """The client that works without a pause; whoever holds its lock has the keys for himself."""

    def __init__(self, keys: Keys) -> None:
        self.lock = threading.Lock()
        self._keys = keys

    def once(self) -> None:
        with self.lock:
            self._keys.work()


def quiet(keys: Keys) -> None:
    """Wait until no child saves."""
    wait_until(lambda: not keys.client.info("persistence")["rdb_bgsave_in_progress"], "the end of a save")


def background_save(keys: Keys) -> None:
    """Have a save made of everything that is there now."""
    quiet(keys)
    keys.client.bgsave()
    quiet(keys)
    assert keys.client.info("persistence")["rdb_last_bgsave_status"] == "ok"


def read_back(rdb: Path, count: int, versions: dict[int, int], spawn_alone: Spawner) -> None:
    """Have another server, without any snapd, load the save, and compare every key."""
    other = Keys(spawn_alone, None, count, options={"save": '""', "dbfilename": rdb.name}, directory=rdb.parent)
    other.wait()
    other.versions = versions
    other.verify()
    other.end()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("count", [40_000, pytest.param(200_000, marks=pytest.mark.torture)])
def test_redis_is_dumped_five_times_while_it_serves_and_saves_itself(
    daemon: Daemon, spawn: Spawner, spawn_alone: Spawner, figures: Figures, count: int
) -> None:
    require("redis-server")
    keys = Keys(spawn, daemon, count, busy=range(count // 2, count // 2 + count // 20), options=AUTOSAVE)
    other = daemon.directory / "other"
    other.mkdir()
    keys.prepare()
    busy = Busy(keys)
    work = Work(busy.once, 0.0)
    reports: list[DumpReport] = []
    versions: dict[int, int] = {}
    began = keys.client.info("stats")["total_forks"]
    with work.going_on():
        for number in range(DUMPS):
            with busy.lock:
                background_save(keys)  # what a child shares stays, and the next autosave is some time away
                work.take()
            before = rss_bytes(keys.pid)
            report = daemon.dump(keys.pid)
            freed = before - rss_bytes(keys.pid)
            operations, slowest_s = work.take()
            reports.append(report)
            shared_bytes = report.skipped.get("shared_with_child", 0)
            figures.note(
                dump=number, rss_mib=before / MIB, moved_mib=report.moved_bytes / MIB,
                freed_mib=report.freed_bytes / MIB, measured_mib=freed / MIB, clean_mib=report.clean_bytes / MIB,
                shared_mib=shared_bytes / MIB, duration_s=report.duration_s,
                longest_stop_us=report.longest_stop_us, operations=operations, slowest_ms=slowest_s * 1000,
            )  # fmt: skip
            assert report.moved_bytes + shared_bytes > 0.9 * (before - report.skipped["file"])
            assert report.freed_bytes >= FREED_SHARE * report.moved_bytes
            assert freed >= FREED_SHARE * report.moved_bytes
            assert operations > 0
            with busy.lock:
                if number == 1:
                    background_save(keys)  # by a child that has nearly all from the store
                    versions = dict(keys.versions)
                    shutil.copy(daemon.directory / "dump.rdb", other)
                keys.verify()  # which brings everything back for the next dump
    saves = keys.client.info("stats")["total_forks"] - began
    figures.note_stops(reports)
    figures.note(saves=saves, changes=sum(keys.versions.values()))
    assert saves > DUMPS
    read_back(other / "dump.rdb", count, versions, spawn_alone)
    keys.verify()
    keys.end()
