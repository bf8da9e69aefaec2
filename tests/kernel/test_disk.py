"""The disk under the stores: full, failing, cutting writes short. A dump ends with an error; nothing is ever lost.

And what a store takes stays below twice what is needed of it, while a program changes everything again and again.
"""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapd.errors import StoreFailed, StoreFull
from snapd.protocol.options import DumpOptions
from snapd.store.verify import verify_snapshot
from tests.harness import Daemon, Spawner, Target, build
from tests.kernel.driving import MIB, BackToBack, Figures, Sampler, out_bytes

SLACK_BYTES = 20 * MIB
"""Frames that a running dump has replaced are given back 16 MiB at a time; and a segment is open."""


class BadDisk:
    """A daemon whose disk does as it is told."""

    def __init__(self, daemon: Daemon, switch: Path) -> None:
        """Control it by `switch`."""
        self.daemon = daemon
        self._switch = switch

    def become(self, mode: str) -> None:
        """Be as a letter of tests/targets/bad_disk.c says from now on."""
        new = self._switch.with_suffix(".new")
        new.write_text(mode)
        new.replace(self._switch)


@pytest.fixture
def bad_disk(tmp_path: Path) -> Iterator[BadDisk]:
    """Yield a daemon on a disk that is good so far."""
    shim = build("bad_disk", "-shared", "-fPIC")
    switch = tmp_path / "mode"
    with Daemon("--min-free", "0", env={"LD_PRELOAD": str(shim), "BAD_DISK": str(switch)}) as daemon:
        yield BadDisk(daemon, switch)


def used_bytes(disk: Path) -> int:
    """Return what is used of a file system."""
    there = os.statvfs(disk)
    return (there.f_blocks - there.f_bfree) * there.f_frsize


def verified(target: Target) -> None:
    """See that every byte is right, for a child as well."""
    target.ask("fork", 200, 1)
    target.ask("sum")


@pytest.mark.parametrize(
    ("mode", "error"), [("e", StoreFailed), ("q", StoreFull), ("f", StoreFull), ("S", StoreFailed)]
)
def test_a_write_that_fails_ends_the_dump_and_loses_nothing(
    bad_disk: BadDisk, mode: str, error: type[Exception]
) -> None:
    daemon = bad_disk.daemon
    with Spawner(daemon) as spawn:
        hold = spawn("hold", "--mib", 48)
        daemon.dump(hold.pid, share_percent=40, seed=1)
        hold.ask("write", 3000, 1)
        bad_disk.become(mode)
        for _ in range(2):
            with pytest.raises(error):
                daemon.dump(hold.pid)
        with pytest.raises(error), daemon.client() as client:
            client.dump(hold.pid, DumpOptions(keep="never"))
        assert not list((daemon.state_dir / "snapshots").rglob("*.snapd"))
        verified(hold)
        hold.ask("write", 3000, 2)
        bad_disk.become("n")
        daemon.dump(hold.pid)
        assert out_bytes(daemon, hold.pid) > 40 * MIB
        verified(hold)
        daemon.restore(hold.pid)
        verified(hold)
        hold.quit()


def test_a_disk_that_fails_now_and_then_under_a_working_program(bad_disk: BadDisk) -> None:
    daemon = bad_disk.daemon
    with Spawner(daemon) as spawn:
        hold = spawn("hold", "--mib", 32)
        bad_disk.become("r")
        with BackToBack(daemon, hold.pid, ignore=(StoreFailed,)) as dumps:
            for number in dumps.until(4):
                hold.ask("write", 800, number)
                hold.ask("touch", 300, number)
                hold.ask("discard", 50, number)
        bad_disk.become("n")
        verified(hold)
        hold.quit()


def test_short_writes_are_gone_on_with(bad_disk: BadDisk) -> None:
    daemon = bad_disk.daemon
    with Spawner(daemon) as spawn:
        hold = spawn("hold", "--mib", 16)
        bad_disk.become("s")
        with daemon.client() as client:
            report = client.dump(hold.pid, DumpOptions(keep="short"))
        assert report.snapshot is not None
        assert verify_snapshot(Path(report.snapshot)).ok
        assert out_bytes(daemon, hold.pid) > 14 * MIB
        verified(hold)
        hold.quit()


@pytest.mark.parametrize("mib", [96, pytest.param(512, marks=pytest.mark.torture)])
def test_a_disk_that_fills_up_in_the_middle_of_a_large_dump(
    small_disk: Callable[[int], Path], figures: Figures, mib: int
) -> None:
    disk_mib = mib // 8
    disk = small_disk(disk_mib)
    with Daemon("--min-free", "0", env={"SNAPD_STATE_DIR": str(disk)}) as daemon, Spawner(daemon) as spawn:
        hold = spawn("hold", "--mib", mib)
        with pytest.raises(StoreFull):
            daemon.dump(hold.pid)
        figures.note(out_mib=out_bytes(daemon, hold.pid) / MIB, used_mib=used_bytes(disk) / MIB)
        assert used_bytes(disk) > (disk_mib - 6) * MIB, "it was filled"
        verified(hold)
        with pytest.raises(StoreFull):
            daemon.dump(hold.pid)
        verified(hold)
        subprocess.run(["mount", "-o", f"remount,size={mib}m", str(disk)], check=True, timeout=10)
        daemon.dump(hold.pid)
        assert out_bytes(daemon, hold.pid) > 15 / 16 * mib * MIB
        verified(hold)
        hold.quit()


@pytest.mark.parametrize("floor", ["12M", "40%"])
def test_a_dump_stops_at_the_floor_and_not_below_it(small_disk: Callable[[int], Path], floor: str) -> None:
    disk = small_disk(30)
    with Daemon("--min-free", floor, env={"SNAPD_STATE_DIR": str(disk)}) as daemon, Spawner(daemon) as spawn:
        hold = spawn("hold", "--mib", 96)
        with pytest.raises(StoreFull):
            daemon.dump(hold.pid)
        free = 30 * MIB - used_bytes(disk)
        assert 8 * MIB < free < 14 * MIB
        verified(hold)
        with pytest.raises(StoreFull):  # told before anything moves
            daemon.dump(hold.pid)
        daemon.restore(hold.pid)
        assert used_bytes(disk) < MIB
        daemon.dump(hold.pid, share_percent=10)
        verified(hold)
        hold.quit()


@pytest.mark.parametrize("dumps", [5, pytest.param(20, marks=pytest.mark.torture)])
def test_a_store_takes_less_than_twice_what_is_needed_of_it(
    small_disk: Callable[[int], Path], figures: Figures, dumps: int
) -> None:
    disk = small_disk(400)
    with Daemon(env={"SNAPD_STATE_DIR": str(disk)}) as daemon, Spawner(daemon) as spawn:
        hold = spawn("hold", "--mib", 128)
        daemon.dump(hold.pid)
        worst = peak = stored = 0
        for number in range(dumps):
            hold.ask("write", 9000, number)
            with Sampler(used=lambda: used_bytes(disk)) as samples:
                daemon.dump(hold.pid)
            session = daemon.session(hold.pid)
            assert session is not None
            stored = session.stored_bytes
            worst = max(worst, used_bytes(disk) - 2 * stored)
            peak = max(peak, samples.most["used"] - 2 * stored)
        figures.note(
            stored_mib=stored / MIB, used_mib=used_bytes(disk) / MIB, worst_mib=worst / MIB,
            peak_mib=peak / MIB,
        )  # fmt: skip
        assert worst < 3 * MIB
        assert peak < SLACK_BYTES
        hold.ask("discard", 30_000, 1)
        verified(hold)
        hold.quit()
