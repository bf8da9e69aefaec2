"""The store of a live session: a damaged frame is its page's SIGBUS, and what is clean is not stored again."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from snapd.pages import PAGE
from snapd.store.reader import Frame, StoreReader
from tests.harness import Daemon, Spawner, Target
from tests.kernel.driving import MIB, out_bytes, stores_of
from tests.kernel.test_replay import touch

HEAP_MIB = 32
HEAP_PAGES = HEAP_MIB * 256
HEAP_BYTES = HEAP_MIB * MIB
# What the C library and the agent have beside the heap, and change all the time.
OTHER_BYTES = MIB

CAUSES = ("its check does not match", "it can't be read", "it does not decode")

Damage = Callable[[int, Frame, list[Frame]], None]


@contextmanager
def store_of(daemon: Daemon) -> Iterator[int]:
    """Open the one store of the daemon for writing."""
    [path] = stores_of(daemon)
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def heap_frames(fd: int, start: int) -> dict[int, Frame]:
    """Return the frames of a heap's pages by address; each such page begins with its number and generation 1."""
    found = {}
    for frame in StoreReader(fd).scan():
        index, generation = (int.from_bytes(frame.page[at : at + 4], "little") for at in (0, 4))
        if generation and index < HEAP_PAGES and any(frame.page[8:]):
            found[start + index * PAGE] = frame
    return found


def flip_payload(fd: int, frame: Frame, _: list[Frame]) -> None:
    at = frame.offset + frame.header.length_bytes // 2
    os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 0x10]), at)


def flip_check(fd: int, frame: Frame, _: list[Frame]) -> None:
    os.pwrite(fd, bytes([os.pread(fd, 1, frame.offset)[0] ^ 1]), frame.offset)


def zeros(fd: int, frame: Frame, _: list[Frame]) -> None:
    os.pwrite(fd, bytes(frame.header.length_bytes), frame.offset)


def garbage(fd: int, frame: Frame, _: list[Frame]) -> None:
    os.pwrite(fd, os.urandom(frame.header.length_bytes), frame.offset)


def another_frame(fd: int, frame: Frame, frames: list[Frame]) -> None:
    """Put a good frame of the same length there, which is not this page's."""
    length = frame.header.length_bytes
    other = next(one for one in frames if one.header.length_bytes == length and one.offset != frame.offset)
    os.pwrite(fd, os.pread(fd, length, other.offset), frame.offset)


DAMAGES: dict[str, Damage] = {
    "payload": flip_payload, "check": flip_check, "zeros": zeros, "garbage": garbage, "other": another_frame
}  # fmt: skip


@pytest.fixture
def steps(daemon: Daemon, spawn: Spawner) -> Target:
    """Return a target whose heap has just gone out."""
    target = spawn("steps", "--mib", HEAP_MIB)
    daemon.dump(target.pid)
    assert out_bytes(daemon, target.pid) > 0.95 * HEAP_BYTES
    return target


def damaged(daemon: Daemon, target: Target) -> list[int]:
    """Damage frames of pages far from each other, one in each way, and of two neighbours; returns their addresses."""
    start = target.ask("where")["address"]
    with store_of(daemon) as fd:
        frames = heap_frames(fd, start)
        assert len(frames) > 0.9 * HEAP_PAGES
        addresses = sorted(frames)[100 :: len(frames) // len(DAMAGES)][: len(DAMAGES)]
        for address, damage in zip(addresses, DAMAGES.values(), strict=True):
            damage(fd, frames[address], list(frames.values()))
        neighbours = sorted(frames)[3000:3002]
        for address in neighbours:
            zeros(fd, frames[address], [])
    assert neighbours[1] == neighbours[0] + PAGE
    return sorted([*addresses, *neighbours])


def assert_these_are_lost(daemon: Daemon, target: Target, addresses: list[int]) -> None:
    """Check that these pages raise SIGBUS and all others are right; status and log say which and why."""
    seen = target.receive()
    assert (seen["lost"], seen["right"]) == (len(addresses), HEAP_PAGES - len(addresses))
    assert daemon.wait_for_session(target.pid).bad_pages == len(addresses)
    for address in addresses:
        [line] = [line for line in daemon.log().splitlines() if f"{address:#x}" in line]
        assert f"pid {target.pid}: the page at {address:#x} is lost: it" in line
        assert line.endswith("; touching it raises SIGBUS")
        assert any(cause in line for cause in CAUSES)
    assert daemon.log().count("is lost") == len(addresses)


@pytest.mark.parametrize("way", ["touch", "restore"])
def test_damaged_frames_raise_sigbus_at_their_pages_and_nowhere_else(steps: Target, daemon: Daemon, way: str) -> None:
    daemon.allow("is lost")
    addresses = damaged(daemon, steps)
    if way == "restore":
        daemon.restore(steps.pid)
    steps.send("look")
    assert_these_are_lost(daemon, steps, addresses)
    # The next dump moves what marks them along, and they are as lost as before: not zeros.
    daemon.dump(steps.pid)
    steps.send("look")
    assert_these_are_lost(daemon, steps, addresses)


def test_program_that_is_let_go_keeps_its_lost_pages_lost(steps: Target, daemon: Daemon) -> None:
    daemon.allow("is lost")
    addresses = damaged(daemon, steps)
    with daemon.client() as client:
        client.detach(steps.pid)
    seen = steps.ask("look")
    assert (seen["lost"], seen["right"]) == (len(addresses), HEAP_PAGES - len(addresses))


def test_store_that_lost_its_end_costs_what_was_there_and_nothing_else(steps: Target, daemon: Daemon) -> None:
    daemon.allow("is lost")
    start = steps.ask("where")["address"]
    with store_of(daemon) as fd:
        frames = heap_frames(fd, start)
        keep = sorted(frame.offset for frame in frames.values())[-50]
        os.ftruncate(fd, keep)
    steps.send("look")
    assert_these_are_lost(daemon, steps, sorted(at for at, frame in frames.items() if frame.offset >= keep))


def test_pages_that_were_only_read_since_are_clean_and_not_stored_again(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB)
    first = daemon.dump(hold.pid)
    assert first.clean_bytes == 0
    [store] = stores_of(daemon)
    for _ in range(2):
        hold.ask("sum")
        size = store.stat().st_size
        again = daemon.dump(hold.pid)
        assert again.clean_bytes > 0.98 * HEAP_BYTES
        assert again.moved_bytes - again.clean_bytes < OTHER_BYTES
        assert store.stat().st_size - size < OTHER_BYTES
    hold.ask("sum")
    hold.quit()


def test_pages_that_were_wanted_one_by_one_are_clean_too(daemon: Daemon, spawn: Spawner) -> None:
    """From the end, so that each is a fill of its own."""
    hold = spawn("hold", "--mib", HEAP_MIB)
    daemon.dump(hold.pid)
    wanted = range(HEAP_PAGES - 1, 0, -16)
    touch(hold, wanted)
    report = daemon.dump(hold.pid)
    assert report.clean_bytes >= len(wanted) * PAGE
    assert report.moved_bytes - report.clean_bytes < OTHER_BYTES
    hold.ask("sum")
    hold.quit()


@pytest.mark.parametrize("how", ["write", "readin", "vmwrite"])
def test_whoever_writes_to_a_clean_page_makes_it_dirty(steps: Target, daemon: Daemon, how: str) -> None:
    steps.ask("look")
    steps.ask(how, 1000, 7)  # every one verified at once
    report = daemon.dump(steps.pid)
    assert report.clean_bytes > 0.8 * HEAP_BYTES
    assert report.moved_bytes - report.clean_bytes > 900 * PAGE
    steps.ask("look")
