"""Programs that do everything to their memory in several threads, under dumps without a pause: no wrong byte.

SNAPD_TEST_SECONDS makes each of them longer; the suite's own runs are short.
"""

import os
import time
from pathlib import Path

import pytest

from tests.harness import Daemon, Spawner, rss_bytes
from tests.kernel.driving import MIB, BackToBack, Figures, out_bytes

SECONDS = int(os.environ.get("SNAPD_TEST_SECONDS", "5"))
LIMIT_S = SECONDS + 60
OUT_SHARE = 0.3
OFTEN = "anew=12,dontunmap=16,trim=16,shrink=16,fork=12"
"""What is else so rare that a short run on a slow machine may never do it."""


@pytest.mark.timeout(LIMIT_S + 120)
@pytest.mark.parametrize("seconds", [SECONDS, pytest.param(60, marks=pytest.mark.torture)])
def test_eight_threads_of_churn_find_nothing_wrong(
    daemon: Daemon, spawn: Spawner, figures: Figures, tmp_path: Path, seconds: int
) -> None:
    churn = spawn(
        "churn", "--seconds", seconds, "--mib", 128, "--threads", 8, "--guards", "--direct", tmp_path / "file",
        "--thp", 30, "--pace", 2000, "--window", 10, "--ops", OFTEN, deadline_s=seconds + 60,
    )  # fmt: skip
    shares = []
    with BackToBack(daemon, churn.pid) as dumps:
        end = time.monotonic() + seconds - 1
        while time.monotonic() < end:
            time.sleep(0.1)  # an instant that nothing here chooses
            out = out_bytes(daemon, churn.pid)
            shares.append(out / (out + rss_bytes(churn.pid)))
        result = churn.result(seconds + 60)
    figures.note_stops(dumps.reports)
    figures.note(
        out_share_least=min(shares), out_share_median=sorted(shares)[len(shares) // 2],
        operations=sum(result["ops"].values()), forks=result["forks"], moved_mib=dumps.total("moved_bytes") // MIB,
        refused_whole=result["refused_whole"],
    )  # fmt: skip
    assert result["errors"] == 0
    assert {name for name, count in result["ops"].items() if count == 0} == set()
    assert sorted(shares)[len(shares) // 2] > OUT_SHARE
    assert result["refused_whole"] == 0


@pytest.mark.timeout(LIMIT_S + 120)
@pytest.mark.parametrize("seconds", [SECONDS // 2, pytest.param(30, marks=pytest.mark.torture)])
def test_whole_mappings_stay_whole_for_the_programs_own_mremap(daemon: Daemon, spawn: Spawner, seconds: int) -> None:
    churn = spawn(
        "churn", "--mib", 64, "--threads", 4, "--seconds", seconds, "--strict-mremap", "--pace", 300,
        "--only", "rmw=50,hole=20,grow=10,shrink=10,dontunmap=10,dontneed=5,anew=1", deadline_s=seconds + 60,
    )  # fmt: skip
    with BackToBack(daemon, churn.pid):
        assert churn.result(seconds + 60)["refused"] == 0


@pytest.mark.timeout(LIMIT_S + 120)
@pytest.mark.parametrize("seconds", [SECONDS // 2, pytest.param(60, marks=pytest.mark.torture)])
def test_busy_threads_that_discard_unmap_and_remap_find_nothing_wrong(
    daemon: Daemon, spawn: Spawner, figures: Figures, seconds: int
) -> None:
    churn = spawn(
        "churn", "--seconds", seconds, "--mib", 64, "--threads", 6, "--seed", 7, "--areas", 8,
        "--ops", "dontneed=600,free=200,anew=20,over=200,trim=100,grow=100,shrink=50,hole=100,dontunmap=40,fork=8",
        deadline_s=seconds + 60,
    )  # fmt: skip
    with BackToBack(daemon, churn.pid) as dumps:
        result = churn.result(seconds + 60)
    figures.note(operations=sum(result["ops"].values()), forks=result["forks"], dumps=len(dumps.reports))
    assert result["errors"] == 0


@pytest.mark.timeout(LIMIT_S + 120)
@pytest.mark.parametrize("seconds", [SECONDS // 2, pytest.param(30, marks=pytest.mark.torture)])
def test_python_with_a_fork_pool_threads_and_mappings_works_on(daemon: Daemon, spawn: Spawner, seconds: int) -> None:
    pooled = spawn("pooled", "--seconds", seconds, "--mib", 48, deadline_s=seconds + 60)
    with BackToBack(daemon, pooled.pid, pause_s=0.1) as dumps:
        result = pooled.result(seconds + 60)
    assert result["errors"] == 0
    assert all(result["done"].values())
    assert dumps.total("moved_bytes") > 12 * seconds * MIB
