"""snapd itself: do its native parts load, which libzstd it uses, and does a daemon of this version answer.

Owns the table SOFTWARE. The only part of the doctor that imports the engine, and that when it is looked at.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from snapd import __version__, directories
from snapd.doctor.check import Check, Finding
from snapd.doctor.scene import Scene, find_daemon

_PIP: Final = f"{sys.executable} -m pip install"


def _engine(_scene: Scene) -> Finding:
    try:
        import snapd.engine  # noqa: F401 - that it loads is the question
    except ImportError as error:
        return Finding(f"does not load ({error})", ok=False, mend=f"{_PIP} --force-reinstall snapd")
    return Finding("loads")


def _libzstd(_scene: Scene) -> Finding:
    try:
        from snapd.engine import codec

        _, source, _ = codec.load()
    except ImportError as error:
        return Finding(f"none ({error})", ok=False, mend=f"{_PIP} zstandard")
    return Finding(source)


def _agent_library(scene: Scene) -> Finding:
    from snapd.agent import library_path

    path = library_path()
    if not Path(path).is_file():
        return Finding(f"{path} is missing", ok=False, mend=f"{_PIP} --force-reinstall snapd")
    if not os.access(path, os.R_OK):
        return Finding(f"{path} may not be read by {scene.user}", ok=False, mend=f"chmod a+r {path}")
    if set(path) & {":", " "}:
        mend = "install snapd in a directory whose path has no colon and no space"
        return Finding(f"{path}: the loader cannot take such a path", ok=False, mend=mend)
    return Finding(path)


def _daemon(scene: Scene) -> Finding:
    daemon = scene.daemon
    if daemon is None:
        return _no_daemon(scene)
    who = f"pid {daemon.pid}, of user {daemon.uid}" if daemon.uid is not None else f"pid {daemon.pid}"
    if not scene.served:
        return Finding(f"{who}: it serves that user alone", ok=False, mend="snapd daemon --runtime-dir DIR")
    if daemon.version != __version__:
        detail = f"{who}: version {daemon.version}, and this is {__version__}"
        return Finding(detail, ok=False, mend=f"kill {daemon.pid} && snapd daemon")
    return Finding(f"{who}, version {daemon.version}")


def _no_daemon(scene: Scene) -> Finding:
    system_wide = Path("/run") / directories.NAME
    problem = scene.daemon_problem if scene.runtime_dir is not None else f"not looked for ({scene.runtime_problem})"
    if scene.runtime_dir != system_wide and find_daemon(system_wide)[0] is not None:
        detail = f"{problem}, but one answers in {system_wide}"
        return Finding(detail, ok=False, mend=f"export SNAPD_RUNTIME_DIR={system_wide}")
    return Finding(problem, ok=False, mend="snapd daemon")


SOFTWARE: Final = (
    Check("engine", True, "no daemon starts", _engine),
    Check("libzstd", True, "no daemon starts: pages cannot be compressed", _libzstd),
    Check("agent-library", True, "no program can cooperate", _agent_library),
    Check("daemon", False, "programs run as they would without snapd, and nothing is dumped", _daemon),
)
