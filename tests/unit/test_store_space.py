"""The store's space: what nobody needs is given back, it stays below twice what is needed and does not wear out."""

from __future__ import annotations

import os
import random
import zlib
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import pytest

from snapd import engine
from snapd.engine import Model
from snapd.store.format import HEADER_BYTES, SEGMENT_BYTES, FrameError, PageEntry, PageState
from snapd.store.reader import StoreReader
from snapd.store.writer import StoreWriter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = 4096
BASE = 0x10_0000_0000
NONE = 0
MIB = 1 << 20


@cache
def page(number: int) -> bytes:
    """Return a page of its own that takes about 2 KiB in a frame."""
    noise = b"".join(zlib.crc32(number.to_bytes(4, "little") + bytes([i])).to_bytes(4, "little") for i in range(250))
    return (noise * 2 + bytes(PAGE))[:PAGE] if number % 3 else (noise + number.to_bytes(8, "little") * 512)[:PAGE]


@dataclass
class Space:
    """A store of pages by number, at the addresses that a model has for them."""

    store: engine.Store
    models: list[Model]
    reader: StoreReader
    live: dict[tuple[int, int], int] = field(default_factory=dict)

    def address(self, number: int) -> int:
        """Return where a page is."""
        return BASE + 2 * number * PAGE

    def discard(self, model: int, number: int) -> None:
        """Let the program throw a page away."""
        at = self.address(number)
        self.models[model].event(Model.REMOVE, at, at + PAGE)
        self.models[model].end(quiet=True)
        self.live.pop((model, number), None)

    def check(self) -> None:
        """See that every page which is needed is the right one, and all others are forgotten."""
        for (model, number), content in self.live.items():
            entry = PageEntry.unpack(self.models[model].entry(self.address(number)) or 0)
            assert entry.state is PageState.STORED
            assert self.reader.read_page(entry) == page(content)

    def used_bytes(self) -> int:
        """Return what the file system has given for frames."""
        return os.fstat(self.store.fd).st_blocks * 512 - HEADER_BYTES

    def tidy(self) -> int:
        """Tidy until nothing is moved; returns how many bytes were."""
        moved = 0
        while more := engine.tidy_store([one.session for one in self.models]):
            moved += more
        return moved


def make(directory: Path, pages: int, models: int = 1, limit: int = 0) -> Space:
    """Store so many pages, and let each model have all of them."""
    engine.start(packers=1)
    with StoreWriter(directory) as writer:
        entries = [writer.append_frame(page(number)) for number in range(pages)]
        store_id, tail = writer.header.store_id, writer.end
        store = engine.Store(writer.detach(), store_id, tail, limit)
    space = Space(store, [Model(store) for _ in range(models)], StoreReader(store.fd))
    for number, entry in enumerate(entries):
        for model in range(models):
            space.models[model].add(space.address(number), 1, entry.pack())
            space.live[model, number] = number
    return space


@pytest.fixture
def spaces() -> Iterator[list[Space]]:
    """Collect what is to be closed."""
    made: list[Space] = []
    yield made
    for one in made:
        for model in one.models:
            model.session.close()
        one.store.release()


def test_what_is_left_of_mostly_dead_segments_is_moved_and_right(spaces: list[Space], tmp_path: Path) -> None:
    space = make(tmp_path, 3000)
    spaces.append(space)
    before = space.used_bytes()
    assert before > 2.5 * MIB
    rng = random.Random(1)
    for number in range(3000):
        if rng.random() < 0.75:
            space.discard(0, number)
    stats = space.store.stats()
    assert stats.written_bytes > 3 * stats.live_bytes
    assert space.tidy() > 0
    space.check()
    after = space.store.stats()
    assert after.live_bytes == stats.live_bytes
    assert space.used_bytes() < 2 * after.live_bytes + MIB < before
    assert space.tidy() == 0


def test_a_store_stays_below_twice_what_is_needed_whatever_is_thrown_away(spaces: list[Space], tmp_path: Path) -> None:
    space = make(tmp_path, 2000)
    spaces.append(space)
    rng = random.Random(2)
    numbers = list(range(2000))
    rng.shuffle(numbers)
    while numbers:
        for _ in range(150):
            if numbers:
                space.discard(0, numbers.pop())
        space.tidy()
        stats = space.store.stats()
        assert stats.written_bytes <= 2 * stats.live_bytes + MIB
        assert space.used_bytes() <= 2 * stats.live_bytes + 2 * MIB
        space.check()
    assert space.used_bytes() == 0


def test_frames_that_several_share_are_moved_for_all_of_them(spaces: list[Space], tmp_path: Path) -> None:
    space = make(tmp_path, 1500, models=3)
    spaces.append(space)
    for number in range(1500):
        for model in range(3):
            if number % 10 or model == 2:
                space.discard(model, number)
    assert space.tidy() > 0
    space.check()
    entries = {space.models[model].entry(space.address(10)) for model in (0, 1)}
    assert len(entries) == 1, "they still share it"
    assert space.store.stats().written_bytes < 2 * space.store.stats().live_bytes + MIB


def test_a_session_that_is_not_named_keeps_its_frames_where_they_are(spaces: list[Space], tmp_path: Path) -> None:
    space = make(tmp_path, 1000, models=2)
    spaces.append(space)
    for number in range(1000):
        if number % 10:
            space.discard(0, number)
            space.discard(1, number)
    before = space.models[1].entry(space.address(500))
    assert engine.tidy_store([space.models[0].session]) > 0
    assert space.models[1].entry(space.address(500)) == before
    space.check()


def test_a_bad_frame_is_never_made_good(spaces: list[Space], tmp_path: Path) -> None:
    space = make(tmp_path, 1000)
    spaces.append(space)
    bad = PageEntry.unpack(space.models[0].entry(space.address(500)) or 0)
    os.pwrite(space.store.fd, b"\xff\xff", bad.offset + 20)
    for number in range(1000):
        if number % 20:
            space.discard(0, number)
    assert space.tidy() > 0
    assert PageEntry.unpack(space.models[0].entry(space.address(500)) or 0) == bad
    with pytest.raises(FrameError):
        space.reader.read_page(bad)
    del space.live[0, 500]
    space.check()


def test_a_store_that_has_had_all_its_segments_uses_them_again(spaces: list[Space], tmp_path: Path) -> None:
    space = make(tmp_path, 2700, limit=3)
    spaces.append(space)

    def segment(number: int) -> int:
        return PageEntry.unpack(space.models[0].entry(space.address(number)) or 0).offset // SEGMENT_BYTES

    by_segment = {number: segment(number) for number in range(2700)}
    assert set(by_segment.values()) == {0, 1, 2}
    for number, where in by_segment.items():
        if where == 1 or (where == 0 and number % 5 > 1):
            space.discard(0, number)
    assert space.tidy() > 0
    space.check()
    left = {segment(number) for _, number in space.live}
    assert left == {1, 2}, "the first one is empty, the middle one in use again"
    assert os.fstat(space.store.fd).st_size <= 3 * SEGMENT_BYTES
    stats = space.store.stats()
    assert stats.written_bytes <= 2 * stats.live_bytes


def test_a_store_without_a_segment_to_use_says_so_and_loses_nothing(spaces: list[Space], tmp_path: Path) -> None:
    space = make(tmp_path, 1200, limit=3)
    spaces.append(space)
    for number in range(1200):
        if number % 3:
            space.discard(0, number)
    while True:
        try:
            if not engine.tidy_store([space.models[0].session]):
                break
        except OSError as error:
            assert error.strerror == os.strerror(27)  # EFBIG
            break
    space.check()


def test_entries_are_given_out_again_when_half_of_all_have_been(spaces: list[Space], tmp_path: Path) -> None:
    space = make(tmp_path, 10)
    spaces.append(space)
    model = space.models[0]
    model.skip((1 << 31) - 20)
    model.add(space.address(100), 5, NONE)
    with pytest.raises(OSError, match="No space"):
        model.add(space.address(200), 10, NONE)
    model.session.trim()
    model.add(space.address(200), 100_000, NONE)
    space.check()
    assert [model.entry(space.address(200) + i * PAGE) for i in (0, 99_999)] == [NONE, NONE]
    assert model.entry(space.address(100)) == NONE


def test_what_a_former_daemon_wrote_is_counted(spaces: list[Space], tmp_path: Path) -> None:
    space = make(tmp_path, 1000)
    spaces.append(space)
    stats = space.store.stats()
    assert stats.live_bytes <= stats.written_bytes <= stats.live_bytes + 3 * PAGE
