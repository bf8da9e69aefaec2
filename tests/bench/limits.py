"""Raw limits of the machine, without a daemon: zstd and lz4 on the target's own pages, userfaultfd by itself (raw.c).

What snapd reaches is read against these; they are measured in the same run, turn by turn with it.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import lz4.block

from snapd import engine
from snapd.agent import header_path
from snapd.pages import PAGE
from tests.bench import machine
from tests.bench.samples import Samples
from tests.harness import C_FLAGS

RAW_SECONDS = 120.0
TRIPS = 2000
MB = 1e6


def build_raw(directory: Path) -> Path:
    """Compile raw.c into `directory`."""
    binary = directory / "raw"
    source = Path(__file__).with_name("raw.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, *C_FLAGS, f"-I{header_path()}", str(source), "-o", str(binary)], check=True)
    return binary


def measure_userfaultfd(binary: Path, mib: int, limits: Samples) -> None:
    """Add what raw.c finds: COPY in bulk and by the page, and the round trip of a fault."""
    command = [str(binary), "--mib", str(mib), "--faults", str(min(TRIPS, (mib << 20) // PAGE))]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=RAW_SECONDS)
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


def lz4_bytes(pages: bytes) -> int:
    """Return what lz4 makes of `pages` one by one: bare blocks, and a page as it is where its block is no smaller."""
    view = memoryview(pages)
    return sum(
        min(PAGE, len(lz4.block.compress(view[at : at + PAGE], store_size=False))) for at in range(0, len(view), PAGE)
    )
