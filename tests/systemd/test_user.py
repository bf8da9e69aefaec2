"""The pair of units of a user's own daemon under a real `systemd --user`: started by its socket, restarted, killed and
stopped, with a program whose heap is out."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.driving import MIB
from tests.processes import wait_until
from tests.systemd.machine import SYSTEMD, TARGETS, Inmate, Machine, render
from tests.systemd.test_service import SERVICE, SOCKET, another, is_main, kept, out_bytes, works
from tests.users import NOBODY

MANAGER = "user-manager.service"
UNITS, HOME, RUNTIME = "/run/user-units", "/run/user-home", f"/run/user/{NOBODY}"
UNIT = """
[Unit]
DefaultDependencies=no
[Service]
Type=notify
User={uid}
Group={uid}
Delegate=yes
ExecStart={program} --user --unit=default.target --log-target=null
KillMode=mixed
Environment=HOME={home} XDG_RUNTIME_DIR={runtime} SYSTEMD_UNIT_PATH={units}
Environment=SYSTEMD_GENERATOR_PATH=/run/empty SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/run/empty
"""
OVERRIDE = f"""
[Service]
StandardError=append:{HOME}/snapd.log
Environment=LD_LIBRARY_PATH=/run/snapd-python/lib
TimeoutStopSec=20s
"""


class UserMachine(Machine):
    """A machine in which a plain user has a manager of its own, and what is asked is asked of that."""

    def __init__(self) -> None:
        """Start both."""
        super().__init__(units=())
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def _begin(self) -> None:
        for place in (HOME, RUNTIME, UNITS, f"{UNITS}/heap-snapd.service.d"):
            self._inside(place).mkdir(parents=True)
        for place in (HOME, RUNTIME):
            os.chown(self._inside(place), NOBODY, NOBODY)
            self._inside(place).chmod(0o700)
        for name in (*TARGETS, "default", "paths", "timers"):
            (self._inside(UNITS) / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        for name in (SERVICE, SOCKET):
            (self._inside(UNITS) / name).write_text(render(f"user/{name}"))
        (self._inside(UNITS) / "heap-snapd.service.d/test.conf").write_text(OVERRIDE)
        self._inside("/dev/userfaultfd").chmod(0o666)  # as the group heap-snapd may
        program = next(path for path in SYSTEMD if Path(path).exists())
        text = UNIT.format(program=program, uid=NOBODY, home=HOME, runtime=RUNTIME, units=UNITS)
        (self._inside("/run/systemd/system") / MANAGER).write_text(text)
        for words in (("daemon-reload",), ("start", MANAGER)):
            self.run("systemctl", *words)
        wait_until(lambda: self.show("ActiveState", "default.target") == "active", "the user's manager", 30)

    def command(self, *argv: str | int | Path) -> list[str]:
        """Return the command line that runs `argv` in the container; what is not systemd's own, as the user."""
        if argv[0] == "systemctl" and "--user" not in argv:
            return super().command(*argv)
        enter = super().command("--")[:-2]
        names = [f"HOME={HOME}", f"XDG_RUNTIME_DIR={RUNTIME}"]
        user = ["-S", str(NOBODY), "-G", str(NOBODY), "--", "env", *names]
        return [*enter, *user, *map(str, argv)]

    def systemctl(self, *argv: str, check: bool = True, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Ask the user's manager; the machine's, as long as there is none."""
        user = ["--user"] if hasattr(self, "root") and self._inside(f"{RUNTIME}/systemd").exists() else []
        return self.run("systemctl", *user, *argv, check=check, timeout_s=timeout_s)

    @property
    def runtime_dir(self) -> Path:
        """The daemon's runtime directory."""
        return self._inside(f"{RUNTIME}/heap-snapd")

    def log(self) -> str:
        """Return what the service has logged."""
        try:
            return self._inside(f"{HOME}/snapd.log").read_text(errors="replace")
        except (OSError, AttributeError):
            return ""


@pytest.fixture(scope="module")
def users() -> Iterator[UserMachine]:
    """Yield one."""
    with UserMachine() as one:
        yield one


@pytest.fixture
def hold(users: UserMachine) -> Iterator[Inmate]:
    """Yield the user's program, whose heap is out."""
    users.systemctl("reset-failed")
    users.systemctl("start", SOCKET)
    target = users.start("hold", "--mib", 32)
    users.dump(target.inner)
    yield target
    target.quit()
    users.systemctl("stop", SERVICE, SOCKET)


def test_a_users_service_hands_over_takes_over_and_gives_back(users: UserMachine, hold: Inmate) -> None:
    assert users.show("ActiveState") == "active"
    daemon = users.status().daemon
    assert Path(f"/proc/{users.outer(daemon.pid)}").stat().st_uid == NOBODY
    assert users.show("StatusText").startswith("serving")
    assert kept(users) == 3
    sums = hold.ask("sum")["sum"]
    users.dump(hold.inner)
    users.systemctl("restart", SERVICE)
    is_main(users, another(users, daemon.pid))
    assert out_bytes(users, hold) > 30 * MIB, "nothing was given back"
    daemon = users.status().daemon
    users.kill(daemon.pid)
    assert hold.ask("touch", 100, 3)["ok"]
    is_main(users, another(users, daemon.pid))
    works(users, hold, sums)
    sums = hold.ask("sum")["sum"]
    users.dump(hold.inner)
    users.systemctl("stop", SERVICE)
    assert users.show("ActiveState") in ("inactive", "failed")  # the latter since it was killed once
    assert "everything is back" in users.log()
    assert kept(users) == 0
    assert hold.ask("sum")["sum"] == sums
