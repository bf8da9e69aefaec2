"""Each target passes when it runs without snapd, and fails on a wrong byte: else its word under snapd is worth nothing.

Also what the harness promises of any target: an end at its deadline, and no bad end that goes unseen.
"""

import contextlib
import os
import re
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import (
    C_FLAGS,
    TARGETS,
    HarnessError,
    Spawner,
    Target,
    build,
    private_ranges,
    rss_bytes,
    wait_until,
)
from tests.peers import require
from tests.processes import living

PAGE = 4096
EPOLL_WAIT = "232"  # on x86-64
NOT_RESTARTED = {
    "epoll_wait", "epoll_wait_timeout", "recv_rcvtimeo", "semop", "semtimedop", "sigtimedwait", "sigwaitinfo",
}  # fmt: skip
"""The calls that give EINTR after a stop without any signal handler, says signal(7)."""


def flip(pid: int, address: int) -> None:
    """Change one bit of the process's memory behind its back."""
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(address)
        byte = memory.read(1)[0]
        memory.seek(address)
        memory.write(bytes([byte ^ 1]))


def calls_of(tasks: Path) -> set[str]:
    """Return the numbers of the system calls that threads are in, from their /proc/PID/task."""
    return {(task / "syscall").read_text().split()[0] for task in tasks.iterdir()}


@contextlib.contextmanager
def stopped(target: Target) -> Iterator[None]:
    """Hold the target still for a while."""
    stat = Path(f"/proc/{target.pid}/stat")
    target.signal(signal.SIGSTOP)
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the stop of the target")
    yield
    target.signal(signal.SIGCONT)


def flip_in_lines(target: Target, npages: int) -> None:
    """Change a bit in pages of churn's lines, which all begin with the same word."""
    pages: dict[int, list[int]] = {}
    with stopped(target):
        with Path(f"/proc/{target.pid}/mem").open("rb", buffering=0) as memory:
            for start, end in private_ranges(target.pid):
                for page in range(start, end, PAGE):
                    memory.seek(page)
                    (word,) = struct.unpack("<Q", memory.read(8))
                    if word:
                        pages.setdefault(word, []).append(page)
        for page in max(pages.values(), key=len)[:npages]:
            flip(target.pid, page + 8)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("source", sorted(TARGETS.glob("*.c")), ids=lambda path: path.stem)
def test_target_compiles_without_a_warning(source: Path, compiler: str) -> None:
    flags = [*C_FLAGS, "-Wall", "-Wextra", "-Werror", "-c", "-o", os.devnull]
    subprocess.run([str(require(compiler)), *flags, str(source)], check=True)


def test_churn_does_every_operation_and_finds_nothing_wrong(spawn_alone: Spawner, tmp_path: Path) -> None:
    churn = spawn_alone("churn", "--mib", 48, "--seconds", 2, "--guards", "--direct", tmp_path / "file", "--thp", 50)
    result = churn.result()
    assert result["errors"] == result["refused_whole"] == 0
    assert {name for name, count in result["ops"].items() if count == 0} == set()
    assert result["forks"] == result["ops"]["fork"]
    assert result["live_pages"] > result["pages"] // 3


def test_churn_keeps_whole_mappings_whole(spawn_alone: Spawner) -> None:
    churn = spawn_alone(
        "churn", "--mib", 32, "--threads", 2, "--seconds", 1, "--strict-mremap",
        "--only", "rmw=50,hole=20,grow=10,shrink=10,dontunmap=10,dontneed=5,anew=1",
    )  # fmt: skip
    result = churn.result()
    assert result["refused"] == 0
    assert result["grown_in_place"] > 0


def test_churn_ends_early_and_orderly_on_sigterm(spawn_alone: Spawner) -> None:
    churn = spawn_alone("churn", "--mib", 32, "--seconds", 1000, "--pace", 500, "--window", 10)
    churn.signal(signal.SIGTERM)
    assert churn.result()["seconds"] < 500


def test_churn_sees_a_wrong_bit(spawn_alone: Spawner) -> None:
    churn = spawn_alone("churn", "--mib", 32, "--threads", 1, "--seconds", 1, "--only", "read=1", "--pace", 100_000)
    flip_in_lines(churn, 1)
    assert churn.wait() == 1
    assert churn.stderr().startswith("MISMATCH churn thread 0 after ")
    assert churn.stderr().count("\n") == 1


def test_child_of_churn_sees_a_wrong_bit(spawn_alone: Spawner) -> None:
    churn = spawn_alone("churn", "--mib", 32, "--threads", 1, "--seconds", 5, "--only", "fork=1", "--pace", 100_000)
    flip_in_lines(churn, 8000)
    assert churn.wait() == 1
    assert re.match(r"MISMATCH (child|churn) thread 0 after fork ", churn.stderr())


def test_hold_obeys_every_command(spawn_alone: Spawner) -> None:
    hold = spawn_alone("hold", "--mib", 16)
    before = hold.ask("sum")["sum"]
    assert hold.ask("touch", 500, 1)["pages"] == 500
    hold.ask("poke", 200, 2)
    assert hold.ask("sum")["sum"] == before
    hold.ask("write", 100, 3)
    after_write = hold.ask("sum")["sum"]
    assert after_write != before
    hold.ask("kernel", 200, 4)
    hold.ask("discard", 50, 5)
    assert hold.ask("drop", 100, 20)["pages"] == 20
    hold.ask("fork", 50, 6)
    assert hold.ask("sum")["sum"] not in {before, after_write}
    assert hold.ask("threads", 8) == {"ok": True, "threads": 8, "interrupted": 0}
    assert abs(hold.ask("rss")["rss_bytes"] - rss_bytes(hold.pid)) < 1 << 20
    assert hold.ask("where")["bytes"] == 16 << 20
    with pytest.raises(HarnessError, match="unknown command"):
        hold.ask("fly")
    assert hold.ask("threads", 0)["interrupted"] == 0
    hold.quit()


def test_hold_asks_for_huge_pages(spawn_alone: Spawner) -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("transparent huge pages are switched off")
    hold = spawn_alone("hold", "--mib", 16, "--thp")
    assert "hg" in Path(f"/proc/{hold.pid}/smaps").read_text().split()
    assert hold.ask("thp")["anon_huge_bytes"] >= 0
    hold.quit()


def test_hold_is_the_same_each_time_and_another_with_another_seed(spawn_alone: Spawner) -> None:
    sums = [spawn_alone("hold", "--mib", 4, "--seed", seed).ask("sum")["sum"] for seed in (1, 1, 2)]
    assert sums[0] == sums[1] != sums[2]


@pytest.mark.parametrize("command", ["sum", "touch", "fork", "discard"])
def test_hold_sees_a_wrong_bit(spawn_alone: Spawner, command: str) -> None:
    hold = spawn_alone("hold", "--mib", 2)
    address = hold.ask("where")["address"]
    for page in range(0, 2 << 20, PAGE):
        flip(hold.pid, address + page + 4000)
    if command == "discard":
        hold.ask("discard", 1, 1)
        command = "sum"
    with pytest.raises(HarnessError, match="MISMATCH"):
        hold.ask(command, 1, 1)
    assert hold.wait() == 1


def test_calls_return_as_they_should(spawn_alone: Spawner) -> None:
    result = spawn_alone("calls", "--seconds", 2, "--mib", 8).result()
    assert result["errors"] == result["eintr"] == 0
    assert all(call["n"] > 10 and call["wrong"] == 0 for call in result["calls"].values())
    assert result["signals"]["sent"] == result["signals"]["received"] > 1000


def test_calls_count_what_a_stop_interrupts(spawn_alone: Spawner) -> None:
    calls = spawn_alone("calls", "--seconds", 1, "--mib", 8)
    tasks = Path(f"/proc/{calls.pid}/task")
    for _ in range(10):
        wait_until(lambda: EPOLL_WAIT in calls_of(tasks), "a thread in epoll_wait")
        with stopped(calls):
            pass
    result = calls.result()
    interrupted = {name for name, call in result["calls"].items() if call["eintr"]}
    assert "epoll_wait" in interrupted
    assert interrupted <= NOT_RESTARTED
    assert result["errors"] == 0


def test_calls_run_only_what_is_asked_for(spawn_alone: Spawner) -> None:
    result = spawn_alone("calls", "--seconds", 1, "--only", "vfork,read").result()
    assert set(result["calls"]) == {"vfork", "read"}
    assert result["errors"] == result["eintr"] == 0


def test_pins_read_and_write_what_they_should(spawn_alone: Spawner, tmp_path: Path) -> None:
    pins = spawn_alone("pins", "--seconds", 1, "--mib", 16, "--dir", tmp_path, wait=False)
    first = pins.receive()
    if "skipped" in first:
        assert pins.wait() == 77
        pytest.skip(first["skipped"])
    result = pins.result()
    assert result["errors"] == result["interrupted"] == 0
    for transfers in ("fixed_reads", "fixed_writes", "async_reads", "async_writes", "thread_reads", "thread_writes"):
        assert result[transfers] > 10, transfers


def test_same_page_is_right_for_all_threads(spawn_alone: Spawner) -> None:
    same_page = spawn_alone("same_page", "--mib", 8)
    before = same_page.ask("sum")["sum"]
    assert same_page.ask("read", 500, 1)["threads"] == 16
    assert same_page.ask("sum")["sum"] == before
    same_page.ask("write", 100, 2)
    assert same_page.ask("sum")["sum"] != before
    same_page.quit()


def test_objects_keep_their_digest_until_they_are_mutated(spawn_alone: Spawner) -> None:
    objects = spawn_alone("objects", "--mib", 16)
    before = objects.ask("sum")["sum"]
    objects.ask("touch", 5, 1)
    assert objects.ask("sum")["sum"] == before
    objects.ask("mutate", 5, 2)
    assert objects.ask("sum")["sum"] != before
    assert objects.ask("rss")["rss_bytes"] > 16 << 20
    objects.quit()
    again = spawn_alone("objects", "--mib", 16)
    assert again.ask("sum")["sum"] == before


def test_objects_see_a_wrong_bit(spawn_alone: Spawner) -> None:
    objects = spawn_alone("objects", "--mib", 16)
    ranges = list(private_ranges(objects.pid))
    with Path(f"/proc/{objects.pid}/mem").open("rb", buffering=0) as memory:
        for start, end in ranges:
            memory.seek(start)
            data = memory.read(end - start)
            if (at := data.find(b".example\0")) >= 0:
                flip(objects.pid, start + at + 1)
                break
        else:
            pytest.fail("the heap has no record")
    with pytest.raises(HarnessError, match="MISMATCH after sum part"):
        objects.ask("sum")
    assert objects.wait() == 1


def test_pooled_passes_and_takes_its_turn_with_everything(spawn_alone: Spawner) -> None:
    result = spawn_alone("pooled", "--seconds", 1, "--mib", 8).result()
    assert result["errors"] == 0
    assert all(result["done"].values())


def test_target_is_ended_at_its_deadline(spawn_alone: Spawner) -> None:
    hold = spawn_alone("hold", "--mib", 1, deadline_s=0.3)
    with pytest.raises(HarnessError, match="ended at its deadline"):
        hold.receive()
    with pytest.raises(HarnessError, match="ended at its deadline"):
        spawn_alone.targets.pop().close()


def test_bad_end_that_nobody_asked_about_is_reported() -> None:
    spawner = Spawner()
    target = spawner.program(["/bin/sh", "-c", "exit 3"], wait=False)
    wait_until(lambda: not target.alive, "the end of the shell")
    with pytest.raises(HarnessError, match="status 3"), spawner:
        pass


def test_children_of_a_target_are_ended_with_it() -> None:
    with Spawner() as spawner:
        shell = spawner.program(["/bin/sh", "-c", 'sleep 1000 & echo "{\\"child\\": $!}"; wait'], wait=False)
        child = shell.receive()["child"]
    assert child not in living(shell.pid)


def test_compiled_targets_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPD_TEST_CACHE", str(tmp_path))
    first = build("same_page")
    made = first.stat().st_mtime_ns
    assert build("same_page") == first
    assert first.stat().st_mtime_ns == made
    assert build("same_page", "-O1") != first
    assert shutil.which(str(first))
