"""Fault points of the daemon's Python, around the system calls that give a snapshot its file.

Every interpreter imports it as sitecustomize where the tree of plan.py is in its path, and nowhere else. The engine's
own points are in C; what happens at one is faultpoint.c's, for both.
"""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITE, SYNC, NAMING, NAMED = 80, 81, 82, 83
"""Their numbers in faultpoint.h."""


def _wrap(name: str, before: int, after: int = 0) -> None:
    call: Callable[..., Any] = getattr(os, name)

    def with_points(*args: Any, **options: Any) -> Any:
        _come_to(before)
        result = call(*args, **options)
        if after:
            _come_to(after)
        return result

    setattr(os, name, with_points)


def _come_to(point: int) -> None:
    if error := _points.fault_point(point):
        raise OSError(-error, os.strerror(-error))


if "SNAPD_FAULT" in os.environ:
    (_engine,) = (Path(__file__).parent / "snapd/engine").glob("_engine.*.so")
    _points = ctypes.CDLL(str(_engine))
    _wrap("pwrite", WRITE)
    _wrap("fsync", SYNC)
    _wrap("link", NAMING, NAMED)
