"""A page map that comes from somebody else may have anything in it: it is refused by a sentence, or what comes of it is
a range table in order. Nothing that it has ends the daemon or keeps it busy for ever.

No target is here: whether a page of such a map is right is tests/kernel/test_hostile_page_map.py's.
"""

import fcntl
import itertools
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapd import engine
from snapd.daemon import takeover
from snapd.engine import keeper
from snapd.engine.keeper import DamagedPageMapError
from snapd.pages import PAGE
from snapd.store.writer import StoreWriter
from tests.unit import pagemaps
from tests.unit.pagemaps import BASE, ENTRIES_AT, NPAGES, STORE_BYTES, Image
from tests.unit.pagemaps import HEADER_BYTES as PM_HEADER_BYTES

END = 0x7FFFFFFFF000
EVEN = [0, 1, 8, PAGE - 1, PAGE, BASE, BASE + 1, END, END - PAGE, 1 << 31, 1 << 32, 1 << 47, 1 << 63, (1 << 64) - 1]


class Place:
    """A store, for one page map after the other."""

    def __init__(self, directory: Path) -> None:
        engine.start(packers=1)
        keeper.open_registry()
        writer = StoreWriter(directory)
        self.store_id, fd = writer.header.store_id, writer.detach()
        os.ftruncate(fd, STORE_BYTES)
        self.store = engine.Store(fd, self.store_id, STORE_BYTES)

    def adopt(self, page_map: int, uffd: int) -> engine.Session:
        """Adopt as takeover.py does; the descriptors are taken over."""
        info = takeover._of_the_living(keeper.look(page_map))
        return keeper.adopt(info, self.store, STORE_BYTES, uffd=uffd, page_map=page_map)

    def live(self, page_map: int) -> None:
        """Adopt and do what is done to an adopted session; DamagedPageMapError when it is refused."""
        uffd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            session = self.adopt(page_map, uffd)
        except BaseException:
            os.close(uffd)
            os.close(page_map)
            raise
        try:
            keeper.resume(session)
            session.recover()
            in_order(session)
            for piece in engine.former_pieces(session):
                piece.pack(1)
                piece.wait()
                with suppress(OSError):
                    piece.drop(4 << 20, 0)
                piece.close()
            session.counts()
            session.trim()
            in_order(session)
        finally:
            session.close()


def in_order(session: engine.Session) -> None:
    """The range table is sorted, disjoint, and inside of a program's addresses, and so are its entries."""
    regions = session.regions()
    for one in regions:
        assert one.start % PAGE == 0
        assert one.npages > 0
        assert one.start + one.npages * PAGE <= END
    for before, after in itertools.pairwise(regions):
        assert before.start + before.npages * PAGE <= after.start
    spans = sorted((one.first, one.first + one.npages) for one in regions)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Yield one."""
    one = Place(tmp_path_factory.mktemp("stores"))
    yield one
    one.store.release()


def image(place: Place) -> Image:
    return Image(store_id=place.store_id, store_number=1)


def test_a_page_map_that_is_whole_is_believed(place: Place) -> None:
    place.live(image(place).write())


# Refused, and by which reason.


def name_much(one: Image) -> None:
    one.nentries = 1 << 31
    one.records.insert(0, (1 << 40, 1 << 30, 256, 0))


WRONG: dict[str, tuple[Callable[[Image], object], str]] = {
    "more-entries-than-a-map-has": (lambda one: vars(one).update(nentries=1 << 32), "how many entries"),
    "a-record-of-no-pages": (lambda one: one.records.insert(0, (BASE - PAGE, 0, 0, 0)), "a record's place"),
    "a-record-inside-a-page": (lambda one: one.records.insert(0, (BASE - PAGE - 8, 1, 0, 0)), "a record's place"),
    "a-record-over-the-next": (lambda one: one.records.insert(0, (BASE - PAGE, 2, 240, 0)), "a record's place"),
    "a-record-over-the-end": (lambda one: one.records.append((END - PAGE, 2, 240, 0)), "a record's place"),
    "a-record-around-the-end": (lambda one: one.records.append((END - PAGE, 1 << 52, 240, 0)), "a record's place"),
    "an-aside-inside-a-page": (lambda one: one.records.append((END - PAGE, 1, 240, 1)), "where a record's pages"),
    "an-aside-over-the-end": (lambda one: one.records.append((END - PAGE, 1, 240, END)), "where a record's pages"),
    "entries-behind-the-last": (lambda one: one.records.append((END - PAGE, 1, 256, 0)), "a record's entries"),
    "entries-around-the-end": (lambda one: one.records.append((END - PAGE, 1, (1 << 64) - 2, 0)), "a record's entries"),
    "entries-of-another-record": (lambda one: one.records.append((END - PAGE, 1, 5, 0)), "entries of two records"),
    "entries-that-were-never-written": (name_much, "entries that nobody has written"),
    "a-state-that-is-none": (lambda one: one.entries.__setitem__(3, 7), "an entry's state"),
    "a-reserved-bit": (lambda one: one.entries.__setitem__(3, 1 << 62), "an entry's state"),
    "a-frame-of-nothing": (lambda one: one.entries.__setitem__(3, pagemaps.ZERO | 1 << 18), "an entry's frame"),
    "a-frame-behind-the-store": (
        lambda one: one.entries.__setitem__(3, pagemaps.STORED | 2 << 8 | (STORE_BYTES // 8 - 1) << 18),
        "an entry's frame",
    ),
    "a-frame-in-the-header": (lambda one: one.entries.__setitem__(3, pagemaps.STORED | 2 << 8 | 8 << 18), "frame"),
    "a-frame-of-no-length": (lambda one: one.entries.__setitem__(3, pagemaps.STORED | 512 << 18), "an entry's frame"),
    "a-frame-that-is-too-long": (
        lambda one: one.entries.__setitem__(3, pagemaps.STORED | 1023 << 8 | 512 << 18),
        "an entry's frame",
    ),
    "a-phase-that-is-none": (lambda one: one.intents.update({3: (6, 0, 0, 0, 0)}), "what was on its way"),
    "a-span-of-nothing": (lambda one: one.intents.update({3: (1, BASE, 0, 0, 0)}), "what was on its way"),
    "a-span-inside-a-page": (lambda one: one.intents.update({3: (1, BASE + 1, 1, 0, 0)}), "what was on its way"),
    "a-span-without-end": (lambda one: one.intents.update({3: (3, BASE, 1 << 52, 0, 0)}), "what was on its way"),
    "an-aside-of-a-span-over-the-end": (lambda one: one.intents.update({3: (3, BASE, 2, END, 0)}), "on its way"),
    "spans-of-too-many-pages": (
        lambda one: one.intents.update(dict.fromkeys(range(1, 5), (3, BASE, 1 << 17, 0, 0))),
        "how much was on its way",
    ),
    "a-staging-without-end": (lambda one: one.stagings.__setitem__(2, (BASE, 1 << 46)), "a piece's staging"),
    "a-staging-over-the-end": (lambda one: one.stagings.__setitem__(2, (END, PAGE)), "a piece's staging"),
    "a-sentinel-inside-a-page": (lambda one: vars(one).update(sentinel=12), "what is ours in its program"),
    "an-event-that-is-none": (lambda one: one.events.append((0x33, 0, 0, 0, 0)), "an event that was read"),
    "a-discard-that-ends-before-it-begins": (
        lambda one: one.events.append((pagemaps.REMOVE, 0, BASE, BASE - PAGE, 0)),
        "an event that was read",
    ),
    "an-unmap-inside-a-page": (
        lambda one: one.events.append((pagemaps.UNMAP, 0, BASE, BASE + 8, 0)),
        "an event that was read",
    ),
    "a-move-of-nothing": (lambda one: one.events.append((pagemaps.REMAP, 0, BASE, BASE, 0)), "an event that was read"),
    "a-move-over-the-end": (
        lambda one: one.events.append((pagemaps.REMAP, 1, BASE, END - PAGE, PAGE)),
        "an event that was read",
    ),
    "a-debt-inside-a-page": (lambda one: one.debts.append((BASE, BASE + 8)), "an event that is to come"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_leads_outside_is_refused_by_name(place: Place, what: str) -> None:
    one = image(place)
    spoil, reason = WRONG[what]
    spoil(one)
    with pytest.raises(DamagedPageMapError, match=reason):
        place.live(one.write())


def test_more_records_than_the_table_has_room_for_are_refused(place: Place) -> None:
    for nrecords, ndebts in ((pagemaps.MAX_RECORDS + 1, 0), (0, pagemaps.MAX_DEBTS + 1), ((1 << 64) - 1, 0)):
        fd = image(place).write()
        os.pwrite(fd, struct.pack("<2Q", nrecords, ndebts), pagemaps.TABLES_AT)
        with pytest.raises(DamagedPageMapError, match="the length of its range table"):
            place.live(fd)


def test_a_full_table_leaves_room_for_a_stop_that_was_cut(place: Place) -> None:
    one = image(place)
    full = [(BASE + (1 << 34) + 2 * i * PAGE, 1, (1 << 64) - 1, 0) for i in range(pagemaps.MAX_RECORDS - 4)]
    one.records += full
    with pytest.raises(DamagedPageMapError, match="the length of its range table"):
        place.live(one.write())
    one.intents, one.stagings, one.events = {}, [], []
    place.live(one.write())


# Whatever it has.

WORDS = [
    *range(16, PM_HEADER_BYTES, 8),
    *range(pagemaps.RINGS_AT, pagemaps.RINGS_AT + 256, 8),
    *range(pagemaps.RINGS_AT + pagemaps.RING_BYTES, pagemaps.RINGS_AT + pagemaps.RING_BYTES + 64, 8),
    pagemaps.TABLES_AT,
    pagemaps.TABLES_AT + 8,
    *range(pagemaps.DEBTS_AT, pagemaps.DEBTS_AT + 32, 8),
    *range(pagemaps.DROPPING_AT, pagemaps.DROPPING_AT + 16, 8),
    *range(pagemaps.RECORDS_AT, pagemaps.RECORDS_AT + 6 * 32, 8),
    *range(ENTRIES_AT, ENTRIES_AT + 4 * NPAGES * 8, 8),
]
words = st.one_of(
    st.sampled_from(EVEN),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, 6),
    st.integers(0, 8 * NPAGES).map(lambda page: BASE + page * PAGE),
    st.integers(0, 4 * NPAGES).map(lambda number: pagemaps.frame(pagemaps.STORED, number)),
)


def try_to_live(place: Place, page_map: int) -> None:
    with suppress(DamagedPageMapError):
        place.live(page_map)


@settings(max_examples=400, deadline=None)
@given(damage=st.lists(st.tuples(st.sampled_from(WORDS), words), min_size=1, max_size=6))
def test_any_words_are_refused_or_lead_nowhere_else(place: Place, damage: list[tuple[int, int]]) -> None:
    fd = image(place).write()
    for at, value in damage:
        os.pwrite(fd, struct.pack("<Q", value), at)
    try_to_live(place, fd)


@settings(max_examples=200, deadline=None)
@given(flips=st.lists(st.tuples(st.sampled_from(WORDS), st.integers(0, 63)), min_size=1, max_size=3))
def test_any_bits_are_refused_or_lead_nowhere_else(place: Place, flips: list[tuple[int, int]]) -> None:
    fd = image(place).write()
    for at, bit in flips:
        (word,) = struct.unpack("<Q", os.pread(fd, 8, at))
        os.pwrite(fd, struct.pack("<Q", word ^ 1 << bit), at)
    try_to_live(place, fd)


pages = st.integers(0, 6 * NPAGES).map(lambda page: BASE + page * PAGE)
lengths = st.integers(0, 3 * NPAGES).map(lambda page: page * PAGE)
events = st.one_of(
    st.tuples(st.just(pagemaps.REMAP), st.integers(0, 8), pages, pages, lengths.map(lambda one: one + PAGE)),
    st.tuples(st.sampled_from([pagemaps.REMOVE, pagemaps.UNMAP]), pages, lengths).map(
        lambda one: (one[0], 0, one[1], one[1] + one[2], 0)
    ),
    st.just((pagemaps.FORK, 0, 3, 0, 0)),
    st.tuples(st.just(pagemaps.PAGEFAULT), st.just(0), st.integers(0, 1), pages, st.just(0)),
)


@settings(max_examples=200, deadline=None)
@given(ring=st.lists(events, max_size=24), times=st.sampled_from([1, 1, 40]))
def test_any_events_leave_a_range_table_in_order(place: Place, ring: list[tuple[int, ...]], times: int) -> None:
    one = image(place)
    one.events = (ring * times)[: pagemaps.RING_SLOTS]  # type: ignore[assignment]
    try_to_live(place, one.write())


def test_nothing_is_read_behind_a_full_ring(place: Place) -> None:
    one = image(place)
    one.intents, one.stagings, one.debts = {}, [], []  # or another ring becomes current
    one.events = [(pagemaps.REMOVE, 0, BASE, BASE + PAGE, 0)] * pagemaps.RING_SLOTS
    fd = one.write()
    session = place.adopt(fd, os.eventfd(1, os.EFD_NONBLOCK | os.EFD_CLOEXEC))  # there is something to be read
    keeper.resume(session)
    session.recover()  # waits until what the ring had is applied
    assert os.pread(fd, 8, pagemaps.RINGS_AT + pagemaps.RING_BYTES) == bytes(8)
    session.close()


spans = st.tuples(st.integers(0, 5), pages, st.integers(0, 3 * NPAGES), pages, pages)


@settings(max_examples=200, deadline=None)
@given(
    intents=st.dictionaries(st.integers(0, pagemaps.MAX_INTENTS - 1), spans, max_size=8),
    stagings=st.lists(st.tuples(pages, lengths), min_size=4, max_size=4),
    source=st.sampled_from([0, 9]),
)
def test_any_pieces_leave_a_range_table_in_order(
    place: Place,
    intents: dict[int, tuple[int, int, int, int, int]],
    stagings: list[tuple[int, int]],
    source: int,
) -> None:
    one = image(place)
    one.intents, one.stagings, one.source = intents, stagings, source
    try_to_live(place, one.write())


# The file itself.

MFD_ALLOW_SEALING, MFD_HUGETLB, F_ADD_SEALS, F_SEAL_SHRINK = 2, 4, 1033, 2


def file_of(kind: str, directory: Path) -> int:
    """Return a file with a page map's bytes that is none: of this kind."""
    content = Image().parts()
    if kind == "a-common-file":
        fd = os.open(directory / "map", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    elif kind == "of-huge-pages":
        fd = os.memfd_create("map", MFD_ALLOW_SEALING | MFD_HUGETLB)
        content = {}
    else:
        fd = os.memfd_create("map", MFD_ALLOW_SEALING)
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, (1 << 20) if kind == "short" else (16 << 20) + (1 << 34))
    for at, data in content.items():
        if kind != "short" or at < 1 << 20:
            os.pwrite(fd, data, at)
    if kind not in ("unsealed", "a-common-file"):
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    return fd


@pytest.mark.parametrize("kind", ["unsealed", "short", "a-common-file", "of-huge-pages", "a-pipe", "empty"])
def test_a_file_that_may_raise_sigbus_is_refused(tmp_path: Path, kind: str) -> None:
    if kind == "a-pipe":
        fd, other = os.pipe()
        os.close(other)
    elif kind == "empty":
        fd = os.memfd_create("map", MFD_ALLOW_SEALING)
        fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    else:
        fd = file_of(kind, tmp_path)
    with pytest.raises(DamagedPageMapError, match="none that this version can trust"):
        keeper.look(fd)
    os.close(fd)
