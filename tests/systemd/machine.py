"""A machine with a real systemd and snapd's units: started in a container, asked by systemctl, ended with all in it.

Owns how tests reach into it. What makes it a container, and keeps the real machine out of it, is container.py's.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from snapd import Client
from snapd.errors import SnapdError
from snapd.protocol.reports import DumpReport, StatusReport
from tests.peers import lacking
from tests.processes import ASK_S, REAP_S, HarnessError, wait_until
from tests.systemd.container import LACKING
from tests.target import Target, build

ROOT: Final = Path(__file__).parents[2]
HERE: Final = Path(__file__).parent
PREFIX: Final = "/run/snapd-prefix"
OTHER_TREE: Final = "/run/snapd-other"
SYSTEMD: Final = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
START_S: Final = 30.0
TARGETS: Final = ("basic", "multi-user", "shutdown", "sockets", "sysinit", "umount")
"""What units name, and which would pull in the machine's own units: here they are empty."""


def render(name: str, prefix: str = PREFIX) -> str:
    """Return a file of systemd/ as `make install` puts it there for another PREFIX."""
    return (ROOT / "systemd" / name).read_text().replace("/usr/local", prefix)


def systemd() -> str:
    """Return the path of systemd; the calling test is skipped, or fails, where it is not installed."""
    return next((path for path in SYSTEMD if Path(path).exists()), "") or lacking("systemd is not installed")


class Machine:
    """A container with systemd, heap-snapd's units and nothing else; a context manager."""

    def __init__(
        self,
        service: str = "",
        *,
        units: tuple[str, ...] = ("heap-snapd.service", "heap-snapd.socket"),
        package: Path | None = None,
    ) -> None:
        """Start it; `service` is added to the service's [Service] section. No unit is started.

        `package` is a tree with another snapd, which is copied.
        """
        program = systemd()
        if os.geteuid() != 0:
            lacking("a container of its own takes root")
        self.directory = Path(tempfile.mkdtemp(prefix="snapd-machine-"))
        self._furnish(program, service, units, package)
        self._output = (self.directory / "output").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "container.py"), str(self.directory)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )
        self.targets: list[Target] = []
        try:
            self.init = int(wait_until(self._init, "the container's init", START_S))
            self.root = Path(f"/proc/{self.init}/root")
            wait_until(self._is_up, "a systemd that answers", START_S)
        except BaseException:
            self.close()
            raise

    def _furnish(self, program: str, service: str, units: tuple[str, ...], package: Path | None) -> None:
        (self.directory / "tree").symlink_to(ROOT)
        (self.directory / "cache").symlink_to(build("hold").parents[1])
        (self.directory / "args").write_text(f"{program}\n--system\n--unit=multi-user.target\n--log-target=null\n")
        where = self.directory / "run/systemd/system"
        where.mkdir(parents=True)
        for name in TARGETS:
            (where / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        for name in units:
            (where / name).write_text(render(name))
        extra = where / "heap-snapd.service.d"
        extra.mkdir()
        # Where the interpreter's home is out of a service's sight its library is found here.
        settings = ["StandardError=append:/run/snapd.log", "Environment=LD_LIBRARY_PATH=/run/snapd-python/lib", service]
        (extra / "test.conf").write_text("\n".join(["[Service]", *settings, ""]))
        command = self.directory / f"run/{Path(PREFIX).name}/bin/snapd"
        command.parent.mkdir(parents=True)
        command.write_text(_command(*([OTHER_TREE] if package else [])))
        command.chmod(0o755)
        if package:
            place = self.directory / f"run/{Path(OTHER_TREE).name}/snapd"
            shutil.copytree(package / "snapd", place, ignore=shutil.ignore_patterns("__pycache__"))

    def _init(self) -> str | None:
        if self.process.poll() is not None:
            output = (self.directory / "output").read_text()
            if self.process.returncode == LACKING:
                lacking(f"no container of its own: {output.strip()}")
            raise HarnessError(f"the container ended with status {self.process.returncode}: {output}")
        with contextlib.suppress(OSError):
            return (self.directory / "init").read_text()
        return None

    def _is_up(self) -> bool:
        self._init()
        if Path(f"/proc/{self.init}/comm").read_text().strip() != "systemd":
            return False
        return self.systemctl("is-active", "multi-user.target", check=False).stdout.strip() == "active"

    def command(self, *argv: str | int | Path) -> list[str]:
        """Return the command line that runs `argv` in the container."""
        enter = ["nsenter", "-t", str(self.init), "--mount", "--pid", "--cgroup", "--ipc", "--uts", "--net", "--"]
        return [*enter, *map(str, argv)]

    def run(
        self, *argv: str | int | Path, check: bool = True, timeout_s: float = ASK_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the container; with `check`, HarnessError unless it succeeds."""
        done = subprocess.run(self.command(*argv), capture_output=True, text=True, timeout=timeout_s, check=False)
        if check and done.returncode:
            said = f"{done.stdout}{done.stderr}\n{self.log()}"
            raise HarnessError(f"{' '.join(map(str, argv))} exited {done.returncode}: {said}")
        return done

    def systemctl(self, *argv: str, check: bool = True, timeout_s: float = ASK_S) -> subprocess.CompletedProcess[str]:
        """Run systemctl in the container."""
        return self.run("systemctl", *argv, check=check, timeout_s=timeout_s)

    def show(self, name: str, unit: str = "heap-snapd.service") -> str:
        """Return a property of a unit."""
        return self.systemctl("show", "--value", "-p", name, unit).stdout.strip()

    @property
    def runtime_dir(self) -> Path:
        """The service's runtime directory, as it is to be reached from outside."""
        return self.root / "run/heap-snapd"

    def client(self) -> Client:
        """Return a new client of the daemon in the container."""
        return Client(self.runtime_dir)

    def status(self) -> StatusReport:
        """Return what the daemon says."""
        with self.client() as client:
            return client.status()

    def answers(self) -> StatusReport | None:
        """Return what the daemon says, if there is one."""
        with contextlib.suppress(SnapdError, OSError):
            return self.status()
        return None

    def dump(self, pid: int) -> DumpReport:
        """Dump a process of the container."""
        with self.client() as client:
            return client.dump(pid)

    def start(self, name: str, *args: str | int) -> "Inmate":
        """Start tests/targets/NAME.c in the container, under `snapd run`, and wait until it is managed."""
        binary = build(name)
        inside = Path("/run/snapd-cache") / binary.relative_to(binary.parents[1])
        target = Inmate(self.command(f"{PREFIX}/bin/snapd", "run", "--", inside, *args))
        self.targets.append(target)
        target.ready()
        target.find()
        wait_until(lambda: self._manages(target.inner), f"a session of {target.inner}", START_S)
        return target

    def _manages(self, pid: int) -> bool:
        report = self.answers()
        return report is not None and any(one.pid == pid for one in report.sessions)

    def outer(self, pid: int) -> int:
        """Return by which pid the machine knows a process of the container."""
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, StopIteration):
                lines = (entry / "status").read_text().splitlines() if entry.name.isdigit() else []
                mine = next(line for line in lines if line.startswith("NSpid:")).split()
                here = (entry / "ns/pid").readlink() == Path(f"/proc/{self.init}/ns/pid").readlink()
                if mine[-1] == str(pid) and here:
                    return int(entry.name)
        raise HarnessError(f"nobody in the container is {pid}")

    def kill(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a process of the container."""
        os.kill(self.outer(pid), number)

    def log(self) -> str:
        """Return what the service has logged."""
        try:
            return (self.root / "run/snapd.log").read_text(errors="replace")
        except (OSError, AttributeError):
            return ""

    def close(self) -> None:
        """End the container and all in it."""
        for target in self.targets:
            with contextlib.suppress(HarnessError):
                target.kill()
        self.process.terminate()
        self.process.wait(REAP_S + 10)
        for target in self.targets:
            target.close()
        self._output.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it; a failed test's error gets the service's log."""
        if error is not None:
            error.add_note(self.log())
        self.close()


class Inmate(Target):
    """A target in a container: `pid` is that of nsenter, `inner` what the container knows it by."""

    inner = 0

    def find(self) -> None:
        """Find out who it is in there."""
        (child,) = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        line = next(one for one in Path(f"/proc/{child}/status").read_text().splitlines() if one.startswith("NSpid:"))
        self.inner = int(line.split()[-1])


def _command(*first: str) -> str:
    """Return a `snapd` command for the container, where this interpreter's home may be out of sight.

    What is in `first` goes before the tree.
    """
    python = Path(sys.executable).resolve()
    with contextlib.suppress(ValueError):
        python = Path("/run/snapd-python") / python.relative_to(Path(sys.base_prefix).resolve())
    packages = Path(sysconfig.get_path("purelib"))
    with contextlib.suppress(ValueError):
        packages = Path("/run/snapd-tree") / packages.relative_to(ROOT)
    paths = [*first, "/run/snapd-tree", str(packages)]
    return (
        f"#!{python} -sP\nimport sys\n\nsys.path[:0] = {paths}\nfrom snapd.cli.main import main\n\nsys.exit(main())\n"
    )
