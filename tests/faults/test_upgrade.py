"""`snapd upgrade`: the daemon is replaced under load, and a version that is no good replaces nobody."""

import contextlib
import json
import os
import shutil
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

import snapd
from snapd.errors import NotUpgraded, SnapdError
from tests.faults.deaths import Dumping, allow_deaths
from tests.faults.plan import Action, Plan, Step
from tests.harness import Daemon, Spawner, wait_until
from tests.kernel.driving import MIB, Figures, out_bytes

TIMES = 4
LONGEST_S = 1.0
DELAY_MS = 1500
CALLS = {"attach": 5, "detach": 1}  # of ours that the thread has made by then
PACKAGE = Path(snapd.__file__).parent

OTHER_FORMAT = """
print('{"version": "9", "reads": {"registry": ["HSNAPKR1"], "page map": ["HSNAPPM1.77"], "store": ["2"]}}')
"""
BROKEN = {
    "does not start: ImportError: no such library": "raise ImportError('no such library')",
    "does not start: Error: No such option: --check": "raise SystemExit('Error: No such option: --check')",
    "does not say what it can take over": "print('hello')",
    "version 9 does not read what this one leaves: page map": OTHER_FORMAT,
}


@pytest.mark.timeout(180)
def test_the_daemon_is_replaced_under_load(daemon: Daemon, spawn: Spawner, figures: Figures) -> None:
    hold = spawn("hold", "--mib", 48)
    churns = [
        spawn(
            "churn", "--seconds", 150, "--mib", 16, "--threads", 2, "--pace", 1000, "--seed", seed, "--ops", "fork=30"
        )
        for seed in range(2)
    ]
    before = hold.ask("sum")["sum"]
    daemon.dump(hold.pid)
    out = out_bytes(daemon, hold.pid)
    assert out > 40 * MIB
    allow_deaths(daemon)
    daemon.expect_successors()
    done, unserved_s = Counter[str](), []
    with ExitStack() as dumps:
        for churn in churns:
            dumps.enter_context(Dumping(daemon, churn, done))
        for _ in range(TIMES):
            status = daemon.status().daemon
            report = daemon.snapd_json("upgrade")
            assert (report["pid"], report["next_pid"]) == (status.pid, status.keeper_pid)
            assert report["next_pid"] == daemon.status().daemon.pid
            unserved_s.append(report["unserved_s"])
            assert {hold.pid, *(churn.pid for churn in churns)} <= {one.pid for one in daemon.status().sessions}
            assert out_bytes(daemon, hold.pid) == out
            for churn in churns:  # the next daemon does what the former one did
                daemon.wait_for_session(churn.pid)
    assert hold.ask("sum")["sum"] == before
    for churn in churns:
        churn.signal(signal.SIGTERM)
        assert churn.result(60)["errors"] == 0
    figures.note(upgrades=TIMES, longest_unserved_ms=1000 * max(unserved_s), **done)
    assert max(unserved_s) < LONGEST_S
    assert done["complete"] > 0
    assert "WARNING: the daemon has died" not in daemon.log()


@pytest.mark.timeout(180)
def test_a_version_that_is_no_good_replaces_nobody(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    package = tmp_path / "snapd"
    package.symlink_to(PACKAGE)
    with Daemon(wrap=lambda words: ["env", "-C", str(tmp_path), *words]) as daemon, Spawner(daemon) as spawn:
        hold = spawn("hold", "--mib", 16)
        before = hold.ask("sum")["sum"]
        daemon.dump(hold.pid)
        out = out_bytes(daemon, hold.pid)
        package.unlink()
        package.mkdir()
        (package / "__init__.py").touch()
        for reason, text in BROKEN.items():
            (package / "__main__.py").write_text(text)
            done = daemon.snapd("upgrade", "--json", check=False)
            assert done.returncode == NotUpgraded.exit_code
            assert reason in json.loads(done.stdout)["message"]
            assert daemon.status().daemon.pid == daemon.process.pid
        assert out_bytes(daemon, hold.pid) == out
        shutil.rmtree(package)
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        init = package / "__init__.py"
        init.write_text(init.read_text().replace(snapd.__version__, "9.8.7"))
        allow_deaths(daemon)
        daemon.expect_successors()
        report = daemon.snapd_json("upgrade")
        assert (report["version"], report["next_version"]) == (snapd.__version__, "9.8.7")
        assert daemon.status().daemon.version == "9.8.7"
        assert out_bytes(daemon, hold.pid) == out
        assert hold.ask("sum")["sum"] == before


@pytest.mark.timeout(120)
@pytest.mark.parametrize("way", ["upgrade", "signal"])
@pytest.mark.parametrize("doing", ["attach", "detach"])
def test_calls_of_a_target_are_not_cut(tmp_path: Path, doing: str, way: str) -> None:
    """The thread that makes our calls is put back by nobody but the daemon."""
    with Plan(tmp_path / "plan") as plan, Daemon(env=plan.environment()) as daemon, Spawner() as alone:
        allow_deaths(daemon)
        daemon.expect_successors()
        hold = alone("hold", "--mib", 8)
        before, served_by = hold.ask("sum")["sum"], daemon.pid
        if doing == "detach":
            daemon.snapd("attach", hold.pid)
        plan.arm(Step("INJECTING", Action.DELAY, DELAY_MS, skip=CALLS[doing]))
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(daemon.snapd, doing, hold.pid, check=False)
            plan.wait()
            if way == "upgrade":
                daemon.snapd("upgrade")
            else:
                os.kill(served_by, signal.SIGUSR2)
            asked.result(60)
        wait_until(lambda: serving(daemon) not in (0, served_by), "a successor", 30)
        assert hold.ask("sum")["sum"] == before
        if doing == "attach":
            daemon.wait_for_session(hold.pid)  # it need not be asked for again
            daemon.dump(hold.pid)
            assert hold.ask("sum")["sum"] == before


def serving(daemon: Daemon) -> int:
    """Return who serves, or 0."""
    with contextlib.suppress(SnapdError, OSError):
        return daemon.pid
    return 0
