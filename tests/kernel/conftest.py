"""What the tests on the real kernel share: their marks, a place for figures, and state directories that count blocks.

Owns the mounts that must go again whatever happens. Knows no test.
"""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.driving import Figures
from tests.peers import lacking

HERE = Path(__file__).parent
DEVICE = Path("/dev/userfaultfd")
_FIGURES = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this directory."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.kernel)
            item.add_marker(pytest.mark.root)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show the figures that tests noted."""
    if lines := config.stash.get(_FIGURES, []):
        terminalreporter.section("figures", "-")
        for line in lines:
            terminalreporter.write_line(line)


@pytest.fixture(autouse=True)
def _real_kernel() -> None:
    if os.geteuid() != 0:
        lacking("the tests on the real kernel change mounts and users, which takes root")
    if not DEVICE.exists():
        lacking(f"{DEVICE} does not exist: the kernel lacks CONFIG_USERFAULTFD")


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Figures:
    """Return what notes figures for the end of the run's output."""
    lines = request.config.stash.setdefault(_FIGURES, [])
    return Figures(request.node.name, lines.append)


@contextlib.contextmanager
def _mounted(directory: Path, size_mib: int) -> Iterator[Path]:
    directory.mkdir(exist_ok=True)
    options = f"size={size_mib}m,mode=0700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "snapd-test", str(directory)], check=True, timeout=10)
    try:
        yield directory
    finally:
        # Lazily: a daemon that a failed test left behind may still hold a store there.
        subprocess.run(["umount", "--lazy", str(directory)], check=True, timeout=10)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Yield what mounts a file system of so many MiB, whose free blocks are nobody else's, and returns its path."""
    with contextlib.ExitStack() as mounts:
        yield lambda size_mib: mounts.enter_context(_mounted(tmp_path / f"disk-{size_mib}", size_mib))
