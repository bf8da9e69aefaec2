"""`make install` below DESTDIR: what it puts there works in place, needs nothing of the tree, and can be removed."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import snapd
from tests.peers import lacking, require

ROOT = Path(__file__).parents[2]
RUN_S = 110.0

pytestmark = pytest.mark.slow


def make(*arguments: str) -> None:
    """Run make in the tree; what it says is shown where it fails."""
    done = subprocess.run(
        ["make", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=RUN_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def destdir() -> Iterator[Path]:
    """Install once; a name with a blank in it, as a packager's may have."""
    require("make")
    if not os.access(ROOT, os.W_OK):
        lacking(f"{ROOT} cannot be built in")
    with tempfile.TemporaryDirectory(prefix="snapd install-") as name:
        Path(name).chmod(0o755)
        make("install", f"DESTDIR={name}", "PREFIX=/usr")
        yield Path(name)


def run(destdir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run what was installed, where the tree is out of sight."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(destdir), "SNAPD_RUNTIME_DIR": str(destdir / "run")}
    return subprocess.run(
        [destdir / "usr/bin/snapd", *arguments],
        cwd=destdir,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_runs_in_place(destdir: Path) -> None:
    done = run(destdir, "--version")
    assert (done.stdout, done.stderr) == (f"snapd {snapd.__version__}\n", "")


def test_it_finds_everything_in_its_own_directory(destdir: Path) -> None:
    checks = {one["name"]: one for one in json.loads(run(destdir, "doctor", "--json").stdout)["checks"]}
    assert checks["engine"]["ok"]
    assert checks["libzstd"]["ok"]
    # It says so itself: the dynamic loader takes no path with a blank in it for a preload.
    assert checks["agent-library"]["detail"].startswith(f"{destdir}/usr/lib/heap-snapd/snapd/agent/libsnapd-agent.so")


def test_header_library_and_licence_are_where_others_look(destdir: Path, tmp_path: Path) -> None:
    library = destdir / "usr/lib/libsnapd-agent.so"
    assert library.resolve() == (destdir / "usr/lib/heap-snapd/snapd/agent/libsnapd-agent.so").resolve()
    assert not library.readlink().is_absolute(), "it has to point to the same place when DESTDIR is gone"
    assert (destdir / "usr/include/snapd.h").read_bytes() == (ROOT / "snapd/agent/snapd.h").read_bytes()
    assert (destdir / "usr/share/doc/heap-snapd/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    source = tmp_path / "linked.c"
    source.write_text("#include <snapd.h>\nint main(void) { return snapd_leave() == -3 ? 0 : 1; }\n")
    program = tmp_path / "linked"
    flags = [f"-I{destdir}/usr/include", f"-L{destdir}/usr/lib", "-o", str(program), str(source), "-lsnapd-agent"]
    subprocess.run([os.environ.get("CC", "cc"), *flags], check=True, timeout=60)
    environ = {**os.environ, "LD_LIBRARY_PATH": f"{destdir}/usr/lib"}
    assert subprocess.run([program], env=environ, timeout=60, check=False).returncode == 0, "no agent runs: -ESRCH"


def test_programs_of_the_bench_came_along_and_can_be_executed(destdir: Path) -> None:
    for name in ("load", "raw"):
        assert os.access(destdir / "usr/lib/heap-snapd/snapd/bench" / name, os.X_OK)


def test_everybody_may_read_it_and_nothing_names_the_directory_it_was_made_in(destdir: Path) -> None:
    assert not re.search(str(destdir), (destdir / "usr/bin/snapd").read_text())
    for path in (destdir / "usr").rglob("*"):
        mode = path.stat().st_mode
        assert mode & 0o004, path
        assert not mode & 0o022, path
        if path.suffix == ".pyc":
            assert str(destdir).encode() not in path.read_bytes(), path
    assert list((destdir / "usr/lib/heap-snapd/snapd").rglob("*.pyc")), "compiled: no user could do that later"
    assert not (destdir / "usr/lib/heap-snapd/bin").exists()


OF_SYSTEMD = {
    "system/heap-snapd.service": "heap-snapd.service",
    "system/heap-snapd.socket": "heap-snapd.socket",
    "user/heap-snapd.service": "user/heap-snapd.service",
    "user/heap-snapd.socket": "user/heap-snapd.socket",
}
OF_OTHERS = {
    "tmpfiles.d/heap-snapd.conf": "heap-snapd.tmpfiles",
    "sysusers.d/heap-snapd.conf": "heap-snapd.sysusers",
    "udev/rules.d/60-heap-snapd.rules": "60-heap-snapd.rules",
}


def test_units_and_what_goes_with_them_are_where_systemd_looks(destdir: Path) -> None:
    places = {**{f"systemd/{place}": name for place, name in OF_SYSTEMD.items()}, **OF_OTHERS}
    for place, name in places.items():
        wanted = (ROOT / "systemd" / name).read_text().replace("/usr/local", "/usr")
        assert (destdir / "usr/lib" / place).read_text() == wanted, place
    assert {path.name for path in (ROOT / "systemd").rglob("*.*")} == {Path(name).name for name in places.values()}


def test_uninstalling_leaves_nothing_but_what_is_not_ours(destdir: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="snapd-install-") as name:
        copy = Path(name) / "root"
        shutil.copytree(destdir, copy, symlinks=True)
        other = copy / "usr/bin/other"
        other.touch()
        make("uninstall", f"DESTDIR={copy}", "PREFIX=/usr")
        assert [path for path in copy.rglob("*") if not path.is_dir()] == [other]
        assert not (copy / "usr/lib/heap-snapd").exists()
        assert not (copy / "usr/share/doc/heap-snapd").exists()


@pytest.mark.parametrize("target", ["install", "uninstall"])
def test_a_prefix_that_is_not_absolute_is_refused(target: str, tmp_path: Path) -> None:
    require("make")
    done = subprocess.run(
        ["make", "-C", str(ROOT), target, f"DESTDIR={tmp_path}", "PREFIX=usr"],
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )
    assert done.returncode != 0
    assert "PREFIX has to be an absolute path" in done.stderr
    assert list(tmp_path.iterdir()) == []
