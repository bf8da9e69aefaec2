"""The long set, `make torture`: each program passes alone and then under torture, for TORTURE_S seconds together.

What all runs came to is judged at the end: enough pages moved, and enough of them out at a random moment.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from snapd.torture import TortureReport
from tests.harness import TARGETS, build
from tests.peers import require
from tests.torture.conftest import BUDGET_S, Torture
from tests.torture.redis_set import redis_under_torture

pytestmark = [pytest.mark.torture, pytest.mark.timeout(BUDGET_S + 600)]

# What stress-ng is asked for, and how much of the whole time each gets. Sizes are of all instances together.
STRESSORS = {
    "--vm 4 --vm-bytes 512m --vm-method all": 8,
    "--vm 4 --vm-bytes 768m --vm-keep --vm-hang 1 --vm-method incdec": 4,
    "--mremap 2 --mremap-bytes 32m": 4,
    "--madvise 2": 3,
    "--brk 2 --brk-notouch": 2,
    "--brk 2": 2,
    "--mprotect 2": 2,
    "--mmapfork 1": 2,
    "--fork 2": 2,
    "--malloc 4 --malloc-bytes 256m --malloc-touch": 4,
    "--mlock 2": 2,
    "--io-uring 2": 2,
    "--vm-splice 2": 2,
    "--mmap 2 --mmap-bytes 64m": 2,
    "--mmapmany 1": 2,
    "--mmapaddr 1": 1,
    "--vm-addr 1": 2,
    "--vm-segv 1": 1,
    "--vfork 1": 1,
    "--clone 1": 1,
    "--stack 1": 1,
    "--shm 1": 1,
    "--memfd 1": 1,
    "--memthrash 2": 2,
    "--matrix 2 --matrix-size 512": 2,
    "--zlib 2": 1,
    "--userfaultfd 1": 1,
    "--aio 1 --temp-path {tmp}": 1,
    "--hdd 1 --hdd-bytes 64m --hdd-opts direct --temp-path {tmp}": 2,
}
OTHERS = {"churn": 8, "busy": 5, "pooled": 8, "redis": 8}
ALONE_S = 2
WEIGHTS = sum(STRESSORS.values()) + sum(OTHERS.values())

reports: list[TortureReport] = []


def seconds_of(weight: int, runs: int = 1) -> int:
    """Return what a run of that weight gets of the time, less what else it takes."""
    return max(3, round(BUDGET_S * weight / WEIGHTS) - runs * ALONE_S)


@pytest.mark.parametrize("stressor", STRESSORS)
def test_stress_ng_passes_as_it_does_alone(torture: Torture, stressor: str, tmp_path: Path) -> None:
    seconds = seconds_of(STRESSORS[stressor])
    argv = [str(require("stress-ng")), *stressor.format(tmp=tmp_path).split(), "--verify", "--oomable", "-t"]
    alone = subprocess.run([*argv, f"{ALONE_S}s"], capture_output=True, text=True, timeout=ALONE_S + 120, check=False)
    assert alone.returncode == 0, f"it fails without snapd: {alone.stderr}"
    reports.append(torture(*argv, f"{seconds}s", limit_s=5 * seconds + 240))


def churn(torture: Torture, name: str, arguments: str, *more: str | Path) -> None:
    """Run churn for its share of the time."""
    seconds = seconds_of(OTHERS[name])
    limit_s = 3 * seconds + 120
    reports.append(torture(build("churn"), "--seconds", seconds, *arguments.split(), *more, limit_s=limit_s))


def test_churn_finds_nothing_wrong(torture: Torture, tmp_path: Path) -> None:
    arguments = "--mib 256 --threads 8 --guards --pace 1000 --window 10 --thp 30 --direct"
    churn(torture, "churn", arguments, tmp_path / "file")


def test_churn_without_a_pause_finds_nothing_wrong(torture: Torture) -> None:
    weights = "dontneed=600,free=200,anew=20,over=200,trim=100,grow=100,shrink=50,hole=100,dontunmap=40,fork=8"
    churn(torture, "busy", f"--mib 64 --threads 6 --areas 8 --ops {weights}")


def test_python_finds_nothing_wrong(torture: Torture) -> None:
    seconds = seconds_of(OTHERS["pooled"])
    reports.append(
        torture(sys.executable, TARGETS / "pooled.py", "--seconds", seconds, "--mib", 96, limit_s=3 * seconds + 120)
    )


def test_redis_saves_what_it_was_told(torture: Torture, tmp_path: Path) -> None:
    reports.append(redis_under_torture(torture, tmp_path, seconds=seconds_of(OTHERS["redis"]), keys=100_000))


def test_all_together_was_torture() -> None:
    moved = sum(report.moved_pages for report in reports)
    looks = sum(report.looks for report in reports)
    shares = [report for report in reports if report.out_share_median is not None and report.moved_pages > 10_000]
    median = sorted(report.out_share_median or 0 for report in shares)[len(shares) // 2] if shares else 0.0
    print(f"{len(reports)} runs, {moved} pages moved, {looks} looks, median share {median:.2f}")
    assert len(reports) == len(STRESSORS) + len(OTHERS)
    assert sum(report.duration_s for report in reports) > BUDGET_S / 2
    assert moved > 300_000 * min(1.0, BUDGET_S / 600)
