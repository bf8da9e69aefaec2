"""A busy target: how late its operations are during a dump, and for as long without one.

Four threads verify and rewrite random pages, together 2,000 in a second, each at its time whatever came before.
"""

import time

from tests.bench.samples import Samples
from tests.bench.subject import Subject
from tests.harness import Reply

THREADS = 4
RATE = 2000
SETTLE_S = 0.2


def run(subject: Subject, figures: Samples, limits: Samples) -> None:
    """Measure one dump under load, and the same load with everything back."""
    _start(subject)
    report = subject.dump()
    _add(figures, "stall", subject.ask("stalls"))
    figures.add(
        load_stops_share=report.sum_stop_us / 1e6 / report.duration_s, load_longest_stop_us=report.longest_stop_us
    )
    subject.ask("load", 0, 0)
    subject.restore()

    _start(subject)
    time.sleep(report.duration_s)
    _add(limits, "quiet", subject.ask("stalls"))
    subject.ask("load", 0, 0)


def _start(subject: Subject) -> None:
    subject.ask("load", THREADS, RATE)
    time.sleep(SETTLE_S)
    subject.ask("stalls")


def _add(samples: Samples, name: str, reply: Reply) -> None:
    samples.add(**{f"{name}_operations": reply["operations"]})
    if reply["operations"]:  # a small heap is out before the first one is due
        samples.add(**{f"{name}_p999_ms": reply["p999_ns"] / 1e6, f"{name}_max_ms": reply["max_ns"] / 1e6})
