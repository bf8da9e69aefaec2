"""The command line over a real control socket: what it prints, as what it exits, and how fast."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest
from rich.cells import cell_len

import snapd
from snapd.cli.main import COMMANDS
from snapd.errors import NotUpgraded
from tests.cli import terminal
from tests.cli.fake import BROKEN, CHILD, DUMP, GOOD, MIB, REFUSED, SESSIONS, SLOW, WAIT_S, Cli, Completed, Served

if TYPE_CHECKING:
    from pathlib import Path

DUMP_KEYS = {
    "pid", "moved_bytes", "stored_bytes", "zero_bytes", "clean_bytes", "skipped_bytes", "freed_bytes", "duration_s",
    "stops", "longest_stop_us", "sum_stop_us",
}  # fmt: skip
SESSION_KEYS = {
    "pid", "uid", "comm", "state", "resident_bytes", "swapped_bytes", "stored_bytes", "faults", "fault_p50_us",
    "fault_p99_us",
}  # fmt: skip


def only_object(done: Completed) -> dict[str, Any]:
    """Return the one JSON object on stdout."""
    assert done.stdout.count("\n") == 1
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_help_comes_at_once_and_names_every_command(cli: Cli) -> None:
    took_s = []
    for _ in range(5):
        before = os.times()
        done = cli("--help")
        after = os.times()
        # It waits for nothing, so what it computes is what it takes; a busy machine would add its own.
        took_s.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0
        assert set(COMMANDS) <= set(done.stdout.split())
    assert min(took_s) < 0.2


def test_help_imports_nothing_that_takes_long(cli: Cli) -> None:
    for arguments in (["--help"], ["dump", "--help"], ["status", "--help"], ["daemon", "--help"]):
        command = [*cli.argv[:1], "-X", "importtime", *cli.argv[1:], *arguments]
        done = subprocess.run(command, env=cli.env, capture_output=True, text=True, timeout=60, check=True)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert not imported & {"trio", "rich", "zstandard", "cffi", "snapd.engine", "snapd.agent"}


@pytest.mark.parametrize("name", COMMANDS)
def test_list_of_commands_says_what_each_command_says_of_itself(name: str) -> None:
    assert import_module(f"snapd.cli.{name}").command.short_help == COMMANDS[name]


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout == f"snapd {snapd.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["dump"],
        ["dump", "x"],
        ["dump", "0"],
        ["dump", "-1"],
        ["dump", "--level", "99", "1"],
        ["run"],
        ["dump", "--keep", "a/b", "1"],
        ["dump", "--keep", "..", "1"],
        ["dump", "--keep", "a", "1", "2"],
        ["verify"],
        ["inspect"],
        ["verify", "a", "b"],
        ["daemon", "--min-free", "much"],
        ["daemon", "--min-free", "-1"],
    ],
)
def test_wrong_usage_exits_2_with_a_line_that_says_so(cli: Cli, arguments: list[str]) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage: snapd" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("served")
def test_dump_prints_plain_lines_when_piped(cli: Cli) -> None:
    done = cli("dump", str(GOOD))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "dumped 100 in 1.25 s: 100.0 MiB moved, 99.0 MiB freed",
        "  30.0 MiB stored, ratio 3.00; 4 stops, the longest 1.3 ms, 4.2 ms in all",
        "  3.0 MiB left alone (stack 2.0 MiB, locked 1.0 MiB)",
        "  4.0 KiB held by the kernel for direct I/O, and put back",
        "  1 piece put off because a thread did not stop in time",
    ]


def test_dump_gives_its_level_to_the_daemon(served: Served, cli: Cli) -> None:
    assert cli("dump", "--level", "-3", str(GOOD)).returncode == 0
    assert served.backend.levels == [-3]


def test_a_dump_that_is_kept_says_where(served: Served, cli: Cli) -> None:
    done = cli("dump", "--keep", "before-upgrade", str(GOOD))
    assert done.stdout.splitlines()[-1] == ("  kept as /var/lib/heap-snapd/snapshots/0/before-upgrade.snapd, 31.0 MiB")
    assert only_object(cli("dump", "--json", "--keep", "x", str(GOOD)))["snapshot_bytes"] == 31 * MIB
    assert served.backend.kept == ["before-upgrade", "x"]


@pytest.mark.usefixtures("served")
def test_restore_and_detach_print_a_line_each(cli: Cli) -> None:
    assert cli("restore", str(GOOD)).stdout == "restored 100: 64.0 MiB back in 500.0 ms\n"
    assert cli("detach", str(GOOD), str(CHILD)).stdout == "detached 100\ndetached 101\n"


@pytest.mark.usefixtures("served")
def test_json_has_the_keys_of_the_documentation(cli: Cli) -> None:
    dump = only_object(cli("dump", "--json", str(GOOD)))
    assert set(dump) >= DUMP_KEYS
    assert dump == DUMP.to_json()
    assert only_object(cli("restore", "--json", str(GOOD))) == {
        "pid": GOOD,
        "restored_bytes": 64 * MIB,
        "duration_s": 0.5,
    }
    assert only_object(cli("detach", "--json", str(GOOD))) == {"pid": GOOD}
    status = only_object(cli("status", "--json"))
    assert set(status) == {"daemon", "sessions", "totals"}
    assert set(status["daemon"]) == {"pid", "keeper_pid", "version", "unserved_s"}
    assert all(set(session) >= SESSION_KEYS for session in status["sessions"])
    assert status["sessions"][0]["swapped_bytes"] == SESSIONS[0].swapped_bytes


def test_several_pids_are_one_object_and_the_first_failure_decides_the_exit_code(served: Served, cli: Cli) -> None:
    done = cli("dump", "--json", str(GOOD), "201", "203", str(GOOD), str(CHILD))
    assert done.returncode == REFUSED[201].exit_code
    assert done.stderr.splitlines() == [f"snapd: {REFUSED[pid].render()}" for pid in (201, 203)]
    first, second, third, last = only_object(done)["results"]
    assert (first["pid"], last["pid"], last["moved_bytes"]) == (GOOD, CHILD, DUMP.moved_bytes)
    assert second == {
        "pid": 201,
        "error": "io.heapsnapd.NotCooperating",
        "parameters": {"pid": 201},
        "message": REFUSED[201].render(),
        "exit_code": REFUSED[201].exit_code,
    }
    assert third["pid"] == 203
    assert served.backend.calls == [("dump", GOOD), ("dump", 201), ("dump", 203), ("dump", CHILD)]


def test_status_of_several_pids(served: Served, cli: Cli) -> None:
    results = only_object(cli("status", "--json", str(GOOD), str(CHILD)))["results"]
    assert [[one["pid"] for one in result["sessions"]] for result in results] == [[GOOD], [CHILD]]
    done = cli("status", str(GOOD), "200", str(CHILD))
    assert done.returncode == REFUSED[200].exit_code
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["daemon", str(GOOD), str(CHILD)]
    assert served.backend.calls[-1] == ("status", CHILD)


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("pid", REFUSED)
@pytest.mark.parametrize("command", ["dump", "restore", "detach"])
def test_refusal_is_one_sentence_on_stderr_and_an_exit_code_of_its_own(cli: Cli, command: str, pid: int) -> None:
    done = cli(command, str(pid))
    error = REFUSED[pid]
    assert (done.returncode, done.stdout, done.stderr) == (error.exit_code, "", f"snapd: {error.render()}\n")


@pytest.mark.usefixtures("served")
def test_failure_with_json_is_the_one_object_too(cli: Cli) -> None:
    done = cli("dump", "--json", "202")
    assert done.returncode == REFUSED[202].exit_code
    assert done.stderr == f"snapd: {REFUSED[202].render()}\n"
    value = only_object(done)
    assert (value["error"], value["parameters"]) == ("io.heapsnapd.NotPermitted", {"pid": 202, "uid": 1000})


@pytest.mark.usefixtures("served")
def test_bug_in_the_daemon_is_one_sentence(cli: Cli) -> None:
    done = cli("dump", str(BROKEN))
    assert done.returncode == 50
    assert done.stderr.count("\n") == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.parametrize("command", [["status"], ["status", "1"], ["dump", "1"], ["restore", "1"], ["detach", "1"]])
def test_without_a_daemon_every_command_says_so(cli: Cli, tmp_path: Path, command: list[str]) -> None:
    done = cli(*command)
    assert (done.returncode, done.stdout) == (10, "")
    assert done.stderr == (
        f"snapd: No daemon answers at {tmp_path}/run/control.sock: start one with 'snapd daemon', "
        "or name another with --runtime-dir.\n"
    )


def test_runtime_dir_is_taken_before_and_behind_the_command_and_from_the_environment(
    served: Served, cli: Cli, tmp_path: Path
) -> None:
    here, nowhere = str(served.runtime_dir), str(tmp_path / "nowhere")
    assert cli("status").returncode == 0
    assert cli("status", SNAPD_RUNTIME_DIR=nowhere).returncode == 10
    assert cli("--runtime-dir", here, "status", SNAPD_RUNTIME_DIR=nowhere).returncode == 0
    assert cli("--runtime-dir", nowhere, "status").returncode == 10
    assert cli("--runtime-dir", nowhere, "status", "--runtime-dir", here).returncode == 0


def test_runtime_dir_that_no_socket_fits_in_is_one_sentence(cli: Cli) -> None:
    done = cli("--runtime-dir", "/" + "x" * 120, "status")
    assert done.returncode == 12
    assert done.stderr.count("\n") == 1


def test_interrupted_dump_exits_130_and_goes_on_in_the_daemon(served: Served, cli: Cli) -> None:
    with subprocess.Popen([*cli.argv, "dump", str(SLOW)], env=cli.env, stderr=subprocess.PIPE, text=True) as child:
        assert served.backend.started.wait(WAIT_S)
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate(timeout=WAIT_S)
    assert child.returncode == 130
    assert stderr.strip() == "snapd: interrupted; the daemon goes on with what it has begun"
    served.call(served.backend.release)
    assert served.backend.finished.wait(WAIT_S)


@pytest.mark.usefixtures("served")
def test_reader_that_has_gone_is_no_error_worth_words(cli: Cli) -> None:
    command = " ".join([*cli.argv, "status", "--watch", "--interval", "0.1"])
    script = f"{command} | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], env=cli.env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.returncode == 141
    assert done.stdout.startswith("daemon ")


@pytest.mark.usefixtures("served")
def test_full_disk_under_stdout_is_one_sentence(cli: Cli) -> None:
    script = " ".join([*cli.argv, "status", ">/dev/full"])
    done = subprocess.run(["sh", "-c", script], env=cli.env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "snapd: The output cannot be written (No space left on device): check where it is sent to.\n"


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_standard_streams_are_no_trouble(cli: Cli, closed: str) -> None:
    script = " ".join([*cli.argv, "status", closed])
    done = subprocess.run(["sh", "-c", script], env=cli.env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("served")
def test_status_is_plain_lines_when_piped_and_no_name_can_forge_one(cli: Cli) -> None:
    heading, first, child, evil, warning = cli("status").stdout.splitlines()
    assert heading.endswith(": 3 sessions")
    assert first == (
        "100 redis-server idle: 20.0 MiB resident, 180.0 MiB out, 50.0 MiB stored, ratio 3.60, 1234 faults,"
        " p50 16us, p99 86us"
    )
    assert child.startswith("101 redis-server child:")
    assert "evil \\x1b[31m\\nname" in evil
    assert warning == "process 102 has 2 pages that could not be read back; touching one raises SIGBUS"


def test_status_without_sessions_says_how_to_get_one(served: Served, cli: Cli) -> None:
    served.backend.sessions = ()
    done = cli("status")
    assert done.returncode == 0
    assert done.stdout.endswith(": no sessions; start a program with 'snapd run -- CMD'\n")


@pytest.mark.usefixtures("served")
def test_watch_with_json_is_an_object_a_line(cli: Cli) -> None:
    command = [*cli.argv, "status", "--watch", "--json", "--interval", "0.1"]
    with subprocess.Popen(command, env=cli.env, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for _ in range(3):
            assert set(json.loads(child.stdout.readline())) == {"daemon", "sessions", "totals"}
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=WAIT_S)  # to close its output first would be another reason to end
    assert child.returncode == 130


@pytest.mark.usefixtures("served")
def test_table_on_a_terminal_has_every_column(cli: Cli) -> None:
    code, text = terminal.run([*cli.argv, "status"], cli.env)
    assert code == 0
    heading, titles, first, child, _, warning = terminal.plain(text)
    assert heading.startswith("daemon ")
    assert titles.split() == ["pid", "program", "state", "resident", "out", "stored", "ratio", "faults", "p50", "p99"]
    assert first.split() == ["100", "redis-server", "idle", "20.0M", "180M", "50.0M", "3.60", "1.2K", "16us", "86us"]
    assert "\u2514 redis-server" in child
    assert "SIGBUS" in warning


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_table_of_the_largest_figures_is_not_broken(served: Served, cli: Cli, columns: int) -> None:
    vast = 999 * 1024 * MIB
    figures = ("W" * 15, "w" * 20, vast, vast, vast - 1, 999_949_999, 999.4, 99_949.0, 1 << 40)
    sessions = [snapd_session(pid, *figures) for pid in (4_194_303, 4_194_304)]
    sessions.append(snapd_session(4_194_302, "\u6f22" * 5, "idle", vast, vast, 1, 1, 99_949_000.0, 99_949_000.0, 0))
    served.backend.sessions = tuple(sessions)
    code, text = terminal.run([*cli.argv, "status"], cli.env, columns=columns)
    assert code == 0
    _, titles, *rows = terminal.plain(text)
    table = [titles, *rows[:3]]
    assert max(cell_len(line.rstrip()) for line in table) <= columns
    ends = [line.split() for line in table]
    assert [len(end) for end in ends] == [10] * 4, "a cell that is wrapped or dropped"
    assert ends[1][3:] == ["999G", "999G", "1", "1.1T", "1", "99.9s", "99.9s"]
    assert ends[2][3:] == ["999G", "999G", "999G", "1.00", "1.0G", "999us", "99.9ms"]
    assert [end[0] for end in ends[1:]] == ["4194302", "4194303", "4194304"]
    assert all(len(end[1].rstrip("\u2026")) >= 5 for end in ends[1:]), "so short that nobody knows the program"


def snapd_session(pid: int, comm: str, state: str, *rest: Any) -> Any:
    """Return a session of extreme figures."""
    resident, swapped, stored, faults, p50, p99, bad = rest
    return type(SESSIONS[0])(pid, 0, comm, state, resident, swapped, stored, faults, p50, p99, bad, None)


@pytest.mark.usefixtures("served")
def test_watch_draws_again_until_ctrl_c(cli: Cli) -> None:
    typed: list[bool] = []

    def keys(seen: str) -> bytes | None:
        if seen.count("redis-server") >= 6 and not typed:
            typed.append(True)
            return b"\x03"
        return None

    code, text = terminal.run([*cli.argv, "status", "--watch", "--interval", "0.1"], cli.env, keys=keys)
    assert code == 130
    assert "Traceback" not in text
    assert max(map(len, terminal.plain(text.replace("^C", "")))) <= 80


@pytest.mark.usefixtures("served")
@pytest.mark.parametrize(("command", "word"), [("dump", "dumped"), ("restore", "restored")])
def test_progress_bar_is_drawn_on_a_terminal_and_fits(cli: Cli, command: str, word: str) -> None:
    code, text = terminal.run([*cli.argv, command, str(GOOD)], cli.env)
    assert code == 0
    lines = terminal.plain(text)
    bars = [line for line in lines if line.startswith(f"{command} {GOOD} ")]
    assert bars
    assert any("/100.0 MiB" in line for line in bars)
    assert max(map(len, bars)) <= 80
    assert any(line.startswith(f"{word} {GOOD}") for line in lines)


@pytest.mark.usefixtures("served")
def test_json_on_a_terminal_is_json_only(cli: Cli) -> None:
    code, text = terminal.run([*cli.argv, "dump", "--json", str(GOOD)], cli.env)
    assert code == 0
    assert json.loads(text)["pid"] == GOOD


def test_upgrade_says_who_is_replaced_by_whom(served: Served, cli: Cli) -> None:
    first = served.backend.pid
    assert cli("upgrade").stdout.splitlines() == [
        f"daemon {first}, version {snapd.__version__}, is replaced by {first + 1}, version {snapd.__version__}",
        "  targets were without a daemon for 125.0 ms",
    ]
    assert only_object(cli("upgrade", "--json", "--wait", "5")) == {
        "pid": first + 1,
        "version": snapd.__version__,
        "next_pid": first + 2,
        "next_version": snapd.__version__,
        "unserved_s": 0.125,
    }
    served.backend.refusal = NotUpgraded("why not")
    done = cli("upgrade")
    assert (done.returncode, done.stdout) == (14, "")
    assert done.stderr == f"snapd: {NotUpgraded('why not').render()}\n"
