"""What this machine lets this user do: the device, the kernel's settings, the limits of a daemon.

Owns the table HOST. It reads settings and opens the device; it changes nothing.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import stat
from pathlib import Path
from typing import Final

from snapd.doctor import syscalls
from snapd.doctor.check import Check, Finding
from snapd.doctor.scene import CAP_IPC_LOCK, CAP_SYS_PTRACE, CAP_SYS_RESOURCE, DEVICE, Scene, has, status_of, words

_ENOUGH_FILES: Final = 4096
_FILES_A_PROGRAM: Final = 8
_FILES_OF_ROOT: Final = 1 << 19
_USUAL_MAP_COUNT: Final = 65530
_YAMA_ADMIN: Final = 2
_YAMA_NOBODY: Final = 3
_OVERCOMMIT_NEVER: Final = 2


def _uffd_device(scene: Scene) -> Finding:
    if scene.foreign:
        return Finding("the running daemon's business")
    try:
        os.close(syscalls.userfaultfd_by_device(DEVICE))
    except OSError as error:
        return Finding(f"{DEVICE}: {words(error)}", ok=False, mend=_mend_device(scene, error.errno or 0))
    mode = stat.filemode(Path(DEVICE).stat().st_mode)
    return Finding(f"{DEVICE} ({mode}) can be used")


def _mend_device(scene: Scene, number: int) -> str:
    if number == errno.EACCES:
        if has("setfacl"):
            return scene.as_root(f"setfacl -m u:{scene.user}:rw {DEVICE}")
        return f"{scene.as_root(f'chgrp {os.getegid()} {DEVICE}')} && {scene.as_root(f'chmod g+rw {DEVICE}')}"
    if number in (errno.ENOENT, errno.EPERM):
        return f"in a container: run it with --device {DEVICE}; else boot Linux 6.1 or newer with CONFIG_USERFAULTFD"
    return "boot a newer kernel, built with CONFIG_USERFAULTFD"


def _unprivileged_uffd(_scene: Scene) -> Finding:
    value = _setting("vm/unprivileged_userfaultfd")
    meaning = {"0": "others need the device, as snapd does", "1": "any user may have one"}
    return Finding("not in this kernel" if value is None else f"{value}: {meaning.get(value, 'unknown')}")


def _yama(scene: Scene) -> Finding:
    value = _setting("kernel/yama/ptrace_scope")
    if value is None:
        return Finding("not in this kernel")
    scope = int(value)
    if scope >= _YAMA_NOBODY:
        mend = "take kernel.yama.ptrace_scope=3 out of /etc/sysctl.conf and /etc/sysctl.d, then reboot"
        return Finding(f"ptrace_scope {scope}: nobody may stop a process", ok=False, mend=mend)
    if scope == _YAMA_ADMIN and not scene.can(CAP_SYS_PTRACE):
        mend = scene.as_root("sysctl kernel.yama.ptrace_scope=1")
        return Finding(f"ptrace_scope {scope}: only CAP_SYS_PTRACE may stop a process", ok=False, mend=mend)
    return Finding(f"ptrace_scope {scope}: agents name their daemon" if scope == 1 else f"ptrace_scope {scope}")


def _memlock(scene: Scene) -> Finding:
    if scene.served and scene.daemon is not None:
        if status_of(scene.process()).get("VmLck", "0 kB") == "0 kB":
            return Finding("the running daemon is not locked", ok=False, mend=_restart_as_root(scene))
        return Finding("the running daemon is locked")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    limit = "no limit" if soft == resource.RLIM_INFINITY else f"limit {soft >> 10} KiB"
    if scene.uid != 0:
        return Finding(f"{limit}; only root's daemon is locked", ok=False, mend=_restart_as_root(scene))
    if soft != resource.RLIM_INFINITY and not scene.can(CAP_IPC_LOCK):
        mend = "prlimit --pid $$ --memlock=unlimited, or in a container --ulimit memlock=-1"
        return Finding(f"{limit}, and no CAP_IPC_LOCK", ok=False, mend=mend)
    return Finding(f"{limit}, which does not bind root" if soft != resource.RLIM_INFINITY else limit)


def _restart_as_root(scene: Scene) -> str:
    return scene.as_root("snapd daemon")


def _nofile(scene: Scene) -> Finding:
    soft, hard = _file_limits(scene.process())
    files = hard
    if scene.process() != "self":
        files = soft  # it has raised it as far as it could
    elif scene.uid == 0 and scene.can(CAP_SYS_RESOURCE):
        files = max(hard, _FILES_OF_ROOT)
    detail = f"{files} open files, enough for {files // _FILES_A_PROGRAM} programs"
    if files >= _ENOUGH_FILES:
        return Finding(detail)
    pid = "$$" if scene.process() == "self" else scene.process()
    return Finding(detail, ok=False, mend=scene.as_root(f"prlimit --pid {pid} --nofile={_FILES_OF_ROOT}"))


def _file_limits(process: str) -> tuple[int, int]:
    text = Path(f"/proc/{process}/limits").read_text()
    match = re.search(r"^Max open files +(\d+|unlimited) +(\d+|unlimited)", text, re.MULTILINE)
    soft, hard = match.groups() if match else ("0", "0")
    return _limit(soft), _limit(hard)


def _limit(text: str) -> int:
    return _FILES_OF_ROOT if text == "unlimited" else int(text)


def _max_map_count(scene: Scene) -> Finding:
    count = int(_setting("vm/max_map_count") or "0")
    if count < _USUAL_MAP_COUNT:
        return Finding(f"{count} mappings", ok=False, mend=scene.as_root(f"sysctl vm.max_map_count={_USUAL_MAP_COUNT}"))
    return Finding(f"{count} mappings a process")


def _overcommit(scene: Scene) -> Finding:
    value = int(_setting("vm/overcommit_memory") or "0")
    if value == _OVERCOMMIT_NEVER:
        return Finding("2: every mapping is counted", ok=False, mend=scene.as_root("sysctl vm.overcommit_memory=0"))
    return Finding(f"{value}: a move is not refused for it")


def _setting(name: str) -> str | None:
    try:
        return (Path("/proc/sys") / name).read_text().strip()
    except FileNotFoundError:
        return None


HOST: Final = (
    Check("uffd-device", True, "no userfaultfd can be made that handles the kernel's own accesses", _uffd_device),
    Check("unprivileged-uffd", False, "nothing, as long as the device can be used", _unprivileged_uffd),
    Check("yama", True, "threads cannot be stopped while a piece is moved", _yama),
    Check("memlock", False, "the daemon may be paged out itself, and every fault then waits for that", _memlock),
    Check("nofile", False, "the daemon runs out of descriptors, and forks wait for one", _nofile),
    Check("max-map-count", False, "programs with many mappings are left alone", _max_map_count),
    Check("overcommit", False, "moves fail when the kernel has no memory left to promise", _overcommit),
)
