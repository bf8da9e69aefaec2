"""A Python program that uses fork pools, threads, subprocesses, private mappings and, where it is installed, numpy, all
over one heap, and verifies every result. Runs for a time, then prints what it did as one JSON line.

    pooled.py [--seconds 10] [--mib 64] [--processes 3] [--threads 4] [--seed 1]

A wrong result is one line on stderr and exit status 1. SIGTERM and SIGINT end it early and orderly: after the round.
"""

import argparse
import hashlib
import importlib
import importlib.util
import json
import mmap
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

BLOCK_BYTES = 1 << 18

Block = dict[int, str]


def digest(data: bytes | bytearray | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def digest_block(block: Block) -> str:
    return digest(repr(block).encode())


def wrong(what: str, expected: object, found: object) -> NoReturn:
    sys.stderr.write(f"MISMATCH in {what} of process {os.getpid()}: expected {expected!r} found {found!r}\n")
    sys.stderr.flush()
    os._exit(1)


def expect(what: str, expected: object, found: object) -> None:
    if found != expected:
        wrong(what, expected, found)


def make_block(rng: random.Random) -> Block:
    return {i: f"{rng.getrandbits(48):x} {'word ' * (i % 9)}" for i in range(BLOCK_BYTES // 140)}


class Heap:
    """Blocks of objects and one large bytearray, with the digest of each block."""

    def __init__(self, mib: int, seed: int) -> None:
        rng = random.Random(seed)
        self.rng = rng
        self.blocks = [make_block(rng) for _ in range(max(4, mib * (1 << 20) // 2 // BLOCK_BYTES))]
        self.digests = [digest_block(block) for block in self.blocks]
        self.raw = bytearray(rng.randbytes(BLOCK_BYTES) * max(4, mib * (1 << 20) // 2 // BLOCK_BYTES))

    def renew(self, index: int) -> None:
        self.blocks[index] = make_block(self.rng)
        self.digests[index] = digest_block(self.blocks[index])

    def slices(self, count: int) -> list[memoryview]:
        view = memoryview(self.raw)
        size = len(self.raw) // count
        return [view[i * size : (i + 1) * size] for i in range(count)]


def reset_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def work_on_block(index: int) -> tuple[int, str, str]:
    """In a worker: the inherited block, then the worker's own change of it, undone again."""
    block = PROGRAM[0].heap.blocks[index]
    before = digest_block(block)
    kept = block[0]
    block[0] = f"changed by {os.getpid()}"
    if digest_block(block) == before:
        wrong("a worker's own change", "another digest", before)
    block[0] = kept
    return index, before, digest_block(block)


def scramble(view: memoryview) -> str:
    """Changes every page of the slice twice, to the effect of nothing."""
    before = digest(view)
    for mask in (0x5A, 0x5A):
        for at in range(0, len(view), 4096):
            view[at] ^= mask
    expect("a thread's slice", before, digest(view))
    return before


class Program:
    """The uses of memory that take turns; each leaves the heap verified."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.heap = Heap(options.mib, options.seed)
        self.ended = False

    def end(self, *_: object) -> None:
        self.ended = True

    def use_fork_pool(self) -> None:
        inherited = list(self.heap.digests)
        pool = multiprocessing.get_context("fork").Pool(self.options.processes, initializer=reset_signals)
        answers = pool.imap_unordered(work_on_block, range(len(self.heap.blocks)), chunksize=8)
        # The parent goes on: its new blocks must not show in the workers, which answer for what they inherited.
        for _ in range(3):
            self.heap.renew(self.heap.rng.randrange(len(self.heap.blocks)))
        for index, before, after in answers:
            expect("a worker's inherited block", inherited[index], before)
            expect("a worker's block, changed and changed back", inherited[index], after)
        # Never terminate(): an orderly end shows that every worker came through.
        pool.close()
        pool.join()

    def use_threads(self) -> None:
        views = self.heap.slices(self.options.threads)
        expected = [digest(view) for view in views]
        with ThreadPoolExecutor(self.options.threads) as executor:
            expect("the threads' slices", expected, list(executor.map(scramble, views)))

    def use_subprocess(self) -> None:
        script = (
            "import sys, hashlib; data = sys.stdin.buffer.read();"
            "print(hashlib.blake2b(data, digest_size=16).hexdigest()); sys.exit(len(data) % 199)"
        )
        data = bytes(self.heap.raw[: self.heap.rng.randrange(len(self.heap.raw))])
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", script], input=data, stdout=subprocess.PIPE, check=False
        )
        expect("a subprocess", (len(data) % 199, digest(data)), (done.returncode, done.stdout.decode().strip()))

    def use_mapping(self) -> None:
        data = bytes(self.heap.raw[:BLOCK_BYTES])
        with mmap.mmap(-1, 16 * BLOCK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapping:
            for at in range(0, len(mapping), BLOCK_BYTES):
                mapping[at : at + BLOCK_BYTES] = data
            mapping.madvise(mmap.MADV_DONTNEED, 4 * BLOCK_BYTES, 4 * BLOCK_BYTES)
            for at in range(0, len(mapping), BLOCK_BYTES):
                discarded = 4 * BLOCK_BYTES <= at < 8 * BLOCK_BYTES
                expect("a mapping", bytes(BLOCK_BYTES) if discarded else data, mapping[at : at + BLOCK_BYTES])
            mapping.move(8 * BLOCK_BYTES + 100, 0, BLOCK_BYTES)
            expect("a move inside a mapping", digest(data), digest(mapping[8 * BLOCK_BYTES + 100 :][:BLOCK_BYTES]))

    def use_numpy(self) -> None:
        np: Any = importlib.import_module("numpy")
        n = 1 << 20
        numbers = np.arange(n, dtype=np.int64)
        expect("a numpy sum", n * (n - 1) // 2, int(numbers.sum()))
        shuffled = numbers.copy()
        np.random.default_rng(self.options.seed).shuffle(shuffled)
        numbers *= 3
        expect("a numpy sort", True, bool((np.sort(shuffled) * 3 == numbers).all()))
        raw = np.frombuffer(self.heap.raw, dtype=np.uint8)
        expect("numpy over a bytearray", digest(self.heap.raw), digest(raw.tobytes()))

    def verify_blocks(self) -> None:
        for block, expected in zip(self.heap.blocks, self.heap.digests, strict=True):
            expect("a block", expected, digest_block(block))

    def run(self) -> dict[str, int]:
        uses = [self.use_fork_pool, self.use_threads, self.use_subprocess, self.use_mapping, self.verify_blocks]
        if importlib.util.find_spec("numpy"):
            uses.append(self.use_numpy)
        done = {use.__name__: 0 for use in uses}
        start = time.monotonic()
        while not self.ended and (time.monotonic() - start < self.options.seconds or not all(done.values())):
            for use in uses:
                use()
                done[use.__name__] += 1
        return done


PROGRAM: list[Program] = []
"""Holds one: forked workers find it here, as it was when they were forked."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    program = Program(parser.parse_args())
    PROGRAM.append(program)
    signal.signal(signal.SIGTERM, program.end)
    signal.signal(signal.SIGINT, program.end)
    print(json.dumps({"ok": True, "ready": True, "pid": os.getpid()}), flush=True)
    start = time.monotonic()
    done = program.run()
    seconds = round(time.monotonic() - start, 3)
    print(json.dumps({"target": "pooled", "done": done, "seconds": seconds, "errors": 0}), flush=True)


if __name__ == "__main__":
    main()
