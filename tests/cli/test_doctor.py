"""`snapd doctor`: what it finds on this machine, what it says of others, and that it changes nothing."""

import dataclasses
import json
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.cells import cell_len

import snapd
from snapd.cli.doctor import EXIT_UNFIT
from snapd.doctor import CHECKS, host, kernel, places, scene, software, syscalls
from snapd.doctor.check import Check, Examination, Finding, Result
from snapd.doctor.scene import Daemon, Scene
from tests.cli import terminal
from tests.cli.fake import Cli, Completed, Served
from tests.peers import lacking

NAMES = [check.name for check in CHECKS]
NEEDED = {check.name for check in CHECKS if check.needed}
NOBODY = 65534
LABEL = "if it fails:"

# Becomes nobody after all files are read: the interpreter or the package may be in somebody's home. The change of user
# hides /proc/self from the process itself; PR_SET_DUMPABLE brings it back, as an exec by that user would.
AS_NOBODY = f"""
import ctypes, os, sys
import snapd.agent, snapd.cli.doctor, snapd.doctor, snapd.engine.codec
from snapd.cli.main import main
snapd.engine.codec.load()
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
ctypes.CDLL(None).prctl(4, 1)
sys.exit(main(["doctor", *sys.argv[1:]]))
"""


def found(done: Completed) -> dict[str, dict[str, Any]]:
    """Return the checks of a --json run by name; the object has to be whole, and the exit code has to be its own."""
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    value = json.loads(done.stdout)
    assert set(value) == {"ok", "checks"}
    assert done.returncode == (0 if value["ok"] else EXIT_UNFIT)
    assert value["ok"] == all(one["ok"] for one in value["checks"] if one["needed"])
    assert [one["name"] for one in value["checks"]] == NAMES
    return {one["name"]: one for one in value["checks"]}


def as_nobody(cli: Cli, *arguments: str, prefix: tuple[str, ...] = (), **env: str) -> Completed:
    """Run the doctor as a user without any privilege; only root can arrange that."""
    if os.geteuid() != 0:
        lacking("becoming another user takes root")
    command = [*prefix, sys.executable, "-c", AS_NOBODY, *arguments]
    return subprocess.run(command, env={**cli.env, **env}, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def here(tmp_path: Path) -> Scene:
    """Look around in an empty place, where no daemon answers."""
    return scene.look_around(str(tmp_path / "run"), str(tmp_path / "state"))


@pytest.fixture
def shared() -> Iterator[Path]:
    """Yield a directory that every user can reach."""
    with tempfile.TemporaryDirectory(prefix="snapd-doctor-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_names_are_there_once_and_every_check_says_what_is_lost() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]+", name) for name in NAMES)
    assert all(check.lost for check in CHECKS)


def test_root_with_the_device_finds_all_that_is_needed(cli: Cli, tmp_path: Path) -> None:
    if os.geteuid() != 0 or not Path(scene.DEVICE).exists():
        lacking(f"it takes root and {scene.DEVICE}")
    checks = found(cli("doctor", "--json", "--state-dir", str(tmp_path / "state")))
    assert [name for name in NEEDED if not checks[name]["ok"]] == []
    assert all(isinstance(one["detail"], str) and one["detail"] for one in checks.values())
    assert all(one["mend"] for one in checks.values() if not one["ok"])
    assert all(one["mend"] is None for one in checks.values() if one["ok"])
    assert not checks["daemon"]["ok"]
    assert checks["daemon"]["mend"] == "snapd daemon"
    assert "libzstd" in checks["libzstd"]["detail"]


def test_a_user_without_the_device_is_told_which_command_gives_it(cli: Cli, shared: Path) -> None:
    mode = stat.S_IMODE(Path(scene.DEVICE).stat().st_mode) if Path(scene.DEVICE).exists() else 0
    if mode & stat.S_IWOTH:
        lacking(f"{scene.DEVICE} is open to everybody")
    done = as_nobody(cli, "--json", "--state-dir", str(shared / "state"), SNAPD_RUNTIME_DIR=str(shared / "run"))
    checks = found(done)
    assert done.returncode == EXIT_UNFIT
    assert checks["uffd-device"]["detail"] == f"{scene.DEVICE}: Permission denied"
    assert re.match(r"sudo (setfacl|chgrp) .*/dev/userfaultfd", checks["uffd-device"]["mend"])
    assert not checks["uffd-event-fork"]["ok"]
    assert not checks["state-dir"]["ok"]
    assert checks["state-dir"]["mend"].startswith("sudo install -d -o nobody ")
    # The kernel's features can be asked for all the same.
    for name in ("uffd-events", "uffd-wp-async", "uffd-move", "uffd-poison", "pagemap-scan", "ptrace", "kcmp"):
        assert checks[name]["ok"], checks[name]


def test_a_user_whom_roots_daemon_serves_needs_nothing_else(cli: Cli, shared: Path) -> None:
    with Served(shared / "run"):
        checks = found(as_nobody(cli, "--json", SNAPD_RUNTIME_DIR=str(shared / "run")))
    assert checks["daemon"]["detail"] == f"pid {os.getpid()}, of user 0, version {snapd.__version__}"
    # The library may be in root's home.
    assert [name for name in NEEDED - {"agent-library"} if not checks[name]["ok"]] == []
    assert checks["uffd-device"]["detail"] == "the running daemon's business"


def test_a_daemon_of_another_version_is_no_obstacle_but_said(
    served: Served, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = snapd.__version__
    assert found(cli("doctor", "--json"))["daemon"]["ok"]
    monkeypatch.setattr(snapd, "__version__", "9.9.9")
    check = found(cli("doctor", "--json"))["daemon"]
    assert not check["ok"]
    assert not check["needed"]
    assert f"version 9.9.9, and this is {own}" in check["detail"]
    assert check["mend"] == f"kill {os.getpid()} && snapd daemon"
    assert served.backend.calls == [("status", None)] * 2


def test_a_daemon_that_hangs_is_not_waited_for(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene, "ANSWER_S", 0.2)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(shared / "control.sock"))
        listener.listen()
        assert scene.find_daemon(shared) == (None, f"one is there in {shared} and did not answer within 0.2 s")
    assert socket.getdefaulttimeout() is None


def test_something_else_on_the_socket_is_a_finding(shared: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(shared / "control.sock"))
        listener.listen()
        connection = subprocess.Popen(
            [sys.executable, "-c", f"from snapd.doctor.scene import *; print(*find_daemon(Path({str(shared)!r})))"],
            stdout=subprocess.PIPE,
            text=True,
        )
        with listener.accept()[0] as peer:
            peer.recv(1000)
            peer.sendall(b"SSH-2.0-Sorry\r\n\0")
        out, _ = connection.communicate(timeout=60)
    assert out.startswith("None ")
    assert "Traceback" not in out


def test_it_changes_nothing(cli: Cli, tmp_path: Path) -> None:
    state = tmp_path / "deep/below/state"
    before = sorted(tmp_path.rglob("*"))
    cli("doctor", "--state-dir", str(state))
    assert sorted(tmp_path.rglob("*")) == before
    state.mkdir(parents=True)
    cli("doctor", "--state-dir", str(state))
    assert list(state.iterdir()) == []


def test_it_leaves_no_descriptor_mapping_or_child_behind(cli: Cli) -> None:
    """In a process of its own: the probes fork."""
    script = """
import os
from pathlib import Path
from snapd.doctor import CHECKS
from snapd.doctor.scene import look_around
def state():
    return sorted(os.listdir("/proc/self/fd")), Path("/proc/self/task/%d/children" % os.getpid()).read_text()
look = look_around(None, None)
[check.run(look) for check in CHECKS]
before = state()
maps = len(Path("/proc/self/maps").read_text().splitlines())
for _ in range(20):
    [check.run(look_around(None, None)) for check in CHECKS]
assert state() == before, (state(), before)
assert len(Path("/proc/self/maps").read_text().splitlines()) <= maps + 5
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=cli.env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


def squeezed(text: str) -> str:
    """Return the text with all white space as one blank, and figures that may change between two runs as one."""
    return re.sub(r"[0-9.]+ GiB", "N GiB", " ".join(text.split()))


def expected(checks: dict[str, dict[str, Any]], label: Callable[[dict[str, Any]], str]) -> list[str]:
    """Return what a person reads of each check."""
    return [
        squeezed(f"{label(one)} {LABEL} {one['lost']}" + (f" mend it: {one['mend']}" if one["mend"] else ""))
        for one in checks.values()
    ]


def word(check: dict[str, Any]) -> str:
    return "ok" if check["ok"] else "FAIL" if check["needed"] else "warn"


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_the_table_on_a_terminal_is_not_broken(cli: Cli, columns: int) -> None:
    checks = found(cli("doctor", "--json", "--state-dir", "/proc/nowhere"))
    assert checks["state-dir"]["mend"], "one that fails is among them"
    code, text = terminal.run([*cli.argv, "doctor", "--state-dir", "/proc/nowhere"], cli.env, columns=columns)
    assert code == EXIT_UNFIT
    *rows, verdict = terminal.plain(text)
    assert verdict.startswith("snapd does not work here: ")
    assert max(cell_len(row.rstrip()) for row in rows) <= columns
    # Every word is there, in order, and none is cut but paths that are longer than a line.
    table = squeezed("\n".join(rows))
    wanted = " ".join(expected(checks, lambda one: f"{word(one)} {one['name']} {one['detail']}"))
    assert table.replace(" ", "") == wanted.replace(" ", "")
    assert {one for one in wanted.split() if len(one) < 50} <= set(table.split())
    firsts = [row for row in rows if not row.startswith(" ")]
    assert [row.split()[1] for row in firsts] == NAMES
    edge = {len(row) - len(row.lstrip()) for row in rows if row.startswith(" ")}
    assert len(edge) == 1, "what belongs to a check stands below each other"


@pytest.mark.parametrize("columns", [40, 80])
def test_a_path_that_is_too_long_is_folded_and_not_cut(cli: Cli, columns: int) -> None:
    path = "/nonexistent/" + "/".join("x" * 20 for _ in range(12))
    _, text = terminal.run([*cli.argv, "doctor", "--state-dir", path], cli.env, columns=columns)
    rows = terminal.plain(text)[:-1]
    assert max(cell_len(row.rstrip()) for row in rows[: len(rows) - 2]) <= columns
    assert "\u2026" not in text
    assert path in "".join("".join(rows).split())


def test_piped_it_is_a_line_a_check_and_a_verdict(cli: Cli) -> None:
    checks = found(cli("doctor", "--json", "--state-dir", "/proc/nowhere"))
    done = cli("doctor", "--state-dir", "/proc/nowhere")
    assert (done.returncode, done.stderr) == (EXIT_UNFIT, "")
    *lines, verdict = done.stdout.splitlines()
    said = [squeezed(line.replace(";", "")) for line in lines]
    assert said == [
        one.replace(";", "") for one in expected(checks, lambda one: f"{word(one)} {one['name']}: {one['detail']}")
    ]
    assert verdict.startswith("snapd does not work here: ")
    assert "state-dir" in verdict


def test_no_path_drives_the_terminal_or_forges_a_line(cli: Cli) -> None:
    done = cli("doctor", "--state-dir", "/nonexistent/\x1b[31m\nok forged")
    assert len(done.stdout.splitlines()) == len(CHECKS) + 1
    assert "\x1b" not in done.stdout
    _, text = terminal.run([*cli.argv, "doctor", "--state-dir", "/nonexistent/\x1b[31m"], cli.env)
    assert "\\x1b[31m" in text


def test_json_on_a_terminal_is_json_only(cli: Cli) -> None:
    _, text = terminal.run([*cli.argv, "doctor", "--json"], cli.env)
    assert set(json.loads(text)) == {"ok", "checks"}


def test_directories_are_taken_as_by_the_other_commands(served: Served, cli: Cli, tmp_path: Path) -> None:
    run, nowhere = str(served.runtime_dir), str(tmp_path / "nowhere")
    assert found(cli("doctor", "--json", "--runtime-dir", run, SNAPD_RUNTIME_DIR=nowhere))["daemon"]["ok"]
    assert found(cli("--runtime-dir", run, "doctor", "--json", SNAPD_RUNTIME_DIR=nowhere))["daemon"]["ok"]
    assert not found(cli("--runtime-dir", nowhere, "doctor", "--json"))["daemon"]["ok"]
    assert str(tmp_path) in found(cli("doctor", "--json", SNAPD_STATE_DIR=str(tmp_path)))["state-dir"]["detail"]


def test_a_runtime_dir_that_no_socket_fits_in_is_a_finding(cli: Cli) -> None:
    check = found(cli("doctor", "--json", "--runtime-dir", "/" + "x" * 120))["runtime-dir"]
    assert not check["ok"]
    assert "too long" in check["detail"]


def test_help_imports_nothing_that_takes_long(cli: Cli) -> None:
    command = [*cli.argv[:1], "-X", "importtime", *cli.argv[1:], "doctor", "--help"]
    done = subprocess.run(command, env=cli.env, capture_output=True, text=True, timeout=60, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"trio", "rich", "zstandard", "cffi", "ctypes", "snapd.engine", "snapd.doctor"}
    assert f"{EXIT_UNFIT} when" in " ".join(done.stdout.split())


# What other machines would say.


def lacking_features(one: Scene, *names: str) -> Scene:
    left = one.features & ~sum(syscalls.FEATURES[name] for name in names)
    return dataclasses.replace(one, features=left)


@pytest.mark.parametrize(
    ("feature", "check"),
    [
        ("PAGEFAULT_FLAG_WP", "uffd-events"),
        ("EVENT_REMAP", "uffd-events"),
        ("EVENT_REMOVE", "uffd-events"),
        ("EVENT_UNMAP", "uffd-events"),
        ("WP_UNPOPULATED", "uffd-wp-async"),
        ("WP_ASYNC", "uffd-wp-async"),
        ("MOVE", "uffd-move"),
        ("POISON", "uffd-poison"),
        ("EVENT_FORK", "uffd-event-fork"),
    ],
)
def test_a_kernel_without_a_feature(here: Scene, feature: str, check: str) -> None:
    probes = {one.name: one for one in kernel.KERNEL if one.name.startswith("uffd-")}
    failed = {name: one.run(lacking_features(here, feature)) for name, one in probes.items()}
    assert not failed[check].ok
    assert feature in failed[check].finding.detail
    assert failed[check].finding.mend
    assert all(one.ok for name, one in failed.items() if name not in (check, "uffd-event-fork"))


def test_a_kernel_that_cannot_be_asked(here: Scene) -> None:
    mute = dataclasses.replace(here, features=0, features_problem="no userfaultfd to ask (Operation not permitted)")
    finding = next(one for one in kernel.KERNEL if one.name == "uffd-move").probe(mute)
    assert (finding.ok, finding.detail) == (False, "no userfaultfd to ask (Operation not permitted)")


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (PermissionError(1, "Operation not permitted"), "refused (Operation not permitted)"),
        (OSError(25, "Inappropriate ioctl for device"), "the kernel lacks it (Inappropriate ioctl for device)"),
        (None, "does something else than it should"),
    ],
)
@pytest.mark.parametrize("name", ["pagemap-scan", "guards"])
def test_a_call_that_is_filtered_lacking_or_wrong(
    here: Scene, monkeypatch: pytest.MonkeyPatch, error: OSError | None, detail: str, name: str
) -> None:
    def scan(_address: int, _categories: int) -> int:
        if error is not None:
            raise error
        return 0

    monkeypatch.setattr(syscalls, "pagemap_scan", scan)
    result = next(one for one in kernel.KERNEL if one.name == name).run(here)
    assert (result.ok, result.finding.detail) == (False, detail)
    assert result.finding.mend


@pytest.mark.parametrize(
    ("scope", "privileged", "ok"),
    [
        (None, False, True),
        ("0", False, True),
        ("1", False, True),
        ("2", False, False),
        ("2", True, True),
        ("3", True, False),
    ],
)
def test_yama(here: Scene, monkeypatch: pytest.MonkeyPatch, scope: str | None, privileged: bool, ok: bool) -> None:
    monkeypatch.setattr(host, "_setting", lambda _: scope)
    monkeypatch.setattr(Scene, "can", lambda _self, _capability: privileged)
    finding = host._yama(here)
    assert finding.ok == ok
    assert (finding.mend is None) == ok


@pytest.mark.parametrize(("value", "ok"), [("65530", True), ("262144", True), ("1024", False)])
def test_max_map_count(here: Scene, monkeypatch: pytest.MonkeyPatch, value: str, ok: bool) -> None:
    monkeypatch.setattr(host, "_setting", lambda _: value)
    assert host._max_map_count(here).ok == ok


@pytest.mark.parametrize(("value", "ok"), [("0", True), ("1", True), ("2", False)])
def test_overcommit(here: Scene, monkeypatch: pytest.MonkeyPatch, value: str, ok: bool) -> None:
    monkeypatch.setattr(host, "_setting", lambda _: value)
    assert host._overcommit(here).ok == ok


@pytest.mark.parametrize("number", [2, 13, 1, 25])
def test_the_device_missing_forbidden_or_strange(here: Scene, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(_device: str) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(syscalls, "userfaultfd_by_device", refuse)
    finding = host._uffd_device(here)
    assert not finding.ok
    assert os.strerror(number) in finding.detail
    assert finding.mend


@pytest.mark.parametrize("limit", ["100", "5000"])
def test_the_limit_of_open_files(cli: Cli, shared: Path, limit: str) -> None:
    prefix = ("sh", "-c", f'ulimit -n {limit}; exec "$0" "$@"')
    check = found(as_nobody(cli, "--json", prefix=prefix, SNAPD_RUNTIME_DIR=str(shared / "run")))["nofile"]
    assert check["detail"].startswith(f"{limit} open files")
    assert check["ok"] == (limit == "5000")
    if not check["ok"]:
        assert check["mend"] == "sudo prlimit --pid $$ --nofile=524288"


def test_a_state_directory_in_memory_is_said(here: Scene) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or places._kind(shm) != "tmpfs":
        lacking("/dev/shm is no tmpfs")
    finding = places._file_system(dataclasses.replace(here, state_dir=shm / "missing"))
    assert (finding.ok, finding.detail) == (False, "/dev/shm is on tmpfs, which is memory")


def test_a_disk_that_is_full(here: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=4095, f_frsize=4096))
    assert not places._free_space(here).ok
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=4096, f_frsize=4096))
    assert places._free_space(here).ok


@pytest.mark.parametrize("probe", [places._runtime_dir, places._state_dir])
def test_a_place_that_takes_no_files(here: Scene, probe: Callable[[Scene], Finding]) -> None:
    path = Path("/proc/self/nowhere")
    finding = probe(dataclasses.replace(here, runtime_dir=path, state_dir=path))
    assert not finding.ok
    assert finding.mend


@pytest.mark.parametrize("probe", [places._runtime_dir, places._state_dir])
def test_a_file_where_a_directory_should_be(here: Scene, tmp_path: Path, probe: Callable[[Scene], Finding]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        path = tmp_path / name
        finding = probe(dataclasses.replace(here, runtime_dir=path, state_dir=path / "below"))
        assert (finding.ok, finding.detail) == (False, f"{path} is no directory")


def test_native_parts_that_do_not_load(cli: Cli) -> None:
    script = """
import sys
sys.modules["snapd.engine._engine"] = None
from snapd.cli.main import main
sys.exit(main(["doctor", "--json"]))
"""
    command = [sys.executable, "-c", script]
    checks = found(subprocess.run(command, env=cli.env, capture_output=True, text=True, timeout=60, check=False))
    for name in ("engine", "libzstd"):
        assert not checks[name]["ok"]
        assert "_engine" in checks[name]["detail"]


@pytest.mark.parametrize("path", ["/nonexistent/libsnapd-agent.so", "/with space", "/with:colon"])
def test_an_agent_library_that_cannot_be_preloaded(
    here: Scene, shared: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    library = Path(path) if path.startswith("/nonexistent") else shared / path[1:]
    if library.parent.exists():
        library.touch()
    monkeypatch.setattr("snapd.agent.library_path", lambda: str(library))
    finding = software._agent_library(here)
    assert not finding.ok
    assert finding.mend


def test_a_daemon_of_another_plain_user_serves_only_that_one(here: Scene) -> None:
    other = dataclasses.replace(here, uid=1000, daemon=Daemon(1, 1001, snapd.__version__))
    assert not other.served
    assert not software._daemon(other).ok
    assert dataclasses.replace(other, uid=1001).served
    assert dataclasses.replace(other, uid=0).served


def test_a_user_is_led_to_roots_daemon(here: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "find_daemon", lambda path: (Daemon(1, 0, snapd.__version__), str(path)))
    finding = software._daemon(here)
    assert (finding.ok, finding.mend) == (False, "export SNAPD_RUNTIME_DIR=/run/heap-snapd")
    nowhere = dataclasses.replace(here, runtime_dir=None, runtime_problem="no such place")
    assert software._daemon(nowhere).mend == "export SNAPD_RUNTIME_DIR=/run/heap-snapd"


def test_what_nobody_foresaw_is_a_finding_too(here: Scene) -> None:
    def probe(_scene: Scene) -> Finding:
        raise OSError(5, "Input/output error")

    result = Check("x", needed=True, lost="y", probe=probe).run(here)
    assert (result.ok, result.fatal) == (False, True)
    assert result.finding.detail == "cannot be looked at (Input/output error)"


def test_only_what_is_needed_decides() -> None:
    def result(*, needed: bool, ok: bool) -> Result:
        return Result(Check("x", needed, "y", lambda _: Finding("")), Finding("z", ok=ok))

    assert Examination((result(needed=True, ok=True), result(needed=False, ok=False))).ok
    assert not Examination((result(needed=False, ok=True), result(needed=True, ok=False))).ok


def test_numbers_and_layouts_are_those_of_the_agent(tmp_path: Path) -> None:
    """The C header is the one place where they were compared with the kernel's."""
    numbers = {f"UFFD_FEATURE_{name}": bit for name, bit in syscalls.FEATURES.items()}
    for name in ("UFFD_API", "USERFAULTFD_IOC_NEW", "UFFDIO_API", "PAGEMAP_SCAN", "PROCMAP_QUERY", "PAGE_IS_PRESENT",
                 "PAGE_IS_GUARD", "MADV_GUARD_INSTALL", "MREMAP_MAYMOVE", "MREMAP_DONTUNMAP"):  # fmt: skip
        numbers[name] = getattr(syscalls, name)
    sizes = {"uffd_api": syscalls._UFFDIO_API, "pm_scan": syscalls._PM_SCAN, "page_region": syscalls._PAGE_REGION,
             "procmap_query": syscalls._PROCMAP_QUERY}  # fmt: skip
    asserts = [f'_Static_assert(SNAPD_{name} == {value}ULL, "{name}");' for name, value in numbers.items()]
    asserts += [f'_Static_assert(sizeof(struct snapd_{name}) == {one.size}, "");' for name, one in sizes.items()]
    calls = {"kcmp": syscalls._NR_KCMP, "userfaultfd": syscalls._NR_USERFAULTFD}
    asserts += [f'_Static_assert(SYS_{name} == {number}, "");' for name, number in calls.items()]
    source = tmp_path / "numbers.c"
    source.write_text("\n".join(["#include <sys/syscall.h>", '#include "uapi.h"', *asserts]))
    agent = Path(snapd.__file__).parent / "agent"
    command = [os.environ.get("CC", "cc"), "-fsyntax-only", "-Werror", f"-I{agent}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
