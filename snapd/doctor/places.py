"""The directories: can a daemon of this user make its sockets and its stores, and is there room for them.

Owns the table PLACES. A directory that is missing is judged by the nearest one above it that is there; none is made.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path
from typing import Final

from snapd.doctor import syscalls
from snapd.doctor.check import Check, Finding
from snapd.doctor.scene import Scene, words

_MIN_FREE_BYTES: Final = 16 << 20
"""With less the daemon begins no dump."""

_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs", "devtmpfs"})
_MOUNT_FIELDS: Final = 3


def _runtime_dir(scene: Scene) -> Finding:
    if scene.runtime_dir is None:
        return Finding(f"none ({scene.runtime_problem})", ok=False, mend="export SNAPD_RUNTIME_DIR=$HOME/.heap-snapd")
    if scene.served:
        return Finding(f"{scene.runtime_dir} is being served")
    return _writable(scene, scene.runtime_dir, "export SNAPD_RUNTIME_DIR=DIR, another directory")


def _state_dir(scene: Scene) -> Finding:
    if scene.foreign:
        return Finding("the running daemon's business")
    return _writable(scene, scene.state_dir, "snapd daemon --state-dir DIR, another directory")


def _writable(scene: Scene, path: Path, other: str) -> Finding:
    there = _nearest(path)
    if not there.is_dir():
        return Finding(f"{there} is no directory", ok=False, mend=scene.as_root(f"mv {_q(there)} {_q(there)}.old"))
    if not os.access(there, os.W_OK | os.X_OK):
        detail = f"{there} may not be written to by {scene.user}"
        return Finding(detail, ok=False, mend=_mend_access(scene, path, there))
    try:
        # Permissions say nothing of file systems like that of /proc.
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        return Finding(f"{there} takes no files ({words(error)})", ok=False, mend=other)
    return Finding(str(path) if there == path else f"{path}, which can be made")


def _mend_access(scene: Scene, path: Path, there: Path) -> str:
    if there == path:
        return scene.as_root(f"chown {scene.user} {_q(path)}")
    return scene.as_root(f"install -d -o {scene.user} {_q(path)}")


def _nearest(path: Path) -> Path:
    """Return the path itself or the nearest one above it that is there; a link that leads nowhere is there."""
    return next(one for one in (path, *path.parents) if os.path.lexists(one))


def _q(path: Path) -> str:
    return shlex.quote(str(path))


def _free_space(scene: Scene) -> Finding:
    if scene.foreign:
        return Finding("the running daemon's business")
    there = _nearest(scene.state_dir)
    found = os.statvfs(there)
    free_bytes = found.f_bavail * found.f_frsize
    detail = f"{free_bytes / (1 << 30):.1f} GiB free in {there}"
    if free_bytes < _MIN_FREE_BYTES:
        return Finding(detail, ok=False, mend="snapd daemon --state-dir DIR, on a disk with more room")
    return Finding(detail)


def _file_system(scene: Scene) -> Finding:
    if scene.foreign:
        return Finding("the running daemon's business")
    there = _nearest(scene.state_dir)
    kind = _kind(there)
    other = "snapd daemon --state-dir DIR, on a disk with ext4, xfs or btrfs"
    if kind in _IN_MEMORY:
        return Finding(f"{there} is on {kind}, which is memory", ok=False, mend=other)
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(f"{there} is on {kind}; not tried")
    try:
        _try_store(there)
    except OSError as error:
        return Finding(f"{kind} cannot give parts of a file back ({words(error)})", ok=False, mend=other)
    return Finding(f"{there} is on {kind}")


def _try_store(directory: Path) -> None:
    """Make a file as a store is one, gone when it is closed, and give a part of it back; OSError when it cannot be."""
    with tempfile.TemporaryFile(dir=directory) as file:
        file.truncate(2 * syscalls.PAGE)
        syscalls.punch_hole(file.fileno())


def _kind(path: Path) -> str:
    """Return the type of the file system that `path` is on, as the mount table names it."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    kind = "a file system of unknown type"
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        fields, _, rest = line.partition(" - ")
        if len(fields.split()) >= _MOUNT_FIELDS and fields.split()[2] == wanted and rest:
            kind = rest.split()[0]
    return kind


PLACES: Final = (
    Check("runtime-dir", True, "the daemon has nowhere to make its sockets", _runtime_dir),
    Check("state-dir", True, "the daemon has nowhere to keep its stores", _state_dir),
    Check("free-space", True, "no dump is begun", _free_space),
    Check("file-system", False, "stores take memory, or keep the room that they once had", _file_system),
)
