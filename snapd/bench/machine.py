"""The machine that a figure was measured on, and who else used it meanwhile: what a reader needs to judge a figure.

All of it is from /proc and /sys. Knows nothing of what is measured.
"""

from __future__ import annotations

import os
import platform
import resource
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from snapd import __version__


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine at one moment; `file_system` is that of the stores."""

    date: str
    processor: str
    cpus: int
    virtual: bool
    memory_bytes: int
    kernel: str
    huge_pages: str
    file_system: str
    python: str
    snapd: str
    codec: str


def describe(store_directory: Path, codec: str) -> Machine:
    """Look at this machine; `codec` is what the engine calls its libzstd."""
    info = Path("/proc/cpuinfo").read_text()
    fields = {key.strip(): value for key, _, value in (line.partition(": ") for line in info.splitlines())}
    return Machine(
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        processor=fields.get("model name", platform.machine()).strip(),
        cpus=cpus(),
        virtual="hypervisor" in fields.get("flags", "").split(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        kernel=platform.release(),
        huge_pages=_huge_pages(),
        file_system=_file_system(store_directory),
        python=platform.python_version(),
        snapd=__version__,
        codec=codec,
    )


def cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def _huge_pages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "none"
    return text.partition("[")[2].partition("]")[0]


def _file_system(directory: Path) -> str:
    """Return the type of the file system that holds `directory`: the mount with the longest path above it."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    above = [(point, kind) for point, kind in mounts if directory.resolve().is_relative_to(point)]
    return max(above, key=lambda mount: len(mount[0]))[1] if above else "unknown"


class Neighbours:
    """What of the CPUs went to others since the start: programs and kernel threads here, and the host."""

    def __init__(self) -> None:
        """Begin now."""
        self._began = time.monotonic(), *_cpu_times_s(), _own_cpu_s()

    def share(self) -> tuple[float, float]:
        """Return the share of others here and of the host; our children count as ours once they have ended."""
        began_s, busy_before_s, stolen_before_s, own_before_s = self._began
        busy_s, stolen_s = _cpu_times_s()
        capacity_s = (time.monotonic() - began_s) * (os.cpu_count() or 1)
        others_s = (busy_s - busy_before_s) - (_own_cpu_s() - own_before_s)
        return max(0.0, others_s / capacity_s), (stolen_s - stolen_before_s) / capacity_s


def _cpu_times_s() -> tuple[float, float]:
    """Return the seconds that all CPUs were busy here, and those that the host had them for others."""
    with Path("/proc/stat").open() as stat:
        user, nice, system, _, _, irq, softirq, steal = (int(word) for word in stat.readline().split()[1:9])
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / ticks, steal / ticks


def _own_cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
