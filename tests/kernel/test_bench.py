"""`snapd bench` works, in small: every part gives its figures, every byte is verified, and nothing is left behind.

Whether a figure is good is nobody's test. Also here: the program that is measured notices a wrong byte.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapd.bench import program_path
from snapd.bench.measure import OF_ONE_HEAP, PARTS
from snapd.cli import bench
from tests.harness import HarnessError, Spawner, Target, wait_until
from tests.peers import lacking

pytestmark = pytest.mark.kernel

RUN_S = 100.0
SMALL = ("--size", "8M", "--rounds", "1")
FIGURES = {
    "dump": {"dump_mb_s", "restore_mb_s", "ratio", "daemon_mib", "longest_stop_us"},
    "touch": {"sparse_p50_us", "sparse_p99_us", "random_all_s", "sequential_all_s"},
    "set": {"set_all_s", "set_resident_share"},
    "fresh": {"fresh_run_ns", "fresh_hole_ns"},
    "threads": {"threads_times"},
    "again": {"again_time_share", "again_bytes_share"},
    "load": {"load_longest_stop_us", "load_stops_share"},
}


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Yield a directory for all that is made, with a name short enough for sockets; nothing may be left in it."""
    with tempfile.TemporaryDirectory(prefix="snapd-small-") as name:
        yield Path(name)
        wait_until(lambda: not users(name), "the end of every process that was started")
        assert list(Path(name).iterdir()) == []


def users(directory: str) -> list[str]:
    """Return the processes that were started with `directory` for their temporary files, as all descendants are."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"TMPDIR={directory}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(entry.name)
    return found


def start(scratch: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start the bench with `scratch` for its temporary files and its state directory, which it has to make."""
    environ = {**os.environ, "TMPDIR": str(scratch), "SNAPD_STATE_DIR": str(scratch / "var/state")}
    return subprocess.Popen(
        [sys.executable, "-m", "snapd", "bench", *SMALL, *arguments],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(scratch: Path, *arguments: str) -> str:
    """Run the bench to its end, which must be a good one, and return what it printed."""
    process = start(scratch, *arguments)
    try:
        out, error = process.communicate(timeout=RUN_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, error = process.communicate(timeout=RUN_S)
        pytest.fail(f"{arguments} took more than {RUN_S:g} s: {out}{error}")
    assert process.returncode == 0, out + error
    assert error == ""
    return out


def swap_state() -> tuple[str, list[str], list[str]]:
    """Return what of the machine's swap, block devices and control groups a bench could leave changed."""
    devices = sorted(one.name for one in Path("/sys/block").iterdir())
    groups = [str(path) for path in Path("/sys/fs/cgroup").glob("**/snapd-bench-*")]
    return Path("/proc/swaps").read_text(), devices, groups


def test_every_part_gives_its_figures_beside_the_limits(scratch: Path) -> None:
    parts = [word for name in FIGURES for word in ("--part", name)]
    found: dict[str, Any] = json.loads(run(scratch, *parts, "--json"))
    assert found["verified"] is True
    for names in FIGURES.values():
        assert not {name for name in names if found["figures"][name]["median"] <= 0}
    for limit in ("compress_mb_s", "decode_mb_s", "copy_bulk_mb_s", "copy_page_us", "trip_same_cpu_p50_us"):
        assert found["limits"][limit]["median"] > 0
    assert found["kernel"] == {}
    assert found["machine"]["kernel"] == os.uname().release
    assert len(found["figures"]["sequential_all_s"]["values"]) == found["options"]["rounds"] == 1
    assert sum(count for _, count in found["histograms"]["snapd_random"]) == (8 << 20) // 4096
    assert len(found["series"]["snapd"]["latest_ms"]) > 100
    assert {one["figure"] for one in found["musts"]} >= {"restore, MB/s", "daemon's memory, MiB"}


def test_the_parts_with_processes_of_their_own_give_their_figures(scratch: Path) -> None:
    parts = ("--part", "huge", "--part", "idle", "--part", "sizes")
    found: dict[str, Any] = json.loads(run(scratch, *parts, "--targets", "3", "--json"))["figures"]
    assert found["idle_mib"]["median"] > 0
    assert found["idle_cpu_share"]["median"] < 1
    assert found["size_dump_4_mb_s"]["median"] > 0
    assert found["size_restore_64_mb_s"]["median"] > 0
    assert 0 <= found["size_dump_spread"]["median"] < 1


def test_table_fits_a_terminal_and_the_report_needs_nothing_else(scratch: Path) -> None:
    report = scratch / "report.html"
    text = run(scratch, "--part", "dump", "--part", "touch", "--report", str(report))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    for words in ("dump, MB/s", "restore, MB/s", "touch of 2%, p50, us", os.uname().release, "Every byte was verified"):
        assert words in text
    page = report.read_text()
    report.unlink()
    assert page.count("<svg") == page.count("</svg>") == 3
    assert not re.findall(r"https?:|\bsrc=|\bhref=|@import|url\(", page)
    for words in ("Throughput", "Latency: touches of 2% of the heap", "dump, MB/s", os.uname().release):
        assert words in page


@pytest.mark.root
def test_kernels_swap_is_measured_beside_it_and_is_as_it_was_afterwards(scratch: Path) -> None:
    need_zram()
    before = swap_state()
    found: dict[str, Any] = json.loads(run(scratch, "--part", "touch", "--kernel", "zram", "--json"))
    assert swap_state() == before
    assert found["kernel"]["dump_mb_s"]["median"] > 0
    assert found["kernel"]["ratio"]["median"] > 1
    assert found["kernel"]["random_all_s"]["median"] > 0
    assert "touch of all, random, s" in {one["figure"] for one in found["musts"]}


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_bench_that_is_ended_leaves_swap_as_it_was(scratch: Path, number: signal.Signals) -> None:
    need_zram()
    before = swap_state()
    process = start(scratch, "--part", "touch", "--kernel", "zram", "--rounds", "99")
    wait_until(lambda: swap_state()[0] != before[0], "swap that the bench has set up", RUN_S)
    process.send_signal(number)
    error = process.communicate(timeout=RUN_S)[1]
    assert process.returncode == 128 + number, error
    assert swap_state() == before


@pytest.mark.root
def test_a_swap_that_cannot_be_set_up_is_named_and_leaves_nothing(scratch: Path) -> None:
    if os.geteuid() != 0:
        lacking("only root may set up swap")
    before = swap_state()
    script = (
        "import sys; from pathlib import Path; from snapd.bench import kernel\n"
        "kernel._write_header = lambda path, pages: None\n"
        f"with kernel.set_up('swapfile', 1 << 20, Path({str(scratch)!r})) as swap:\n"
        "    with swap.on(): pass\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=RUN_S, check=False)
    assert "SwapUnusable: Swap on " in done.stderr
    assert swap_state() == before


def need_zram() -> None:
    """Leave the test out where the kernel's zram cannot be had."""
    if os.geteuid() != 0:
        lacking("only root may set up swap")
    algorithms = [one.read_text() for one in Path("/sys/block").glob("zram*/comp_algorithm")]
    if not Path("/sys/class/zram-control/hot_add").exists() or not any("lz4" in one for one in algorithms):
        lacking("the kernel has no zram with lz4")


@pytest.mark.parametrize(
    "arguments", [("--size", "7M"), ("--size", "5G"), ("--size", "512"), ("--report", "/no/dir/x")]
)
def test_what_cannot_be_measured_is_refused_before_anything_is_done(scratch: Path, arguments: tuple[str, ...]) -> None:
    process = start(scratch, *arguments)
    out, error = process.communicate(timeout=RUN_S)
    assert process.returncode == 2, error
    assert out == ""


def test_the_command_offers_the_parts_that_there_are() -> None:
    assert bench.PARTS == PARTS
    assert FIGURES.keys() == OF_ONE_HEAP.keys()


def heap(spawn_alone: Spawner) -> Target:
    """Return the program that is measured, without a daemon."""
    return spawn_alone.program([str(program_path("load")), "--mib", "8"])


@pytest.mark.parametrize(
    "command",
    [("sparse", 2048, 1), ("sparse", 2048, 1, 8), ("random", 1), ("sequential",), ("set", 2048, 1), ("sum",)],
)
def test_program_that_is_measured_sees_a_wrong_byte(spawn_alone: Spawner, command: tuple[str | int, ...]) -> None:
    target = heap(spawn_alone)
    name, *arguments = command
    target.ask(str(name), *map(int, arguments))
    address = target.ask("where")["address"]
    with Path(f"/proc/{target.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(address + 5 * 4096)
        memory.write(b"\xff")
    with pytest.raises(HarnessError, match="MISMATCH"):
        target.ask(str(name), *map(int, arguments))
    assert target.wait() == 1


def test_program_that_is_measured_works_alone(spawn_alone: Spawner) -> None:
    target = heap(spawn_alone)
    digest = target.ask("sum")["sum"]
    assert target.ask("sparse", 40, 1)["pages"] == 40
    assert target.ask("set", 40, 1)["pages"] == 40
    assert target.ask("fresh", 64, 0)["pages"] == 64
    assert target.ask("fresh", 64, 16)["pages"] == 64
    assert target.ask("sum")["sum"] == digest
    assert target.ask("change", 20, 1)["pages"] == 20
    changed = target.ask("sum")["sum"]
    assert changed != digest
    target.ask("load", 2, 1000)
    done = wait_until(lambda: target.ask("stalls")["operations"], "an operation of the load")
    assert done > 0
    target.ask("load", 0, 0)
    assert target.ask("sum")["sum"] != changed
    target.quit()
