"""Seconds of torture: programs that verify their own memory run as they do alone while random parts of it go out.

The long set is `make torture`.
"""

import sys
from pathlib import Path

import pytest

from tests.harness import TARGETS, build
from tests.peers import require
from tests.torture.conftest import Torture
from tests.torture.redis_set import redis_under_torture

SECONDS = 3
LONGER = 6
"""For those that need time until much of them is out."""


@pytest.fixture
def stress_ng() -> Path:
    """Return the program."""
    return require("stress-ng")


def test_every_method_of_vm_finds_its_patterns(torture: Torture, stress_ng: Path) -> None:
    report = torture(stress_ng, "--vm", 4, "--vm-bytes", "256m", "--vm-method", "all", "--verify", "-t", SECONDS)
    assert report.moved_pages > 10_000
    assert report.fills_by_source["store"] + report.fills_by_source["aside"] > 1_000


def test_address_spaces_that_are_changed_all_the_time_stay_right(torture: Torture, stress_ng: Path) -> None:
    kinds = ["mremap", "madvise", "brk", "mprotect", "malloc", "mlock", "io-uring", "vm-splice"]
    stressors = [word for kind in kinds for word in (f"--{kind}", "1")]
    report = torture(
        stress_ng, *stressors, "--mremap-bytes", "16m", "--malloc-touch", "--verify", "--oomable", "-t", LONGER
    )
    assert report.moved_pages > 1_000
    assert all(report.events[kind] for kind in ("fork", "remove", "unmap")), report.events


def test_threads_that_verify_each_byte_find_nothing_wrong(torture: Torture, tmp_path: Path) -> None:
    report = torture(
        build("churn"), "--seconds", LONGER, "--mib", 96, "--threads", 4, "--guards", "--direct", tmp_path / "file",
        "--pace", 2000, "--window", 10, "--thp", 30,
    )  # fmt: skip
    assert report.moved_pages > 20_000
    assert report.out_share_median is not None
    assert report.out_share_median > 0.3


def test_python_with_fork_pools_threads_subprocesses_mappings_and_numpy_is_right(torture: Torture) -> None:
    pytest.importorskip("numpy")
    report = torture(sys.executable, TARGETS / "pooled.py", "--seconds", SECONDS, "--mib", 48)
    assert report.moved_pages > 10_000
    assert report.sessions > 3


def test_redis_saves_what_it_was_told(torture: Torture, tmp_path: Path) -> None:
    report = redis_under_torture(torture, tmp_path, seconds=SECONDS, keys=15_000)
    assert report.moved_pages > 5_000
    assert report.events["fork"] >= 1


def test_attached_programs_that_verify_each_byte_find_nothing_wrong(torture: Torture) -> None:
    report = torture(
        build("churn"), "--seconds", 3, "--mib", 64, "--threads", 3, "--pace", 2000, "--guards", attach=True
    )
    assert report.moved_pages > 1_000
