"""The parts of the bench that need processes of their own: huge pages, many idle processes, heaps of several sizes.

Owns how these are started and looked at. Each ends with what it started.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Final

from snapd.bench import memory
from snapd.bench.parts import MB
from snapd.bench.private import Load
from snapd.bench.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapd.bench.private import PrivateDaemon
    from snapd.bench.result import Plan
    from snapd.bench.samples import Samples

HUGE_WAIT_S: Final = 10.0
HUGE_SHARE: Final = 0.9
POLL_S: Final = 0.25
IDLE_MIB: Final = 1
IDLE_S: Final = 5.0
SIZES: Final = (0.5, 2.0, 8.0)
"""Times --size."""


def huge(daemon: PrivateDaemon, plan: Plan, figures: Samples) -> None:
    """Dump and restore a heap of huge pages, and see how many are huge again."""
    with Load(daemon, "--mib", plan.mib, "--huge") as load:
        subject = Subject.of(daemon, load, plan.level)
        for _ in range(plan.rounds):
            before = subject.look().huge_bytes
            if before < HUGE_SHARE * subject.size_bytes:
                return  # this kernel makes none, or has none left: no figure
            report = subject.dump()
            restored = subject.restore()
            figures.add(
                huge_restore_mb_s=restored.restored_bytes / MB / restored.duration_s,
                huge_longest_stop_us=report.longest_stop_us,
                huge_share_at_once=subject.look().huge_bytes / before,
            )
            began = time.monotonic()
            while (share := subject.look().huge_bytes / before) < HUGE_SHARE and time.monotonic() - began < HUGE_WAIT_S:
                time.sleep(POLL_S)
            figures.add(huge_share=share)
            subject.ask("sum")


def idle(daemon: PrivateDaemon, plan: Plan, figures: Samples, say: Callable[[str], None]) -> None:
    """Let many processes be managed and do nothing, and see what the daemon does meanwhile."""
    before_bytes = memory.resident_bytes(daemon.pid)
    with contextlib.ExitStack() as stack:
        for number in range(plan.targets):
            stack.enter_context(Load(daemon, "--mib", IDLE_MIB))
            if number % 50 == 49:
                say(f"{number + 1} of {plan.targets} processes")
        time.sleep(1)  # what their coming made to do is done
        began, cpu_s = time.monotonic(), memory.cpu_s(daemon.pid)
        time.sleep(IDLE_S)
        figures.add(
            idle_cpu_share=(memory.cpu_s(daemon.pid) - cpu_s) / (time.monotonic() - began),
            idle_mib=memory.resident_bytes(daemon.pid) / 2**20,
            idle_each_kib=(memory.resident_bytes(daemon.pid) - before_bytes) / 2**10 / plan.targets,
        )


def sizes(daemon: PrivateDaemon, plan: Plan, figures: Samples, say: Callable[[str], None]) -> None:
    """Dump and restore heaps of several sizes, turn by turn."""
    with contextlib.ExitStack() as stack:
        subjects = {}
        for times in SIZES:
            own = max(1, int(plan.mib * times))
            say(f"a heap of {own} MiB")
            subjects[own] = Subject.of(daemon, stack.enter_context(Load(daemon, "--mib", own)), plan.level)
        for number in range(plan.rounds + 1):
            for own, subject in subjects.items():
                say(f"{own} MiB, " + (f"round {number} of {plan.rounds}" if number else "to warm the memory"))
                report, restored = subject.dump(), subject.restore()
                if number:
                    figures.add(
                        **{
                            f"size_dump_{own}_mb_s": report.moved_bytes / MB / report.duration_s,
                            f"size_restore_{own}_mb_s": restored.restored_bytes / MB / restored.duration_s,
                        }
                    )
        for what in ("dump", "restore"):
            medians = [figures.median(f"size_{what}_{own}_mb_s") for own in subjects]
            figures.add(**{f"size_{what}_spread": 1 - min(medians) / max(medians)})
