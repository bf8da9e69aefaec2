"""What a dump has stored leaves the page cache, so that the memory is free; or stays there, when that is wished."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from snapd.protocol.options import DumpOptions
from tests.harness import Daemon, Spawner, wait_until
from tests.kernel.driving import PAGE, stores_of

if TYPE_CHECKING:
    from pathlib import Path

HEAP_MIB = 32


def cached_bytes(path: Path) -> int:
    """Return how much of a file the page cache has."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        at = libc.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, fd, ctypes.c_long(0))
        states = ctypes.create_string_buffer((size + PAGE - 1) // PAGE)
        assert libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), states) == 0, os.strerror(ctypes.get_errno())
        libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size))
    finally:
        os.close(fd)
    return sum(state & 1 for state in states.raw) * PAGE


@pytest.fixture
def on_a_disk(daemon: Daemon) -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", daemon.state_dir], capture_output=True, text=True, check=True)
    if kind.stdout.strip() in ("tmpfs", "ramfs"):
        pytest.skip("the state directory is in memory: its files are nowhere else")


@pytest.mark.usefixtures("on_a_disk")
def test_what_was_stored_leaves_the_page_cache(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB)
    stored = daemon.dump(hold.pid).stored_bytes
    [store] = stores_of(daemon)
    wait_until(lambda: cached_bytes(store) < stored // 8, "a page cache without the store", 60)
    hold.ask("sum")
    hold.quit()


@pytest.mark.usefixtures("on_a_disk")
def test_what_was_stored_stays_in_the_page_cache_when_that_is_wished(daemon: Daemon, spawn: Spawner) -> None:
    hold = spawn("hold", "--mib", HEAP_MIB)
    with daemon.client() as client:
        stored = client.dump(hold.pid, DumpOptions(keep_cached=True)).stored_bytes
    [store] = stores_of(daemon)
    assert cached_bytes(store) > stored * 7 // 8
    hold.ask("sum")
    hold.quit()
