"""Who is not attached, and on whose behalf: each is refused by name, stays as it was, and the daemon goes on."""

import contextlib
import json
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapd import errors
from tests.harness import SNAPD, Daemon, wait_until
from tests.peers import lacking, require
from tests.users import NOBODY, as_user

pytestmark = pytest.mark.shares_daemon

CODE_32 = bytes.fromhex("b81d000000cd80ebf7")
"""`again: mov eax, 29 (pause); int 0x80; jmp again`"""
CODE_AT = 0x08048000
NOT_DUMPABLE = (
    "import ctypes, time; assert ctypes.CDLL(None).prctl(4, 0, 0, 0, 0) == 0; print(flush=True); time.sleep(99)"
)


@pytest.fixture
def place() -> Iterator[Path]:
    """Yield a directory that others can enter, where set-uid bits count."""
    with tempfile.TemporaryDirectory(prefix="snapd-test-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@contextlib.contextmanager
def running(argv: list[str], user: int | None = None, *, says: bool = False) -> Iterator[int]:
    """Start a program and end it afterwards; with `says` it has written a line by the time that this returns."""
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, user=user, group=user) as program:
        try:
            assert program.stdout is not None
            if says:
                assert program.stdout.readline() == b"\n"
            yield program.pid
            assert program.poll() is None
        finally:
            program.kill()


def attach_as_nobody(daemon: Daemon, pid: int) -> dict[str, object]:
    """Ask for it as a plain user; returns the error that is said."""
    require("setpriv")
    done = subprocess.run(
        as_user([*SNAPD, "attach", "--json", "--runtime-dir", str(daemon.runtime_dir), str(pid)]),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode, done.stdout
    said: dict[str, object] = json.loads(done.stdout)
    return said


def elf_32(path: Path) -> Path:
    """Write a 32-bit program that sleeps: a header, one segment, ten bytes of code."""
    size = 52 + 32
    ident = b"\x7fELF" + bytes([1, 1, 1]) + bytes(9)
    header = ident + struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, CODE_AT + size, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    end = size + len(CODE_32)
    segment = struct.pack("<IIIIIIII", 1, 0, CODE_AT, CODE_AT, end, end, 5, 4096)
    path.write_bytes(header + segment + CODE_32)
    path.chmod(0o755)
    return path


def test_32_bit_program_is_refused_by_name(daemon: Daemon, place: Path) -> None:
    program = [str(elf_32(place / "old"))]
    try:
        subprocess.run(program, timeout=0.05, check=False)
    except subprocess.TimeoutExpired:
        pass
    except OSError as error:
        lacking(f"the kernel runs no 32-bit programs ({error})")
    with running(program) as pid, daemon.client() as client:
        wait_until(lambda: Path(f"/proc/{pid}/exe").readlink().name == "old", "its exec")
        with pytest.raises(errors.NotAttachable, match="32-bit"):
            client.attach(pid)
    assert not daemon.status().sessions


def test_plain_user_attaches_nothing_of_somebody_else(daemon: Daemon) -> None:
    with running(["sleep", "99"]) as pid:
        assert attach_as_nobody(daemon, pid)["error"] == "io.heapsnapd.NotPermitted"
        assert daemon.session(pid) is None


def test_plain_user_attaches_no_setuid_program(daemon: Daemon, place: Path) -> None:
    sleep = Path(shutil.copy(require("sleep"), place / "sleep"))
    sleep.chmod(0o755 | stat.S_ISUID)
    with running([str(sleep), "99"], NOBODY) as pid:
        wait_until(lambda: "\nUid:\t65534\t0\t" in Path(f"/proc/{pid}/status").read_text(), "its set-uid exec")
        assert attach_as_nobody(daemon, pid)["error"] == "io.heapsnapd.NotPermitted"
        assert daemon.session(pid) is None


def test_plain_user_does_not_attach_what_is_not_dumpable_and_root_does(daemon: Daemon) -> None:
    with running(as_user([sys.executable, "-c", NOT_DUMPABLE]), says=True) as pid:
        said = attach_as_nobody(daemon, pid)
        assert said["error"] == "io.heapsnapd.NotAttachable"
        assert "look" in str(said["parameters"])
        with daemon.client() as client:
            client.attach(pid)
            client.detach(pid)
        assert daemon.session(pid) is None
