"""The run: the daemon, the heap and the kernel's swap come and go here, and the parts are gone through in rounds.

Owns the order. Every byte is verified at the end; a wrong one ends the run.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from snapd import engine
from snapd.bench import group, kernel, limits, machine, others, parts
from snapd.bench.parts import Heap
from snapd.bench.private import Load, PrivateDaemon
from snapd.bench.result import Result
from snapd.bench.samples import Samples
from snapd.bench.subject import Subject

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapd.bench.result import Plan

LEVEL: Final = 1
"""zstd's for the raw limit, where the daemon's own choice is measured."""

OF_ONE_HEAP: Final = {
    "dump": parts.dump,
    "touch": parts.touch,
    "set": parts.working_set,
    "fresh": parts.fresh,
    "threads": parts.threads,
    "again": parts.again,
    "load": parts.load,
}
OTHERS: Final = ("huge", "idle", "sizes")
PARTS: Final = (*OF_ONE_HEAP, *OTHERS)
USUAL: Final = (*OF_ONE_HEAP, "huge")
"""Those that are measured where nothing else is asked for."""


def run(plan: Plan, say: Callable[[str], None]) -> Result:
    """Measure. Raises Internal where a byte was wrong or a dump was not what it should be; SwapUnusable."""
    with contextlib.ExitStack() as stack:
        say("starting a private daemon")
        daemon = stack.enter_context(PrivateDaemon(plan.state_dir))
        codec = engine.start(packers=1)
        neighbours = machine.Neighbours()
        here = machine.describe(daemon.state_dir, codec)
        heap = label = digest = None
        figures, raw, swapped = Samples(), Samples(), Samples()
        level = LEVEL if plan.level is None else plan.level
        if any(name in OF_ONE_HEAP for name in plan.parts):
            heap, label, digest = _one_heap(plan, daemon, level, say)
            figures, raw, swapped = heap.figures, heap.limits, heap.kernel
        if "huge" in plan.parts:
            say("huge pages")
            others.huge(daemon, plan, figures)
        if "sizes" in plan.parts:
            others.sizes(daemon, plan, figures, say)
        if "idle" in plan.parts:
            say("idle processes")
            others.idle(daemon, plan, figures, say)
    others_share, stolen_share = neighbours.share()
    return Result(
        plan=plan,
        machine=here,
        level=level,
        others_share=others_share,
        stolen_share=stolen_share,
        figures=figures,
        limits=raw,
        kernel=swapped,
        kernel_label=label,
        digest=digest,
        **({"pictures": heap.pictures} if heap else {}),
    )


def _one_heap(
    plan: Plan, daemon: PrivateDaemon, level: int, say: Callable[[str], None]
) -> tuple[Heap, str | None, str]:
    chosen = {name: part for name, part in OF_ONE_HEAP.items() if name in plan.parts}
    with contextlib.ExitStack() as stack:
        swap = cgroup = None
        if plan.kernel is not None:
            swap = stack.enter_context(kernel.set_up(plan.kernel, plan.mib << 20, daemon.state_dir))
            if plan.kernel == "swapfile":
                cgroup = stack.enter_context(group.make())
        say(f"a heap of {plan.mib} MiB")
        members = cgroup.members if cgroup else None
        load = stack.enter_context(Load(daemon, "--mib", plan.mib, members=members))
        subject = Subject.of(daemon, load, plan.level)
        pages = subject.pages()
        heap = Heap(subject, swap, cgroup)
        if (lz4_bytes := limits.lz4_bytes(pages)) is not None:
            heap.limits.add(lz4_ratio=len(pages) / lz4_bytes)
        say("once to warm the memory")
        parts.dump(Heap(subject, swap, cgroup), seed=0)
        limits.measure_codec(pages, level, Samples())
        for number in range(1, plan.rounds + 1):
            say(f"round {number} of {plan.rounds}: raw limits")
            limits.measure_userfaultfd(plan.mib, heap.limits)
            limits.measure_codec(pages, level, heap.limits)
            for name, part in chosen.items():
                say(f"round {number} of {plan.rounds}: {name}")
                part(heap, number)
        digest = str(subject.ask("sum")["sum"])
        subject.ask("quit")
    return heap, swap.label if swap else None, digest
