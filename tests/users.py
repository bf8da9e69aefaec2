"""Programs as another user, in a mount namespace of their own where that user can reach what they need.

The interpreter and the tree may lie below a directory that only its owner can enter, and /dev/userfaultfd is root's. In
the namespace both are shown as they must be; nobody outside sees any of it. Takes root.
"""

import os
import shlex
import sys
from pathlib import Path
from typing import Final

from tests.harness import SNAPD

NOBODY: Final = 65534
DEVICE: Final = Path("/dev/userfaultfd")
_ROOT: Final = Path(__file__).parents[1]
_STASH: Final = "/mnt"


def as_user(argv: list[str], uid: int = NOBODY, *, device: bool = False) -> list[str]:
    """Return what runs `argv` as `uid` by executing it; with `device` it may open /dev/userfaultfd."""
    lines = ["set -e", f"mount -t tmpfs -o mode=0755 snapd-test {_STASH}"]
    hidden: dict[Path, list[Path]] = {}
    for path in {Path(sys.base_prefix), Path(sys.prefix), _ROOT}:
        if above := _closed_to_others(path):
            hidden.setdefault(above, []).append(path)
    for number, (above, paths) in enumerate(hidden.items()):
        stashes = [f"{_STASH}/{number}-{at}" for at in range(len(paths))]
        for path, stash in zip(paths, stashes, strict=True):
            lines += [f"mkdir {stash}", f"mount --rbind {shlex.quote(str(path))} {stash}"]
        lines.append(f"mount -t tmpfs -o mode=0755 snapd-test {shlex.quote(str(above))}")
        for path, stash in zip(paths, stashes, strict=True):
            quoted = shlex.quote(str(path))
            lines += [f"mkdir -p {quoted}", f"mount --rbind {stash} {quoted}"]
    if device:
        number = DEVICE.stat().st_rdev
        lines += [
            f"mknod -m 0666 {_STASH}/device c {os.major(number)} {os.minor(number)}",
            f"mount --bind {_STASH}/device {DEVICE}",
        ]
    lines.append(f'cd /; exec setpriv --reuid={uid} --regid={uid} --clear-groups -- "$@"')
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", "\n".join(lines), "sh", *argv]


def _closed_to_others(path: Path) -> Path | None:
    """Return the uppermost directory above `path` that others cannot enter."""
    return next((above for above in reversed(path.parents) if not above.stat().st_mode & 0o001), None)


def run_as_user(runtime_dir: Path, argv: list[str], uid: int = NOBODY) -> list[str]:
    """Return what runs `argv` under `snapd run` as `uid`."""
    return as_user([*SNAPD, "run", "--runtime-dir", str(runtime_dir), "--", *argv], uid)
