"""A daemon whose engine has fault points, and the plan of what happens at them.

Owns the tree that such a daemon runs from: the package as it is, but for its engine, which is compiled for this. Knows
nothing of what a test is about.
"""

from __future__ import annotations

import enum
import errno
import mmap
import os
import re
import runpy
import struct
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from tests.harness import HarnessError, wait_until

ROOT: Final = Path(__file__).parents[2]
HEADER: Final = ROOT / "snapd/engine/faultpoint.h"
FAULTS: Final = ROOT / "build/faults"
TREE: Final = FAULTS / "tree"
FOR_EVER: Final = 0xFFFFFFFF
MAX_STEPS: Final = 8

_FIRST: Final = struct.Struct("I")
_STEP: Final = struct.Struct("5I")
_PASSES: Final = _FIRST.size + MAX_STEPS * _STEP.size

NUMBERS: Final = {name: int(number) for name, number in re.findall(r"\bFP_(\w+) = (\d+)", HEADER.read_text())}
"""The points by name, but for how many there are."""
COUNT: Final = NUMBERS.pop("COUNT")


class Action(enum.IntEnum):
    """What happens at a point: `enum action` of faultpoint.c."""

    KILL = 1
    STOP = 2
    DELAY = 3
    SHORT = 4
    ERROR = 5


class Step(NamedTuple):
    """At a point, after `skip` passes, an action, `times` times; `value` is an errno, or milliseconds."""

    point: str
    action: Action = Action.KILL
    value: int = 0
    skip: int = 0
    times: int = 1


def fails(point: str, error: int = errno.EIO, *, times: int = FOR_EVER, skip: int = 0) -> Step:
    """Return the step in which a point is told of an error."""
    return Step(point, Action.ERROR, error, skip, times)


class Plan:
    """The plan's file, as the daemons of a test have it mapped."""

    def __init__(self, path: Path) -> None:
        """Make it, with no step."""
        self._path = path
        self._steps: tuple[Step, ...] = ()
        path.write_bytes(bytes(mmap.PAGESIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), mmap.PAGESIZE)

    def environment(self) -> dict[str, str]:
        """Return what makes a daemon one with fault points."""
        return {"SNAPD_FAULT": str(self._path), "PYTHONPATH": str(make_tree()), "PYTHONSAFEPATH": "1"}

    def arm(self, *steps: Step) -> None:
        """Replace the plan; each step is next when the one before it has happened as often as it says."""
        self._map[: _FIRST.size] = _FIRST.pack(MAX_STEPS)
        packed = b"".join(_STEP.pack(NUMBERS[one.point], *one[1:3], *one[3:]) for one in steps)
        self._map[_FIRST.size : _PASSES] = packed.ljust(_PASSES - _FIRST.size, b"\0")
        self._map[_PASSES : _PASSES + COUNT * _FIRST.size] = bytes(COUNT * _FIRST.size)
        self._steps = steps
        self._map[: _FIRST.size] = _FIRST.pack(0)

    def disarm(self) -> None:
        """Let nothing happen any more; a delay ends now."""
        self._map[: _FIRST.size] = _FIRST.pack(MAX_STEPS)

    def passes(self, point: str) -> int:
        """Return how often a point was come to since the plan was made."""
        return int(_FIRST.unpack_from(self._map, _PASSES + NUMBERS[point] * _FIRST.size)[0])

    @property
    def happened(self) -> int:
        """How many steps have."""
        return min(len(self._steps), int(_FIRST.unpack_from(self._map)[0]))

    def wait(self, steps: int | None = None, timeout_s: float = 30) -> None:
        """Wait until so many steps have happened, or all."""
        wanted = len(self._steps) if steps is None else steps
        wait_until(lambda: self.happened >= wanted, f"what is to happen at {self._steps[wanted - 1].point}", timeout_s)

    def close(self) -> None:
        """Close it."""
        self._map.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


_made: list[Path] = []


def make_tree() -> Path:
    """Compile the engine with fault points, unless that was done, and return where such a package is."""
    if not _made:
        hook: dict[str, Any] = runpy.run_path(str(ROOT / "hatch_build.py"))
        (module,) = hook["build"](faults=True)
        engine = TREE / "snapd/engine"
        engine.mkdir(parents=True, exist_ok=True)
        _link_all(ROOT / "snapd", TREE / "snapd", but={"engine", "__pycache__"})
        _link_all(ROOT / "snapd/engine", engine, but={module.name, "__pycache__"})
        _link(ROOT / module, engine / module.name)
        _link(Path(__file__).with_name("customize.py"), TREE / "sitecustomize.py")
        if not any(engine.glob("_engine.*.so")):
            raise HarnessError("the engine with fault points was not made")
        _made.append(TREE)
    return _made[0]


def _link_all(source: Path, place: Path, *, but: set[str]) -> None:
    for entry in source.iterdir():
        if entry.name not in but:
            _link(entry, place / entry.name)


def _link(target: Path, place: Path) -> None:
    """Also where two runs of the tests do it at the same time."""
    scratch = place.with_name(f"{place.name}.{os.getpid()}")
    scratch.symlink_to(target)
    scratch.replace(place)
