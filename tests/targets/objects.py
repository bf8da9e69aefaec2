"""A Python heap of real objects (dicts, strings, floats, lists, an array, bytes), made from a seed, and a command loop.

    objects.py [--mib 128] [--seed 1]

    sum             verifies everything; "sum" is a digest that walks every object, in hex
    touch N SEED    verifies N random parts
    mutate N SEED   verifies N random parts, changes each, and expects the change from then on
    rss             VmRSS in bytes
    quit            as does the end of input

Each reply is one JSON line, {"ok": true, ...} or {"ok": false, "error": "..."}. A part that is not as it should be is
one line on stderr and exit status 1. The expected digests stand in shared memory, which no pager of private memory
moves.
"""

import argparse
import array
import hashlib
import json
import marshal
import mmap
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

Record = dict[str, object]
Part: TypeAlias = "list[Record] | array.array[float] | bytes"

DIGEST_BYTES = 16
RECORDS_A_PART = 500
BYTES_A_RECORD = 2300
"""Measured with CPython 3.11; it only decides how near the heap comes to --mib."""
PLAIN_PART_BYTES = 1 << 20
WORDS = [
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"),
    *("nu", "xi", "omicron", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"),
]


def make_record(rng: random.Random, number: int) -> Record:
    name = f"{rng.choice(WORDS)}-{number:08d}"
    return {
        "id": number * 1_000_003,
        "name": name,
        "mail": f"{name}@{rng.choice(WORDS)}.example",
        "score": rng.random(),
        "active": rng.random() < 0.5,
        "tags": [f"{word}{number % 97}" for word in rng.choices(WORDS, k=4)],
        "place": {"street": f"{rng.choice(WORDS)} {number % 211}", "zip": str(10_000 + number % 90_000)},
        "history": [rng.gauss(100.0, 15.0) for _ in range(12)],
        "note": " ".join(rng.choices(WORDS, k=24)),
        "parent": None,
    }


def make_records(rng: random.Random) -> list[Record]:
    first = rng.randrange(1_000_000)
    return [make_record(rng, first + i) for i in range(RECORDS_A_PART)]


def make_array(rng: random.Random) -> "array.array[float]":
    step = rng.random()
    return array.array("d", (i * step for i in range(PLAIN_PART_BYTES // 8)))


def make_bytes(rng: random.Random) -> bytes:
    lines = b"".join(f"{i} {rng.choice(WORDS)} {rng.getrandbits(32)}\n".encode() for i in range(4096))
    return (lines * (PLAIN_PART_BYTES // len(lines) + 1))[:PLAIN_PART_BYTES]


def digest(part: Part) -> bytes:
    # Version 2 writes every object out in full: later ones say "as before" by reference count, which differs by chance.
    data = marshal.dumps(part, 2) if isinstance(part, list) else part
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def mutate(part: Part, rng: random.Random) -> Part:
    """Changes the part in place where its type allows it, and returns what stands for it from now on."""
    if isinstance(part, bytes):
        return make_bytes(rng)
    if isinstance(part, array.array):
        for _ in range(100):
            part[rng.randrange(len(part))] = rng.random()
        return part
    for _ in range(RECORDS_A_PART // 10):
        index = rng.randrange(len(part))
        record = part[index]
        record["score"] = rng.random()
        record["note"] = " ".join(rng.choices(WORDS, k=24))
        record.pop("parent", None)
        record[f"extra{rng.randrange(4)}"] = [rng.random(), {"deep": rng.choice(WORDS)}]
        part[rng.randrange(len(part))] = make_record(rng, rng.randrange(1_000_000))
    return part


class Heap:
    def __init__(self, mib: int, seed: int) -> None:
        rng = random.Random(seed)
        plain = max(1, mib // 8)
        records = max(1, (mib - 2 * plain) * (1 << 20) // (RECORDS_A_PART * BYTES_A_RECORD))
        makers: list[Callable[[random.Random], Part]] = [make_records] * records
        makers += [make_array] * plain + [make_bytes] * plain
        self.parts: list[Part] = [make(rng) for make in makers]
        self.expected = mmap.mmap(-1, len(self.parts) * DIGEST_BYTES)
        for i in range(len(self.parts)):
            self.expect(i)

    def expect(self, index: int) -> None:
        self.expected[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES] = digest(self.parts[index])

    def verify(self, index: int, after: str) -> bytes:
        found = digest(self.parts[index])
        expected = self.expected[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
        if found != expected:
            kind = type(self.parts[index]).__name__
            sys.stderr.write(f"MISMATCH after {after} part {index} ({kind}): expected {expected.hex()} ")
            sys.stderr.write(f"found {found.hex()}\n")
            sys.stderr.flush()
            os._exit(1)
        return found

    def sum(self) -> str:
        return hashlib.blake2b(b"".join(self.verify(i, "sum") for i in range(len(self.parts)))).hexdigest()[:32]

    def touch(self, count: int, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(count):
            self.verify(rng.randrange(len(self.parts)), "touch")

    def mutate(self, count: int, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(count):
            index = rng.randrange(len(self.parts))
            self.verify(index, "mutate")
            self.parts[index] = mutate(self.parts[index], rng)
            self.expect(index)


def rss_bytes() -> int:
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))


def reply(**fields: object) -> None:
    print(json.dumps({"ok": "error" not in fields, **fields}), flush=True)


def run_command(heap: Heap, name: str, count: int, seed: int) -> None:
    if name == "sum":
        reply(sum=heap.sum())
    elif name == "touch":
        heap.touch(count, seed)
        reply(parts=count)
    elif name == "mutate":
        heap.mutate(count, seed)
        reply(parts=count)
    elif name == "rss":
        reply(rss_bytes=rss_bytes())
    else:
        reply(error="unknown command")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    heap = Heap(options.mib, options.seed)
    reply(ready=True, pid=os.getpid(), parts=len(heap.parts))
    for line in sys.stdin:
        name, *numbers = line.split() or [""]
        if name == "quit":
            reply(quit=True)
            return
        count, seed = ([int(number) for number in numbers] + [0, 0])[:2]
        run_command(heap, name, count, seed)


if __name__ == "__main__":
    main()
