"""Headroom: the least of all limits that a process is under, and what was promised to others is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapd.engine import Headroom

NEW, OLD = Path("sys/fs/cgroup"), Path("sys/fs/cgroup/memory")
NAMES = {NEW: ("memory.max", "memory.current"), OLD: ("memory.limit_in_bytes", "memory.usage_in_bytes")}


def group(top: Path, place: str, used: int, limit: int | str, kind: Path = NEW) -> None:
    """Make the files of a control group."""
    directory = top / kind / place
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in zip(NAMES[kind], (limit, used), strict=True):
        (directory / name).write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        (("max", "max", "max"), None),
        ((500, "max", "max"), 400),
        (("max", 300, "max"), 200),
        (("max", "max", 150), 50),
        ((900, 800, 700), 600),
        ((900, 50, "max"), 0),
    ],
)
def test_nested_groups_leave_what_the_tightest_of_them_leaves(
    tmp_path: Path, limits: tuple[int | str, ...], left: int | None
) -> None:
    for place, limit in zip(("a", "a/b", "a/b/c"), limits, strict=True):
        group(tmp_path, place, 100, limit)
    assert Headroom.of(str(tmp_path), "0::/a/b/c\n") == left


def test_a_soft_limit_is_one_too(tmp_path: Path) -> None:
    group(tmp_path, "a", 100, 1000)
    (tmp_path / NEW / "a" / "memory.high").write_text("130\n")
    assert Headroom.of(str(tmp_path), "0::/a\n") == 30


def test_the_root_of_a_container_has_limits(tmp_path: Path) -> None:
    group(tmp_path, "", 100, 160)
    assert Headroom.of(str(tmp_path), "0::/\n") == 60
    group(tmp_path, "a", 10, "max")
    assert Headroom.of(str(tmp_path), "0::/a\n") == 60


def test_a_root_without_limits_leaves_all(tmp_path: Path) -> None:
    assert Headroom.of(str(tmp_path), "0::/\n") is None


@pytest.mark.parametrize("groups", ["0::/a/b\n", "0::/../sibling\n"])
def test_a_group_that_cannot_be_seen_leaves_nothing(tmp_path: Path, groups: str) -> None:
    (tmp_path / NEW).mkdir(parents=True)
    assert Headroom.of(str(tmp_path), groups) == 0


def test_both_versions_of_groups_count(tmp_path: Path) -> None:
    group(tmp_path, "a", 100, 1000)
    group(tmp_path, "b", 100, 250, OLD)
    assert Headroom.of(str(tmp_path), "7:memory:/b\n0::/a\n") == 150
    assert Headroom.of(str(tmp_path), "0::/a\n") == 900
    assert Headroom.of(str(tmp_path), "7:cpu:/b\n") is None


def test_what_was_promised_to_one_is_not_there_for_the_next() -> None:
    size = _available() * 3 // 10
    assert Headroom.take(os.getpid(), size)
    assert not Headroom.take(os.getpid(), size)
    Headroom.give(size)
    assert Headroom.take(os.getpid(), size)
    Headroom.give(size)


def _available() -> int:
    """Return what this process may take, about: what the machine has, or less in a control group."""
    text = Path("/proc/meminfo").read_text()
    (line,) = (one for one in text.splitlines() if one.startswith("MemAvailable:"))
    left = Headroom.of("", Path("/proc/self/cgroup").read_text())
    return min(int(line.split()[1]) << 10, (1 << 62) if left is None else left)
