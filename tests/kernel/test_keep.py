"""Kept dumps: a snapshot holds what the dump saw, changes no more, belongs to who asked, and is whole or not there."""

import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from snapd.errors import NotPermitted, SnapshotExists, StoreFull
from snapd.protocol.options import DumpOptions
from snapd.protocol.reports import DumpReport
from snapd.store.format import PageState
from snapd.store.snapshot import Snapshot, open_snapshot
from snapd.store.verify import verify_snapshot
from tests.harness import Daemon, Spawner, Target, wait_until
from tests.kernel.driving import MIB, PAGE, Figures
from tests.peers import lacking
from tests.processes import files_of

NOBODY = 65534
LOST = 20


def kept(daemon: Daemon, pid: int, name: str) -> DumpReport:
    """Dump and keep."""
    with daemon.client() as client:
        return client.dump(pid, DumpOptions(keep=name))


def heap_of(target: Target) -> tuple[int, int]:
    """Return the first address of the heap and the one behind it."""
    where = target.ask("where")
    return where["address"], where["address"] + where["bytes"]


def memory(pid: int, start: int, end: int) -> bytes:
    """Return the memory of a process, of which nothing may be out."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as file:
        data = bytearray()
        while len(data) < end - start:
            file.seek(start + len(data))
            data += file.read(min(MIB, end - start - len(data)))
        return bytes(data)


def content(snapshot: Snapshot, start: int, end: int) -> bytes:
    """Return what a snapshot holds of an interval, which must be held whole."""
    pages = {address: page for address, page in snapshot.pages() if start <= address < end}
    left = [(one.pages, one.reason) for one in snapshot.ranges if not one.held and start <= one.pages.start < end]
    assert not left
    assert sorted(pages) == list(range(start, end, PAGE))
    return b"".join(pages[address] for address in sorted(pages))


def path_of(report: DumpReport) -> Path:
    """Return the file of a dump that was kept."""
    assert report.snapshot is not None
    path = Path(report.snapshot)
    assert path.stat().st_size == report.snapshot_bytes
    return path


def test_a_snapshot_holds_what_the_process_had_and_never_changes(
    daemon: Daemon, spawn: Spawner, figures: Figures
) -> None:
    hold = spawn("hold", "--mib", 48)
    start, end = heap_of(hold)
    before, digests = [memory(hold.pid, start, end)] * 2, []
    for number in range(3):  # all in memory; all out; some out, some clean, some written
        path = path_of(kept(daemon, hold.pid, f"number-{number}"))
        assert path == daemon.state_dir / "snapshots" / "0" / f"number-{number}.snapd"
        digests.append(hashlib.sha256(path.read_bytes()).digest())
        if number == 1:
            hold.ask("touch", 2000, 1)
            hold.ask("write", 2000, 2)
            hold.ask("discard", 500, 3)
            daemon.dump(hold.pid)
            hold.ask("touch", 1000, 4)
            hold.ask("write", 1000, 5)
    hold.ask("sum")  # which brings all of it back, unchanged
    before.append(memory(hold.pid, start, end))
    hold.ask("write", 4000, 6)
    daemon.dump(hold.pid)
    daemon.restore(hold.pid)
    hold.ask("sum")
    hold.quit()
    for number, (wanted, digest) in enumerate(zip(before, digests, strict=True)):
        path = daemon.state_dir / "snapshots" / "0" / f"number-{number}.snapd"
        assert hashlib.sha256(path.read_bytes()).digest() == digest
        assert verify_snapshot(path).ok
        with open_snapshot(path) as snapshot:
            assert content(snapshot, start, end) == wanted
            assert snapshot.facts["pid"] == hold.pid
            assert snapshot.facts["comm"] == "hold"
            assert any("[stack]" in line for line in snapshot.facts["maps"])
            assert {"stack", "file", "agent"} <= set(snapshot.facts["reasons"])
        figures.note(number=number, file_mib=path.stat().st_size / MIB)


def test_a_snapshot_has_zeros_where_pages_were_taken_away_without_a_word(daemon: Daemon, spawn: Spawner) -> None:
    """They had come from frames that the store has still."""
    steps = spawn("steps", "--mib", 2)
    start, _ = heap_of(steps)
    daemon.dump(steps.pid)
    steps.ask("look")
    if steps.ask("lose", start + 100 * PAGE, LOST).get("unsupported"):
        lacking("the kernel has no MADV_GUARD_INSTALL")
    with open_snapshot(path_of(kept(daemon, steps.pid, "lost"))) as snapshot:
        pages = dict(snapshot.pages())
    assert any(pages[start + 99 * PAGE])
    assert not any(any(pages.get(start + page * PAGE, b"")) for page in range(100, 100 + LOST))
    steps.quit()


def test_pages_of_zeros_that_are_out_are_in_the_snapshot_and_not_called_memory_that_never_was(
    daemon: Daemon, spawn: Spawner
) -> None:
    hold = spawn("hold", "--mib", 8)
    start, end = heap_of(hold)
    before = memory(hold.pid, start, end)
    hold.ask("discard", 8000, 1)  # most pages; each is read then, and so is a page of zeros
    daemon.dump(hold.pid)
    path = path_of(kept(daemon, hold.pid, "zeros"))
    hold.ask("write", 2000, 2)  # some of them are present and written now, and their entries say zeros
    written = path_of(kept(daemon, hold.pid, "written"))
    hold.ask("sum")
    after = memory(hold.pid, start, end)
    with open_snapshot(path) as snapshot:
        found = content(snapshot, start, end)
        assert all(found[at : at + PAGE] in (bytes(PAGE), before[at : at + PAGE]) for at in range(0, len(found), PAGE))
        assert found.count(bytes(PAGE)) > 1000
    with open_snapshot(written) as snapshot:
        assert content(snapshot, start, end) == after
    hold.quit()


def test_pages_that_the_program_takes_back_during_the_dump_are_in_the_snapshot(daemon: Daemon, spawn: Spawner) -> None:
    """Packing is slow at this level, so that the program has most pages again before they are packed."""
    hold = spawn("hold", "--mib", 24)
    start, end = heap_of(hold)
    before = memory(hold.pid, start, end)
    with daemon.client() as client:
        steps = client.iter_dump(hold.pid, DumpOptions(level=19, keep="touched"))
        next(steps)
        touched = 0
        hold.send("touch", 50_000, 1)
        report = next(one for one in steps if isinstance(one, DumpReport))
        touched = hold.receive()["ok"]
    assert touched
    session = daemon.session(hold.pid)
    assert session is not None
    assert session.faults > 100
    path = path_of(report)
    assert verify_snapshot(path).ok
    with open_snapshot(path) as snapshot:
        assert content(snapshot, start, end) == before
    hold.ask("sum")
    hold.quit()


def test_snapshots_are_good_while_the_program_writes_discards_and_forks(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 24)
    start, end = heap_of(hold)
    names = (f"busy-{number}" for number in range(1000))
    reports: list[DumpReport] = []
    for seed in range(3):
        hold.send("write", 20_000, seed)
        reports.append(kept(daemon, hold.pid, next(names)))
        hold.receive()
        hold.send("discard", 100, seed)
        reports.append(kept(daemon, hold.pid, next(names)))
        hold.receive()
        hold.ask("fork", 50, seed)
    hold.ask("sum")
    hold.quit()
    for report in reports:
        found = verify_snapshot(path_of(report))
        assert found.ok
        assert not found.lost_pages
        with open_snapshot(path_of(report)) as snapshot:
            held = sum(one.pages.npages for one in snapshot.ranges if one.held and start <= one.pages.start < end)
            assert held > 0.5 * (end - start) / PAGE


def test_a_name_that_is_taken_is_refused_and_the_first_one_stays(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 8)
    path = path_of(kept(daemon, hold.pid, "one"))
    content_before = path.read_bytes()
    with pytest.raises(SnapshotExists):
        kept(daemon, hold.pid, "one")
    done = daemon.snapd("dump", "--keep", "one", hold.pid, check=False)
    assert done.returncode == SnapshotExists.exit_code
    assert path.read_bytes() == content_before
    for bad in ("../x", ".x", "a/b", "", "x" * 101):
        done = daemon.snapd("dump", "--keep", bad, hold.pid, check=False)
        assert done.returncode == 2, bad
    assert [one.name for one in path.parent.iterdir()] == ["one.snapd"]
    hold.ask("sum")
    hold.quit()


def test_a_snapshot_is_its_owners_and_nobody_elses(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 8, user=NOBODY)
    script = (
        "from snapd import Client; from snapd.protocol.options import DumpOptions\n"
        f"print(Client({str(daemon.runtime_dir)!r}).dump({hold.pid}, DumpOptions(keep='mine')).snapshot)"
    )
    path = Path(as_user(NOBODY, script))
    assert path.parent.name == str(NOBODY)
    status = path.stat()
    assert (status.st_uid, status.st_mode & 0o7777) == (NOBODY, 0o600)
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert as_user(NOBODY, f"print(len(open({str(path)!r}, 'rb').read()))") == str(status.st_size)
    with pytest.raises(AssertionError, match="Permission denied"):
        as_user(NOBODY - 1, f"open({str(path)!r})")
    root = path_of(kept(daemon, hold.pid, "mine"))  # root's own, beside it
    assert root.stat().st_uid == 0
    hold.ask("sum")
    hold.quit()


def as_user(user: int, script: str) -> str:
    """Run a line of Python as somebody, from a fork, and return what it prints."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sys.stdout = os.fdopen(write, "w")
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            exec(script)
        except BaseException as error:  # noqa: BLE001
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as output:
        text = output.read().strip()
    assert os.waitpid(pid, 0)[1] == 0, text
    return text


def test_memory_that_the_kernel_hides_from_its_user_is_not_given_to_them(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 8, user=NOBODY)
    script = (
        "from snapd import Client; from snapd.protocol.options import DumpOptions\n"
        f"print(Client({str(daemon.runtime_dir)!r}).dump({hold.pid}, DumpOptions(keep='hidden')).snapshot)"
    )
    mem = Path(f"/proc/{hold.pid}/mem")
    assert mem.stat().st_uid == NOBODY
    hold.ask("hide")
    assert mem.stat().st_uid == 0
    with pytest.raises(AssertionError, match=NotPermitted.__name__):
        as_user(NOBODY, script)
    assert path_of(kept(daemon, hold.pid, "hidden")).stat().st_uid == 0
    hold.ask("sum")
    hold.quit()


def test_a_frame_that_is_damaged_is_lost_in_the_snapshot_and_never_zeros(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", 8)
    start, _ = heap_of(hold)
    daemon.dump(hold.pid)
    flip_frame(daemon, 4096 + 64)
    path = path_of(kept(daemon, hold.pid, "damaged"))
    found = verify_snapshot(path)
    assert found.ok
    assert found.lost_pages == 1
    with open_snapshot(path) as snapshot:
        bad = [
            address
            for one in snapshot.ranges
            if one.held
            for address, entry in snapshot.entries(one)
            if entry.state is PageState.BAD
        ]
    assert len(bad) == 1
    assert bad[0] >= start
    assert "1 page lost" in daemon.snapd("inspect", path).stdout
    daemon.allow(r"the page at .* is lost")
    hold.kill()


def flip_frame(daemon: Daemon, offset: int) -> None:
    """Change a byte in the one store that the daemon has."""
    for link, what in files_of(daemon.process.pid):
        if what.startswith(str(daemon.state_dir)):
            fd = os.open(link, os.O_RDWR)
            try:
                os.pwrite(fd, bytes([os.pread(fd, 1, offset)[0] ^ 1]), offset)
            finally:
                os.close(fd)
            return
    raise AssertionError("the daemon has no store")


def test_a_full_disk_leaves_no_snapshot_and_loses_nothing(
    small_disk: Callable[[int], Path],
) -> None:
    disk = small_disk(40)
    with Daemon("--min-free", "0", env={"SNAPD_STATE_DIR": str(disk)}) as daemon, Spawner(daemon) as spawn:
        hold = spawn("hold", "--mib", 64)
        with pytest.raises(StoreFull):
            kept(daemon, hold.pid, "too-much")
        assert not list(disk.glob("snapshots/*/*"))
        hold.ask("sum")
        report = daemon.dump(hold.pid)
        assert report.snapshot is None
        hold.ask("sum")
        hold.quit()


@pytest.mark.parametrize("rounds", [4, pytest.param(40, marks=pytest.mark.torture)])
def test_a_daemon_that_is_killed_leaves_a_whole_file_or_none(figures: Figures, rounds: int) -> None:
    whole = none = 0
    for number in range(rounds):
        with Daemon() as daemon, Spawner(daemon) as spawn:
            daemon.allow(".*")
            hold = spawn("hold", "--mib", 32)
            path = daemon.state_dir / "snapshots" / "0" / "cut.snapd"
            with daemon.client() as client:
                steps = client.iter_dump(hold.pid, DumpOptions(keep="cut"))
                next(steps)
                if number % 2:  # the very instant at which the file has its name
                    spin_until(path.exists)
                else:
                    time.sleep(0.01 * number)
                daemon.kill()
                steps.close()
            files = list((daemon.state_dir / "snapshots").rglob("*.*"))
            assert files in ([], [path])
            assert all(verify_snapshot(one).ok for one in files)
            whole += len(files)
            none += not files
            hold.kill()
    figures.note(whole=whole, none=none)
    assert whole
    assert none


def spin_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    """Wait without a pause."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end


def test_what_a_crash_left_unfinished_is_removed_at_the_next_start(tmp_path: Path) -> None:
    own = tmp_path / "state" / "snapshots" / "0"
    own.mkdir(parents=True)
    (own / ".partial-0123").write_bytes(b"x")
    (own / "other.snapd").write_bytes(b"x")
    with Daemon(env={"SNAPD_STATE_DIR": str(tmp_path / "state")}):
        wait_until(lambda: not (own / ".partial-0123").exists(), "the partial file's end")
        assert (own / "other.snapd").exists()
