"""Raw limits of the machine, without a daemon: zstd and lz4 on the target's own pages, userfaultfd by itself (raw.c).

What snapd reaches is read against these; they are measured in the same run, turn by turn with it.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from typing import TYPE_CHECKING, Any, Final

from snapd import engine
from snapd.bench import machine, program_path
from snapd.errors import Internal
from snapd.pages import PAGE

if TYPE_CHECKING:
    from snapd.bench.samples import Samples

RAW_S: Final = 120.0
TRIPS: Final = 2000
MB: Final = 1e6


def measure_userfaultfd(mib: int, limits: Samples) -> None:
    """Add what raw.c finds: COPY in bulk and by the page, and the round trip of a fault."""
    command = [str(program_path("raw")), "--mib", str(mib), "--faults", str(min(TRIPS, (mib << 20) // PAGE))]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=RAW_S)
    if done.returncode:
        raise Internal(f"userfaultfd by itself cannot be measured: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    limits.add(
        copy_bulk_mb_s=found["bytes"] / MB / (found["copy_bulk_ns"] / 1e9),
        copy_bulk_all_s=found["copy_bulk_ns"] / 1e9,
        copy_page_all_s=found["copy_page_ns"] / 1e9,
        copy_page_us=found["copy_page_ns"] / 1e3 / (found["bytes"] // PAGE),
    )
    for trip in ("same_cpu", "other_cpu", "other_cpu_spinning"):
        if trip in found:
            for percentile in ("p50", "p99"):
                limits.add(**{f"trip_{trip}_{percentile}_us": found[trip][f"{percentile}_ns"] / 1e3})


def measure_codec(pages: bytes, level: int, limits: Samples) -> None:
    """Add the engine's frames (zstd and their check) of `pages` on all CPUs, and nothing else."""
    compress_s, decompress_s, frame_bytes = engine.bench_codec(pages, level, machine.cpus())
    limits.add(
        compress_mb_s=len(pages) / MB / compress_s,
        decode_mb_s=len(pages) / MB / decompress_s,
        codec_ratio=len(pages) / frame_bytes,
    )


def lz4_bytes(pages: bytes) -> int | None:
    """Return what lz4 makes of `pages` one by one: bare blocks, and a page as it is where its block is no smaller.

    None where the system has no lz4 library.
    """
    try:
        compress = ctypes.CDLL("liblz4.so.1").LZ4_compress_default
    except OSError:
        return None
    compress.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    compress.restype = ctypes.c_int
    room = ctypes.create_string_buffer(PAGE)
    start = ctypes.cast(ctypes.c_char_p(pages), ctypes.c_void_p).value or 0
    # Nothing that would not fit into the page is worth having: 0 says so.
    return sum(compress(start + at, room, PAGE, PAGE) or PAGE for at in range(0, len(pages), PAGE))
