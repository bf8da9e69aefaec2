"""What /proc says: parsers against texts that the kernel writes and might write, readers against real processes."""

import contextlib
import ctypes
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapd.daemon import procfs
from snapd.daemon.procfs import Mapping, parse_mappings
from snapd.pages import PAGE, Range

ME = os.getpid()
PRESENT, SWAPPED, PROTECTED, EXCLUSIVE = 1 << 63, 1 << 62, 1 << 57, 1 << 56

MAPS = b"""\
55d0a4c00000-55d0a4c21000 r--p 00000000 fe:00 4711                       /usr/bin/a name  with spaces (deleted)
55d0a5000000-55d0a5800000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000021000 rw-p 00000000 00:00 0 
7f0000021000-7f0004000000 ---p 00000000 00:00 0 
7f0010000000-7f0010100000 rw-s 00000000 00:01 99                         /memfd:\xff\xfe (deleted)
7f0020000000-7f0020010000 rw-p 00000000 00:00 0                          [anon:glibc: malloc]
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0                          [stack]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""  # noqa: W291 - as the kernel writes it

names = st.one_of(
    st.just(""),
    st.sampled_from(["[heap]", "[stack]", "[anon:x y]", "/a b/c (deleted)", "/Rss: 1 kB", "/VmFlags: lo", "/10-20"]),
    st.binary(min_size=1, max_size=20).map(lambda name: "/" + os.fsdecode(name.replace(b"\n", b"\\012"))),
)
flags = st.frozensets(st.sampled_from(["rd", "wr", "lo", "sl", "ht", "dc", "uw", "??"]))


@st.composite
def address_spaces(draw: st.DrawFn) -> list[Mapping]:
    """Mappings in order, with figures and flags."""
    at, found = 0, []
    for _ in range(draw(st.integers(0, 6))):
        start = at + draw(st.integers(0, 1 << 40)) * PAGE
        at = start + draw(st.integers(1, 1 << 20)) * PAGE
        permissions = "".join(draw(st.sampled_from(pair)) for pair in ("r-", "w-", "x-", "ps"))
        kib = st.integers(0, (at - start) // 1024)
        found.append(
            Mapping(
                start,
                at,
                permissions,
                draw(st.integers(0, 1 << 63)),
                draw(names),
                draw(kib) * 1024,
                draw(kib) * 1024,
                draw(flags),
            )
        )
    return found


def header(one: Mapping) -> bytes:
    """Return the first line of a mapping as fs/proc/task_mmu.c writes it."""
    text = f"{one.start:08x}-{one.end:08x} {one.permissions} 00000000 fe:00 {one.inode} ".encode()
    return (text.ljust(73) if one.name else text) + os.fsencode(one.name)


def smaps(mappings: list[Mapping]) -> list[bytes]:
    """Return the lines of a smaps text, with some of those that nobody asks for."""
    lines = []
    for one in mappings:
        lines += [
            header(one),
            b"Size:           %8d kB" % ((one.end - one.start) // 1024),
            b"Rss:            %8d kB" % (one.resident_bytes // 1024),
            b"Pss:                   7 kB",
            b"SwapPss:               7 kB",
            b"Swap:           %8d kB" % (one.swapped_bytes // 1024),
            b"THPeligible:           0",
            b"VmFlags: " + " ".join(sorted(one.flags)).encode() + b" ",
        ]
    return lines


@given(address_spaces())
def test_smaps_text_is_read_back(mappings: list[Mapping]) -> None:
    assert list(parse_mappings(smaps(mappings))) == mappings


@given(address_spaces())
def test_maps_text_is_read_back_without_figures(mappings: list[Mapping]) -> None:
    bare = [Mapping(one.start, one.end, one.permissions, one.inode, one.name) for one in mappings]
    assert list(parse_mappings(header(one) for one in mappings)) == bare


@given(address_spaces(), st.data())
def test_a_text_that_breaks_off_gives_what_was_whole(mappings: list[Mapping], data: st.DataObject) -> None:
    """A process that exits while its smaps are read."""
    lines = smaps(mappings)
    got = list(parse_mappings(lines[: data.draw(st.integers(0, len(lines)))]))
    assert got[:-1] == mappings[: max(0, len(got) - 1)]


def test_lines_of_every_kind() -> None:
    found = list(parse_mappings(MAPS.splitlines()))
    assert [one.name for one in found] == [
        "/usr/bin/a name  with spaces (deleted)",
        "[heap]",
        "",
        "",
        os.fsdecode(b"/memfd:\xff\xfe (deleted)"),
        "[anon:glibc: malloc]",
        "[stack]",
        "[vsyscall]",
    ]
    assert (found[0].inode, found[1].inode) == (4711, 0)
    assert found[4].permissions == "rw-s"
    assert (found[-1].start, found[-1].end) == (0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000)
    assert all(one.memory_bytes == 0 for one in found)


class Waiting(NamedTuple):
    """A process with two threads that stands still, and its child."""

    pid: int
    child: int


@pytest.fixture
def waiting() -> Iterator[Waiting]:
    """Yield a process that waits until its input ends."""
    script = """
import subprocess, sys, threading
child = subprocess.Popen(["cat"], stdout=subprocess.DEVNULL)
thread = threading.Thread(target=sys.stdin.read)
thread.start()
print(child.pid, flush=True)
thread.join()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield Waiting(process.pid, int(process.stdout.readline()))
        finally:
            process.stdin.close()


def test_own_mappings_are_whole() -> None:
    area = (ctypes.c_char * (4 << 20))()
    ctypes.memset(area, 1, len(area))
    address = ctypes.addressof(area)
    found = procfs.smaps(ME)
    held = next(one for one in found if one.start <= address < one.end)
    assert held.resident_bytes >= len(area)
    assert (held.permissions, held.inode) == ("rw-p", 0)
    assert {"rd", "wr"} <= held.flags
    assert all(one.start < one.end and one.start % PAGE == one.end % PAGE == 0 for one in found)
    assert sorted(found, key=lambda one: one.start) == found
    assert any(one.name == "[stack]" and "gd" in one.flags for one in found)
    assert abs(sum(one.resident_bytes for one in found) - procfs.resident_bytes(ME)) < 16 << 20


def test_maps_and_smaps_agree_on_a_process_that_stands_still(waiting: Waiting) -> None:
    bare = [(one.start, one.end, one.permissions, one.inode, one.name) for one in procfs.maps(waiting.pid)]
    assert bare == [(one.start, one.end, one.permissions, one.inode, one.name) for one in procfs.smaps(waiting.pid)]


@given(
    st.lists(
        st.sampled_from(
            [0, *(a | b | c for a in (0, PRESENT, SWAPPED) for b in (0, EXCLUSIVE, 4711) for c in (0, PROTECTED))]
        ),
        max_size=40,
    )
)
def test_ownership_is_that_of_the_pagemap(entries: list[int]) -> None:
    first = 3
    with _pagemap([0] * first + entries) as fd:
        whole = procfs.ownership(fd, Range(first * PAGE, (first + len(entries)) * PAGE))
    shared, own, written = (
        {address // PAGE - first for run in runs for address in run.addresses()}
        for runs in (whole.shared, whole.own, whole.written)
    )
    there = {page for page, entry in enumerate(entries) if entry & (PRESENT | SWAPPED)}
    assert shared == {page for page in there if entries[page] & PRESENT and not entries[page] & EXCLUSIVE}
    assert own == there - shared
    assert written == {page for page in own if entries[page] & PRESENT and not entries[page] & PROTECTED}
    for runs in (whole.shared, whole.own, whole.written):
        assert all(before.end < after.start for before, after in itertools.pairwise(runs)), "as few as can be"


def test_ownership_of_a_text_that_is_too_short_is_what_it_holds() -> None:
    with _pagemap([PRESENT | EXCLUSIVE] * 2) as fd:
        assert procfs.ownership(fd, Range(PAGE, 9 * PAGE)).own == [Range(PAGE, 2 * PAGE)]
        assert procfs.ownership(fd, Range(5 * PAGE, 9 * PAGE)).own == []


@contextlib.contextmanager
def _pagemap(entries: list[int]) -> Iterator[int]:
    fd = os.memfd_create("pagemap")
    try:
        os.write(fd, b"".join(entry.to_bytes(8, "little") for entry in entries))
        yield fd
    finally:
        os.close(fd)


def test_a_process_its_threads_and_its_children(waiting: Waiting) -> None:
    pid, child = waiting
    assert procfs.exists(pid)
    assert procfs.uid(pid) == os.geteuid()
    assert procfs.resident_bytes(pid) > 0
    assert procfs.children(pid) == [child]
    assert {pid, child} <= set(procfs.processes())
    tids = procfs.threads(pid)
    assert len(tids) == 2
    other = next(tid for tid in tids if tid != pid)
    assert not procfs.exists(other), "a thread is no process"
    assert procfs.status(pid, other)["Pid"] == str(other)
    assert procfs.thread_of(pid, other) == other
    assert procfs.thread_of(pid, child) == 0


@pytest.fixture
def gone() -> int:
    """Return the pid of a process that has ended and was reaped."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_process_that_is_gone_is_an_empty_answer(gone: int) -> None:
    assert not any(look(gone) for look in (procfs.smaps, procfs.maps, procfs.threads, procfs.children))
    assert procfs.status(gone) == procfs.status(ME, gone) == {}
    assert procfs.resident_bytes(gone) == procfs.thread_of(gone, gone) == 0
    assert procfs.uid(gone) is None
    assert not procfs.exists(gone)


def test_a_process_that_was_not_reaped_has_no_memory() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert procfs.exists(process.pid)
        assert procfs.status(process.pid)["State"].startswith("Z")
        assert procfs.smaps(process.pid) == procfs.maps(process.pid) == []
        assert procfs.resident_bytes(process.pid) == 0


@pytest.mark.parametrize("name", ["a\fUid:\t7", "b\rTgid:\t1", "c\x1cState:\tT", "d\nUid:\t7", "e\u2028f"])
def test_no_name_of_a_program_forges_a_line(name: str) -> None:
    """Of the characters that Python ends a line at, the kernel escapes the line feed alone."""
    seen: list[dict[str, str]] = []

    def look() -> None:
        tid = threading.get_native_id()
        Path(f"/proc/self/task/{tid}/comm").write_bytes(name.encode()[:15])
        seen.append(procfs.status(ME, tid))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    (found,) = seen
    assert found["Tgid"] == str(ME)
    assert found["Uid"].split()[1] == str(os.geteuid())
    assert found["State"][0] in "RSD"


def test_the_kernels_limit_of_mappings() -> None:
    assert procfs.max_map_count() >= 1024
