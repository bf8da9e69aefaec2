"""One cycle of measurements: the heap goes out and comes back by touch, at random and in order, and in bulk.

Owns the order of steps. Each dump is a whole one, because everything was restored before it.
"""

from tests.bench.samples import Samples
from tests.bench.subject import Subject
from tests.harness import Reply

MB = 1e6
SPARSE_SHARE = 0.02
"""So few pages that neighbours are no help."""

FRESH_PAGES = 4096
HOLE_PAGES = 16


def run(subject: Subject, figures: Samples, limits: Samples, seed: int) -> None:
    """Measure everything once; at the end all is back."""
    for name, hole in (("run", 0), ("hole", HOLE_PAGES)):
        limits.add(**{f"fresh_{name}_native_ns": _a_page_ns(subject.ask("fresh", FRESH_PAGES, hole))})

    _dump(subject, figures)
    _touch(figures, "sparse", subject.ask("sparse", max(1, int(subject.npages * SPARSE_SHARE)), seed))
    for name, hole in (("run", 0), ("hole", HOLE_PAGES)):
        figures.add(**{f"fresh_{name}_ns": _a_page_ns(subject.ask("fresh", FRESH_PAGES, hole))})
    restored = subject.restore()
    figures.add(restore_mb_s=restored.restored_bytes / MB / restored.duration_s)

    _dump(subject, figures)
    _touch(figures, "random", subject.ask("random", seed))
    subject.restore()

    _dump(subject, figures)
    _touch(figures, "sequential", subject.ask("sequential"))
    subject.restore()


def _dump(subject: Subject, figures: Samples) -> None:
    report = subject.dump()
    packed_bytes = report.moved_bytes - report.clean_bytes - report.zero_bytes
    figures.add(
        dump_mb_s=report.moved_bytes / MB / report.duration_s,
        ratio=packed_bytes / report.stored_bytes,
        longest_stop_us=report.longest_stop_us,
        stops=report.stops,
        stops_share=report.sum_stop_us / 1e6 / report.duration_s,
    )


def _touch(figures: Samples, name: str, reply: Reply) -> None:
    figures.add(**{f"{name}_all_s": reply["total_ns"] / 1e9})
    for key in ("p50", "p90", "p99", "max"):
        figures.add(**{f"{name}_{key}_us": reply[f"{key}_ns"] / 1e3})


def _a_page_ns(reply: Reply) -> float:
    return float(reply["total_ns"] / reply["pages"])
