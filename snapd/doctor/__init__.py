"""Whether snapd works here: what it needs of the kernel, the machine, the directories and itself.

Owns the order of the checks. It asks and tries, changes nothing, needs no privilege and no daemon. Knows nothing of
the command line.
"""

from __future__ import annotations

from typing import Final

from snapd.doctor.check import Check, Examination, Finding, Result
from snapd.doctor.host import HOST
from snapd.doctor.kernel import KERNEL
from snapd.doctor.places import PLACES
from snapd.doctor.scene import look_around
from snapd.doctor.software import SOFTWARE

__all__ = ["CHECKS", "Check", "Examination", "Finding", "Result", "examine"]

CHECKS: Final = (*KERNEL, *HOST, *PLACES, *SOFTWARE)


def examine(runtime_dir: str | None = None, state_dir: str | None = None) -> Examination:
    """Do all checks for this user, and for the daemon of `runtime_dir` if one answers there.

    The directories are given as the commands take them. Raises nothing that a machine can cause.
    """
    scene = look_around(runtime_dir, state_dir)
    return Examination(tuple(check.run(scene) for check in CHECKS))
