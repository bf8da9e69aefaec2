"""What is moved: whatever must stay is never in a plan, and a piece is never larger than a stop allows."""

import itertools
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from snapd.daemon import policy
from snapd.daemon.policy import MAX_PIECE_PAGES, MIN_MEMORY_BYTES, MIN_PIECE_PAGES, PieceSize, Plan
from snapd.daemon.procfs import Mapping
from snapd.pages import HUGE, PAGE, Range, merge, subtract_all, total_bytes

BASE = 0x7F00_0000_0000
MIB = 1 << 20
TCB_BYTES = 2304
"""What glibc 2.36 keeps at and above the TLS register: the tid word, the robust list's head and the rseq area too."""

FORBIDDEN_FLAGS = ["lo", "lf", "sl", "ht", "io", "pf", "dc", "wf", "gd", "ss"]
HARMLESS_FLAGS = ["rd", "wr", "mr", "mw", "me", "ac", "nr", "sd", "hg", "nh", "um", "uw", "mg"]
KERNEL_NAMES = ["[stack]", "[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]", "[anon_shmem:x]"]
FILE_NAMES = ["/usr/lib/libc.so.6", "/dev/zero (deleted)", "/memfd:jit (deleted)", "/SYSV00000000 (deleted)", "/[heap]"]


def mapping(
    start: int = BASE,
    length: int = MIB,
    *,
    permissions: str = "rw-p",
    inode: int = 0,
    name: str = "",
    resident: int | None = None,
    swapped: int = 0,
    flags: frozenset[str] = frozenset(),
) -> Mapping:
    """Return a mapping that would be moved, but for what is said."""
    held = length if resident is None else resident
    return Mapping(start, start + length, permissions, inode, name, held, swapped, flags)


class Process(NamedTuple):
    """What a plan is made from."""

    mappings: list[Mapping]
    threads: list[tuple[int, int]]
    own: list[Range]

    def plan(self) -> Plan:
        """Make it."""
        return policy.plan(self.mappings, self.threads, self.own)

    def movable(self) -> list[Mapping]:
        """Return the mappings that nothing forbids to move, but for what has to be carved out of them."""
        return [one for one in self.mappings if may_move(one) and not any(mine.covers(span(one)) for mine in self.own)]


def span(one: Mapping) -> Range:
    return Range(one.start, one.end)


def may_move(one: Mapping) -> bool:
    """The rules of the design, said once more: private, anonymous, readable, writable, and nothing that forbids it."""
    anonymous = one.inode == 0 and (one.name in ("", "[heap]") or one.name.startswith("[anon:"))
    private = one.permissions.startswith("rw") and one.permissions.endswith("p")
    return anonymous and private and not one.flags & set(FORBIDDEN_FLAGS) and one.memory_bytes >= MIN_MEMORY_BYTES


oddities = st.fixed_dictionaries(
    {},
    optional={
        "permissions": st.sampled_from(["rw-p", "r--p", "---p", "rwxp", "-w-p", "rw-s", "r-xp"]),
        "inode": st.sampled_from([0, 4711]),
        "name": st.sampled_from(["", "[heap]", "[anon:malloc]", *KERNEL_NAMES, *FILE_NAMES]),
        "flags": st.frozensets(st.sampled_from([*HARMLESS_FLAGS, *FORBIDDEN_FLAGS]), max_size=3),
    },
)


@st.composite
def address_spaces(draw: st.DrawFn) -> list[Mapping]:
    """Mappings in order, some next to each other: plain memory, and every other kind that /proc shows."""
    at, found = BASE, []
    for _ in range(draw(st.integers(0, 8))):
        at += draw(st.sampled_from([0, 0, 1, 17, 300])) * PAGE
        npages = draw(st.integers(1, 700))
        resident = draw(st.one_of(st.just(npages), st.integers(0, npages)))
        swapped = draw(st.integers(0, npages - resident))
        odd: dict[str, Any] = draw(st.one_of(st.just({}), oddities))
        found.append(mapping(at, npages * PAGE, resident=resident * PAGE, swapped=swapped * PAGE, **odd))
        at = found[-1].end
    return found


@st.composite
def processes(draw: st.DrawFn) -> Process:
    """An address space with threads whose stacks and TLS are anywhere in it, and the agent's ranges."""
    mappings = draw(address_spaces())
    inside = [st.integers(one.start - PAGE, one.end) for one in mappings]
    addresses = st.one_of(st.integers(BASE, BASE + MIB), *inside)
    below_tls = st.tuples(addresses, st.integers(1, 8 * MIB)).map(lambda pair: (pair[0], pair[0] + pair[1]))
    threads = st.one_of(st.tuples(addresses, addresses), below_tls, st.just((0, 0)), st.just((1 << 63, 0)))
    own = st.tuples(addresses, st.integers(1, 64)).map(lambda pair: Range.around(pair[0], pair[1] * PAGE))
    whole = [st.just(span(one)) for one in mappings]
    return Process(
        mappings, draw(st.lists(threads, max_size=3)), draw(st.lists(st.one_of(own, *whole), max_size=3, unique=True))
    )


def vital(stack: int, tls: int) -> list[Range]:
    """What of a thread must never be missing: the top of its stack, and the block that the kernel writes at its end."""
    found = [Range.around(max(stack - 128, 0), 256), Range.around(tls, TCB_BYTES)]
    if stack < tls < stack + 8 * MIB:
        found.append(Range.around(stack, tls - stack))
    return found


@given(processes())
def test_nothing_that_must_stay_is_in_a_plan(process: Process) -> None:
    intervals = process.plan().intervals
    movable = [span(one) for one in process.movable()]
    for interval in intervals:
        assert sum(one.covers(interval) for one in movable) == 1, "inside one mapping that may move"
    stay = [span(one) for one in process.mappings if not may_move(one)]
    stay += [part for thread in process.threads for part in vital(*thread)]
    for must in [*stay, *process.own]:
        assert not any(interval.overlaps(must) for interval in intervals)


@given(processes())
def test_intervals_are_in_order_and_worth_a_stop(process: Process) -> None:
    intervals = process.plan().intervals
    assert all(before.end <= after.start for before, after in itertools.pairwise(intervals))
    assert all(interval.length_bytes >= MIN_MEMORY_BYTES for interval in intervals)


@given(processes())
def test_what_may_move_and_is_in_nobodys_way_is_in_the_plan(process: Process) -> None:
    carved = merge([*policy.thread_ranges(process.threads), *process.own])
    intervals = process.plan().intervals
    for one in process.movable():
        if not any(span(one).overlaps(hole) for hole in carved):
            assert span(one) in intervals


@given(processes())
def test_every_byte_is_either_to_be_moved_or_skipped_for_a_reason(process: Process) -> None:
    plan = process.plan()
    held = sum(one.memory_bytes for one in process.mappings)
    assert plan.total_bytes + sum(plan.skipped.values()) >= held
    assert 0 <= plan.total_bytes <= sum(one.memory_bytes for one in process.movable())
    assert all(size > 0 for size in plan.skipped.values())
    assert plan.total_bytes <= held


@pytest.mark.parametrize("flag", FORBIDDEN_FLAGS)
def test_a_flag_of_the_kernel_that_forbids_it_keeps_a_mapping(flag: str) -> None:
    one = mapping(flags=frozenset({"rd", "wr", flag}))
    assert policy.reason_to_stay(one) is not None
    plan = policy.plan([one], [], [])
    assert plan.intervals == ()
    assert sum(plan.skipped.values()) == MIB


@pytest.mark.parametrize("flag", HARMLESS_FLAGS)
def test_other_flags_do_not(flag: str) -> None:
    assert policy.reason_to_stay(mapping(flags=frozenset({flag}))) is None


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (mapping(permissions="rw-s"), "shared"),
        (mapping(permissions="rw-s", inode=1, name="/memfd:x"), "shared"),
        (mapping(flags=frozenset({"lo"})), "locked"),
        (mapping(flags=frozenset({"sl"})), "sealed"),
        (mapping(flags=frozenset({"ht"})), "huge_tlb"),
        (mapping(flags=frozenset({"io"})), "device"),
        (mapping(flags=frozenset({"dc"})), "not_forked"),
        (mapping(flags=frozenset({"wf"})), "wiped_on_fork"),
        (mapping(flags=frozenset({"gd"})), "stack"),
        (mapping(flags=frozenset({"ss"})), "shadow_stack"),
        (mapping(name="[stack]"), "stack"),
        (mapping(inode=12), "file"),
        *((mapping(name=name), "file") for name in [*KERNEL_NAMES[1:], *FILE_NAMES]),
        (mapping(permissions="---p"), "no_access"),
        (mapping(permissions="-w-p"), "no_access"),
        (mapping(permissions="r--p"), "read_only"),
        (mapping(resident=MIN_MEMORY_BYTES - PAGE), "small"),
        (mapping(resident=0), "small"),
        (mapping(), None),
        (mapping(permissions="rwxp"), None),
        (mapping(name="[heap]"), None),
        (mapping(name="[anon:glibc: malloc]"), None),
        (mapping(resident=0, swapped=MIN_MEMORY_BYTES), None),
    ],
)
def test_reasons(one: Mapping, reason: str | None) -> None:
    assert policy.reason_to_stay(one) == reason


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1))
@example(0, 0)
@example((1 << 64) - 1, (1 << 64) - 1)
def test_registers_may_hold_anything(stack: int, tls: int) -> None:
    """A program sets both as it likes: no value makes a plan fail, or leaves out what it points to."""
    carved = merge(policy.thread_ranges([(stack, tls)]))
    for part in vital(stack, tls):
        assert subtract_all([part], carved) == []


def test_a_tls_block_that_merged_with_the_heap_is_carved_out() -> None:
    """The kernel maps a thread's TLS next to a large heap, as one mapping: only its pages stay."""
    tls = BASE + 600 * PAGE + 1024
    plan = policy.plan([mapping(length=1000 * PAGE)], [(1 << 46, tls)], [])
    assert plan.intervals == (Range(BASE, BASE + 599 * PAGE), Range(BASE + 602 * PAGE, BASE + 1000 * PAGE))
    assert plan.skipped == {"stack": 3 * PAGE}


def test_a_thread_stack_stays_up_to_its_tls() -> None:
    stack = mapping(length=8 * MIB)
    tls = stack.end - 2 * PAGE
    plan = policy.plan([stack], [(tls - MIB, tls)], [])
    assert plan.intervals == (Range(BASE, stack.end - 2 * PAGE - MIB - policy.STACK_BELOW_BYTES),)


def test_the_agents_ranges_are_reported_as_such() -> None:
    one = mapping()
    assert policy.plan([one], [], [span(one)]) == Plan((), 0, {"agent": MIB})


intervals = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(1, 3000)).map(
        lambda pair: Range(BASE + pair[0] * PAGE, BASE + (pair[0] + pair[1]) * PAGE)
    ),
    max_size=5,
).map(merge)


@given(intervals, st.integers(0, 100), st.integers())
def test_a_random_part_is_a_part_and_can_be_repeated(whole: list[Range], share: int, seed: int) -> None:
    part = policy.scatter(whole, share, seed)
    assert subtract_all(part, whole) == []
    assert part == merge(part)
    assert part == policy.scatter(whole, share, seed)


@given(intervals, st.integers())
def test_shares_of_none_and_all_are_none_and_all(whole: list[Range], seed: int) -> None:
    assert policy.scatter(whole, 0, seed) == []
    assert total_bytes(policy.scatter(whole, 100, seed)) == total_bytes(whole)


stops = st.tuples(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 2 * MAX_PIECE_PAGES))


@given(st.lists(st.one_of(stops, st.none()), max_size=30))
def test_a_piece_stays_within_its_bounds_and_grows_slowly(history: list[tuple[int, int, int] | None]) -> None:
    """Whatever the stops measured; None is a piece that the target had no room for."""
    size = PieceSize()
    for stop in history:
        before = size.pages
        if stop is None:
            assert size.halve() == (before > MIN_PIECE_PAGES)
            assert size.pages == max(MIN_PIECE_PAGES, before // 2)
        else:
            size.learn(*stop)
            assert size.pages <= 2 * before
        assert MIN_PIECE_PAGES <= size.pages <= MAX_PIECE_PAGES


@given(ns_a_page=st.floats(20, 3000), until_stopped_ns=st.integers(10_000, 600_000))
def test_pieces_of_a_steady_target_come_to_fill_the_stop_and_not_more(ns_a_page: float, until_stopped_ns: int) -> None:
    size = PieceSize()
    for _ in range(40):
        stop_ns = until_stopped_ns + policy.TALK_NS + int(size.pages * ns_a_page)
        size.learn(stop_ns, until_stopped_ns, size.pages)
    moving_ns = size.pages * ns_a_page
    room_ns = max(policy.STOP_AIM_NS - until_stopped_ns - policy.TALK_NS, policy.STOP_AIM_NS // 4)
    # What the mover's talk costs at the least is put down to the pages: pieces may come out smaller, never larger.
    assert moving_ns <= room_ns * 1.01 or size.pages == MIN_PIECE_PAGES
    assert moving_ns >= room_ns * 0.7 or size.pages == MAX_PIECE_PAGES


@given(
    st.lists(st.tuples(st.integers(0, 1 << 34), st.integers(1, 1 << 20)), max_size=6), st.integers(2 * HUGE, 1 << 30)
)
def test_a_wide_hole_has_room_behind_it_and_before_it(layout: list[tuple[int, int]], need: int) -> None:
    at, mappings = 0, []
    for gap, npages in layout:
        mappings.append(mapping(at + gap * PAGE, npages * PAGE))
        at = mappings[-1].end
    hole = policy.wide_hole(mappings, need)
    if hole:
        assert hole % HUGE == 0
        room = Range.around(hole - need, 2 * need)
        assert not any(span(one).overlaps(room) for one in mappings)


def test_the_widest_hole_below_the_kernels_half_is_taken() -> None:
    low, high, vsyscall = mapping(0x10000), mapping(BASE), mapping(0xFFFF_FFFF_FF60_0000, PAGE)
    assert low.end < policy.wide_hole([low, high, vsyscall], 1 << 30) < high.start
    assert policy.wide_hole([low, high], 1 << 46) == 0
    assert policy.wide_hole([low], PAGE) == 0
