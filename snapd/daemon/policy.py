"""What of a target is moved: pure decisions from what /proc and a survey of its threads say.

Owns the list of what must stay and why, and how large a piece is. Does no I/O and knows no engine.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from snapd.pages import PAGE, Range, align_down, align_up, merge, subtract_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from snapd.daemon.procfs import Mapping

MIN_MEMORY_BYTES: Final = 64 * 1024
"""A mapping with less is not worth a stop of its own."""

MAX_PIECE_BYTES: Final = 32 << 20
MAX_PIECE_PAGES: Final = 8192
MIN_PIECE_PAGES: Final = 256
MIN_SPAN_PAGES: Final = 32
FIRST_PIECE_PAGES: Final = 1024
GAP_BYTES: Final = 64 * PAGE
"""A hole this wide ends a piece: what was never touched needs no entries."""

STOP_AIM_NS: Final = 1_000_000
TALK_NS: Final = 250_000
STACK_BELOW_BYTES: Final = 64 * 1024
STACK_ABOVE_BYTES: Final = 1 << 20
STACK_MAX_BYTES: Final = 64 << 20

# VmFlags, as Documentation/filesystems/proc.rst names them.
_FLAG_REASONS: Final = {
    "lo": "locked",
    "lf": "locked",
    "sl": "sealed",
    "ht": "huge_tlb",
    "io": "device",
    "pf": "device",
    "dc": "not_forked",
    "wf": "wiped_on_fork",
    "gd": "stack",
    "ss": "shadow_stack",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a dump goes through, in order of addresses, and what it leaves alone: bytes by reason."""

    intervals: tuple[Range, ...]
    total_bytes: int
    skipped: dict[str, int] = field(default_factory=dict)


def reason_to_stay(mapping: Mapping) -> str | None:
    """Return why a mapping is left alone as a whole, or None when it may move."""
    permissions = mapping.permissions
    flagged = next((reason for flag, reason in _FLAG_REASONS.items() if flag in mapping.flags), None)
    reasons = (
        (permissions[3] == "s", "shared"),
        (flagged is not None, flagged),
        (mapping.name == "[stack]", "stack"),
        (bool(mapping.inode) or not _is_anonymous(mapping.name), "file"),
        (permissions[0] != "r", "no_access"),
        (permissions[1] != "w", "read_only"),
        (mapping.memory_bytes < MIN_MEMORY_BYTES, "small"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def _is_anonymous(name: str) -> bool:
    return not name or name.startswith(("[heap]", "[anon:"))


def thread_ranges(threads: Iterable[tuple[int, int]], pages: Iterable[int] = ()) -> list[Range]:
    """Return what of each thread's (stack pointer, TLS address) must stay, and `pages`, which the stop has found.

    At a thread's exit the kernel writes its tid word and walks its robust list in the TLS block, when the thread can
    no longer fault; a stack is in use all the time.
    """
    ranges = [Range(page, page + PAGE) for page in pages]
    for stack, tls in threads:
        low = align_down(max(stack - STACK_BELOW_BYTES, 0))
        if 0 < tls - stack < STACK_MAX_BYTES:
            ranges.append(Range(low, align_down(tls) + 2 * PAGE))
        else:
            ranges.append(Range(low, align_up(stack + STACK_ABOVE_BYTES)))
        ranges.append(Range(max(align_down(tls) - PAGE, 0), align_down(tls) + 2 * PAGE))
    return ranges


def plan(
    mappings: Sequence[Mapping], threads: Iterable[tuple[int, int]], own: Iterable[Range], must_stay: Iterable[int] = ()
) -> Plan:
    """Decide what to move; `own` are the agent's ranges, `must_stay` pages that are left where they are.

    A carved interval counts as skipped by its size, which may be more than it holds.
    """
    stay = thread_ranges(threads, must_stay)
    own = list(own)
    skipped: Counter[str] = Counter()
    intervals: list[Range] = []
    total = seen = 0
    for mapping in mappings:
        # /proc may list a mapping again, larger, when it grows while it is read.
        whole = Range(max(mapping.start, seen), max(mapping.end, seen))
        seen = whole.end
        if any(whole.start >= one.start and whole.end <= one.end for one in own):
            skipped["agent"] += mapping.memory_bytes
            continue
        if reason := reason_to_stay(mapping):
            skipped[reason] += mapping.memory_bytes
            continue
        left = subtract_all([whole], merge([*stay, *own]))
        kept = sum(one.length_bytes for one in left)
        skipped["stack"] += min(whole.length_bytes - kept, mapping.memory_bytes)
        intervals += [one for one in left if one.length_bytes >= MIN_MEMORY_BYTES]
        total += min(kept, mapping.memory_bytes)
    return Plan(tuple(intervals), total, {reason: size for reason, size in skipped.items() if size})


SCATTER_PAGES: Final = 1024
RUN_WEIGHT_PAGES: Final = 8
"""What one more run of pages costs in a stop, in pages of the same time: a page that stands alone is moved alone."""

SPAN_WEIGHT_PAGES: Final = 96
"""What one more interval costs in a stop, in pages of the same time."""


def scatter(intervals: Iterable[Range], share_percent: int, seed: int) -> list[Range]:
    """Return a random part of the intervals: runs of 1 to SCATTER_PAGES pages, each taken or left."""
    rng = random.Random(seed)  # noqa: S311 - it decides for tests, and must repeat
    taken: list[Range] = []
    for interval in intervals:
        at = interval.start
        while at < interval.end:
            end = min(interval.end, at + rng.randint(1, SCATTER_PAGES) * PAGE)
            if rng.randrange(100) < share_percent:
                taken.append(Range(at, end))
            at = end
    return merge(taken)


class PieceSize:
    """How many pages a piece has, intervals weighed in: as many as keep a stop near its aim."""

    def __init__(self) -> None:
        """Start small: the first stop must not be a long one."""
        self.pages = FIRST_PIECE_PAGES
        self._ns_a_page = 0.0

    def learn(self, stop_ns: int, until_stopped_ns: int, pages: int) -> None:
        """Take one stop into account: what it takes until the threads stand, and to talk to the mover, is the same for
        a small piece.
        """
        spent = max(stop_ns - until_stopped_ns - TALK_NS, TALK_NS // 8) / max(pages, 1)
        self._ns_a_page = 0.7 * self._ns_a_page + 0.3 * spent if self._ns_a_page else spent
        room = max(STOP_AIM_NS - until_stopped_ns - TALK_NS, STOP_AIM_NS // 4)
        fitting = int(room / self._ns_a_page)
        self.pages = max(MIN_PIECE_PAGES, min(MAX_PIECE_PAGES, self.pages * 2, fitting))

    def halve(self) -> bool:
        """Make pieces smaller after the target had no room; False when they are as small as can be."""
        if self.pages <= MIN_PIECE_PAGES:
            return False
        self.pages = max(MIN_PIECE_PAGES, self.pages // 2)
        return True


def wide_hole(mappings: Sequence[Mapping], need_bytes: int) -> int:
    """Return the middle of the widest hole between mappings, or 0 (the kernel chooses) when none is wide enough.

    Asides go there, far from where the program's own mappings grow.
    """
    best_start = best = 0
    for before, after in itertools.pairwise(mappings):
        if after.start - before.end > best and after.end < 1 << 47:
            best_start, best = before.end, after.start - before.end
    if best < 4 * need_bytes:
        return 0
    return align_down(best_start + best // 2, 2 << 20)
