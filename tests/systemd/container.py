"""Starts a real systemd where it sees nothing of the machine: namespaces and a cgroup of its own. A program.

`container.py DIRECTORY` goes on until it is told to end (SIGTERM), or its parent dies, and leaves no process and no
cgroup behind. Owns what must be true before systemd is executed: one that saw the machine's cgroups would move every
process of the machine into units of its own. It exits with LACKING and a sentence where a machine can't have it.

DIRECTORY has: `tree`, what is to be at /run/snapd-tree; `cache`, at /run/snapd-cache; `run`, copied into /run before
systemd begins; `args`, a line each; and gets `init`, with the pid of the namespace's init. This program's interpreter
is at /run/snapd-python, since homes are out of a service's sight.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

LACKING = 77
REFUSED = 78
PATIENCE_S = 10.0
RECIPE_WORDS = "unshare --mount --propagation private --pid --fork --kill-child --cgroup --ipc --uts --net --mount-proc"
RECIPE = tuple(RECIPE_WORDS.split())
# What a container's systemd has no business with, should it try: the clock, modules, the machine's end, its kernel log.
DROPPED_CAPABILITIES = (16, 17, 22, 25, 34)
DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
PR_SET_PDEATHSIG, PR_CAPBSET_DROP = 1, 24


class CannotError(Exception):
    """This machine has no room for a container of its own."""


def prctl(option: int, value: int) -> None:
    """Call prctl(2) with one argument."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def mount(*arguments: str | Path) -> None:
    """Call mount(8)."""
    done = subprocess.run(["mount", "-n", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotError(f"mount {' '.join(map(str, arguments))}: {done.stderr.strip()}")


def own_cgroup() -> str:
    """Return the path of this process's cgroup in the v2 hierarchy, as this cgroup namespace has it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return line[3:]
    raise CannotError("the kernel has no cgroup v2")


# ---- outside


def outside(directory: Path) -> int:
    """Make the cgroup, start the container in it, wait for its end, and remove the cgroup."""
    hierarchy = directory / "hierarchy"
    hierarchy.mkdir()
    try:
        mount("-t", "cgroup2", "none", hierarchy)  # in a mount namespace of this program's own
        parent = hierarchy / own_cgroup().strip("/")
        mine = parent / f"snapd-test-{os.getpid()}"
        mine.mkdir()
    except OSError as error:
        raise CannotError(f"no cgroup of its own: {error}") from error
    container = None
    try:
        command = [*RECIPE, sys.executable, __file__, "--inside", str(directory)]
        container = subprocess.Popen(
            [sys.executable, __file__, "--join", str(mine / "cgroup.procs"), *command], stdin=subprocess.DEVNULL
        )
        init = _child_of(container)
        # Whoever waits for the container stays outside: inside its pid would read as a stranger's.
        (parent / "cgroup.procs").write_text(str(container.pid))
        (directory / "init.new").write_text(str(init))
        (directory / "init.new").rename(directory / "init")
        return container.wait()
    finally:
        if container is not None:
            container.kill()  # --kill-child: with it goes the namespace's init, and with that everything in it
            container.wait()
        _remove(mine)


def _child_of(container: subprocess.Popen[bytes]) -> int:
    children = Path(f"/proc/{container.pid}/task/{container.pid}/children")
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and container.poll() is None:
        with contextlib.suppress(OSError):
            if found := children.read_text().split():
                return int(found[0])
        time.sleep(0.005)
    raise CannotError(f"{' '.join(RECIPE)} does not work here (status {container.poll()})")


def _remove(cgroup: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    with contextlib.suppress(OSError):
        (cgroup / "cgroup.kill").write_text("1")
    while cgroup.exists():
        for below in sorted((one for one in cgroup.rglob("*") if one.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                below.rmdir()
        try:
            cgroup.rmdir()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


# ---- inside


def inside(directory: Path) -> None:
    """Become systemd: nothing of the machine is to be seen or written to."""
    mount("-t", "cgroup2", "none", "/sys/fs/cgroup")
    prepared = (directory / "args").read_text().splitlines()
    _furnish(directory)
    for capability in DROPPED_CAPABILITIES:
        prctl(PR_CAPBSET_DROP, capability)
    environ = {
        "PATH": os.environ["PATH"],
        "container": "snapd-test",
        # Only the units that the test has put there; nothing of this machine's.
        "SYSTEMD_UNIT_PATH": "/run/systemd/system",
        "SYSTEMD_GENERATOR_PATH": "/run/empty",
        "SYSTEMD_ENVIRONMENT_GENERATOR_PATH": "/run/empty",
    }
    refuse_unless_alone()
    os.execve(prepared[0], prepared, environ)


def _furnish(directory: Path) -> None:
    new_run = directory / "new-run"
    new_run.mkdir()
    mount("-t", "tmpfs", "-o", "mode=755", "none", new_run)
    for name in ("snapd-tree", "snapd-cache", "snapd-python", "dev", "empty"):
        (new_run / name).mkdir()
    shutil.copytree(directory / "run", new_run, dirs_exist_ok=True)
    mount("--bind", (directory / "tree").resolve(), new_run / "snapd-tree")
    mount("-o", "remount,bind,ro", new_run / "snapd-tree")
    mount("--bind", sys.base_prefix, new_run / "snapd-python")
    mount("--bind", (directory / "cache").resolve(), new_run / "snapd-cache")
    _make_devices(new_run / "dev")
    mount("--move", new_run, "/run")
    mount("--move", "/run/dev", "/dev")
    for place in ("/tmp", "/var/lib", "/var/tmp"):
        mount("-t", "tmpfs", "-o", "mode=1777" if "tmp" in place else "mode=755", "none", place)
    mount("--bind", "/proc/sys", "/proc/sys")
    mount("-o", "remount,bind,ro", "/proc/sys")  # sysctls are the machine's
    mount("-o", "remount,bind,ro", "/")


def _make_devices(place: Path) -> None:
    number = Path("/dev/userfaultfd").stat().st_rdev
    devices = {**DEVICES, "userfaultfd": (os.major(number), os.minor(number))}
    mount("-t", "tmpfs", "-o", "mode=755", "none", place)
    for name, (major, minor) in devices.items():
        os.mknod(place / name, stat.S_IFCHR | 0o600, os.makedev(major, minor))
        (place / name).chmod(0o600 if name == "userfaultfd" else 0o666)
    (place / "pts").mkdir()  # PrivateDevices= has it bound
    mount("-t", "devpts", "-o", "newinstance,ptmxmode=0666,mode=620", "none", place / "pts")
    (place / "ptmx").symlink_to("pts/ptmx")
    (place / "shm").mkdir()
    (place / "shm").chmod(0o1777)


def refuse_unless_alone() -> None:
    """Exit unless the cgroup tree that is to be seen is this container's own and has nobody else in it."""
    end = time.monotonic() + PATIENCE_S
    while problem := _what_is_wrong():
        if time.monotonic() > end:
            print(f"no systemd is started: {problem}", file=sys.stderr)
            sys.exit(REFUSED)
        time.sleep(0.01)


def _what_is_wrong() -> str:
    root = Path("/sys/fs/cgroup")
    if own_cgroup() != "/":
        return f"its cgroup is {own_cgroup()} and not the root of its namespace"
    if not (root / "cgroup.type").exists():
        return f"{root} is the machine's own tree: only its root has no type"
    if strangers := set((root / "cgroup.procs").read_text().split()) - {str(os.getpid())}:
        return f"somebody else is in its cgroup: {' '.join(sorted(strangers))}"
    if below := [one.name for one in root.iterdir() if one.is_dir()]:
        return f"its cgroup has children: {' '.join(below)}"
    if os.getpid() != 1:
        return "it is not the init of a namespace"
    return ""


def main() -> int:
    """Do what the arguments say."""
    match sys.argv[1:]:
        case ["--join", procs, *command]:
            Path(procs).write_text("0")
            os.execvp(command[0], command)
        case ["--inside", directory]:
            inside(Path(directory))
        case ["--outside", directory]:
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            return outside(Path(directory))
        case [directory]:
            command = ["unshare", "--mount", "--propagation", "private", sys.executable, __file__, "--outside"]
            os.execvp(command[0], [*command, directory])
    return 2


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CannotError as error:
        print(error, file=sys.stderr)
        sys.exit(LACKING)
