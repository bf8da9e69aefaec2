"""`snapd run` is as good as invisible: signals, status, streams, terminal and environment are the command's own."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from snapd.agent import library_path
from snapd.cli import program
from tests.cli import terminal
from tests.cli.fake import Cli


def static_program(path: Path) -> Path:
    """Write a program that exits with 5 and needs no loader."""
    code = bytes.fromhex("b83c000000 bf05000000 0f05")  # mov eax, 60; mov edi, 5; syscall
    base, head = 0x400000, 64 + 56
    elf = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, base + head, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, head + len(code), head + len(code), 4096)
    path.write_bytes(elf + load + code)
    path.chmod(0o755)
    return path


def script(path: Path, text: str, mode: int = 0o755) -> Path:
    """Write a script."""
    path.write_text(text)
    path.chmod(mode)
    return path


def test_exit_status_is_the_command_s_and_arguments_are_its_own(cli: Cli) -> None:
    done = cli("run", "--", "sh", "-c", 'echo "$@"; exit 7', "sh", "--json", "--", "-x", "")
    assert (done.returncode, done.stdout, done.stderr) == (7, "--json -- -x \n", "")
    assert cli("run", "sh", "-c", "exit 3").returncode == 3, "the dashes are only needed for options"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_reach_the_command_itself(cli: Cli, number: int) -> None:
    command = [*cli.argv, "run", "--", "sh", "-c", "echo $$; exec sleep 60"]
    with subprocess.Popen(command, env=cli.env, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert int(child.stdout.readline()) == child.pid, "it executes and is nobody's parent"
        child.send_signal(number)
        assert child.wait(20) == -number


def test_no_signal_is_left_ignored(cli: Cli) -> None:
    def ignored(argv: list[str]) -> str:
        status = subprocess.run(argv, env=cli.env, capture_output=True, text=True, timeout=60, check=True).stdout
        return next(line for line in status.splitlines() if line.startswith("SigIgn"))

    command = ["cat", "/proc/self/status"]
    assert ignored([*cli.argv, "run", "--", *command]) == ignored(["env", *command])


def test_terminal_is_the_command_s(cli: Cli) -> None:
    code, text = terminal.run([*cli.argv, "run", "--", "sh", "-c", "test -t 0 && test -t 1 && stty size"], cli.env)
    assert (code, text.strip()) == (0, "24 80")


def test_environment_has_the_agent_and_where_its_daemon_is(cli: Cli, tmp_path: Path) -> None:
    done = cli("run", "--", "sh", "-c", 'echo "$LD_PRELOAD"; echo "$SNAPD_AGENT_SOCKET"')
    assert done.stdout.splitlines() == [str(library_path()), str(tmp_path / "run" / "agent.sock")]


def test_existing_preloads_are_kept_behind_the_agent(cli: Cli) -> None:
    library = str(library_path())
    given = f"/lib/one.so {library}:/lib/two.so"
    # The loader complains about the two that do not exist.
    done = cli("run", "--", "sh", "-c", 'echo "$LD_PRELOAD"', LD_PRELOAD=given)
    assert done.stdout == f"{library}:/lib/one.so:/lib/two.so\n"


def test_agent_socket_is_absolute_wherever_the_runtime_directory_was_named(cli: Cli, tmp_path: Path) -> None:
    command = [*cli.argv, "--runtime-dir", "here", "run", "--", "sh", "-c", 'echo "$SNAPD_AGENT_SOCKET"']
    done = subprocess.run(command, cwd=tmp_path, env=cli.env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{tmp_path}/here/agent.sock\n"


def test_nothing_else_of_the_environment_changes_even_in_the_c_locale(cli: Cli) -> None:
    base = {"PATH": os.environ["PATH"], "LANG": "C", "HOME": "/", "SNAPD_RUNTIME_DIR": "/run/x"}
    base["PYTHONPATH"] = cli.env["PYTHONPATH"]
    command = [*cli.argv, "run", "--", "env", "-0"]
    done = subprocess.run(command, env=base, capture_output=True, text=True, timeout=60, check=True)
    seen = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    assert seen.pop("LD_PRELOAD") == str(library_path())
    assert seen.pop("SNAPD_AGENT_SOCKET") == "/run/x/agent.sock"
    assert seen == base


@pytest.mark.parametrize("cmd", ["no-such-command-here", "/no/such/file", "./nothing", ""])
def test_command_that_is_not_found_exits_127(cli: Cli, cmd: str) -> None:
    done = cli("run", "--", cmd)
    assert done.returncode == 127
    assert done.stderr == f"snapd: The command {cmd or repr(cmd)} was not found: check its spelling and PATH.\n"


def test_command_that_cannot_be_executed_exits_126(cli: Cli, tmp_path: Path) -> None:
    no_bit = script(tmp_path / "no-bit", "#!/bin/sh\n", 0o644)
    no_interpreter = script(tmp_path / "no-interpreter", "#!/no/such/interpreter\n")
    for path, reason in ((no_bit, "Permission denied"), (tmp_path, "Permission denied"), (no_interpreter, "names")):
        done = cli("run", "--", str(path))
        assert done.returncode == 126
        assert done.stderr.startswith(f"snapd: The command {path} cannot be executed (")
        assert reason in done.stderr


def test_script_without_an_interpreter_line_is_run_by_the_shell_as_env_does(cli: Cli, tmp_path: Path) -> None:
    path = script(tmp_path / "bare", "exit $1\n")
    assert subprocess.run(["env", str(path), "9"], check=False, timeout=60).returncode == 9
    assert cli("run", "--", str(path), "9").returncode == 9


def test_program_that_cannot_be_managed_is_said_in_one_line_and_run(cli: Cli, tmp_path: Path) -> None:
    path = static_program(tmp_path / "static")
    done = cli("run", "--", str(path))
    assert done.returncode == 5
    assert done.stderr == (
        f"snapd: {path} cannot be managed because it is statically linked; it runs as it would without snapd\n"
    )


def test_ordinary_programs_and_scripts_have_no_obstacle(tmp_path: Path) -> None:
    through_env = script(tmp_path / "script", "#!/usr/bin/env python3\n")
    bare = script(tmp_path / "bare", "exit 0\n")
    for cmd in ("sh", sys.executable, str(through_env), str(bare), "no-such-command-here", str(tmp_path)):
        assert program.obstacle(cmd) is None


def test_obstacles_are_seen_through_interpreter_lines(tmp_path: Path) -> None:
    static = static_program(tmp_path / "static")
    outer = script(tmp_path / "outer", f"#! {script(tmp_path / 'inner', f'#!{static} -x')}\n")
    assert program.obstacle(str(outer)) == "it is statically linked"
    endless = tmp_path / "endless"
    assert program.obstacle(str(script(endless, f"#!{endless}\n"))) is None


def test_other_kinds_of_program_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(static_program(tmp_path / "p").read_bytes())
    path = tmp_path / "q"

    def obstacle(offset: int, value: int) -> str | None:
        path.write_bytes(data[:offset] + bytes([value]) + data[offset + 1 :])
        path.chmod(0o755)
        return program.obstacle(str(path))

    assert obstacle(4, 1) == "it is a 32-bit program"
    assert obstacle(18, 183) == "it is a program for another processor"
    assert obstacle(0, 0) is None
    for length in (0, 3, 20, 70, 100):
        path.write_bytes(data[:length])
        assert program.obstacle(str(path)) in (None, "it is statically linked")

    setuid = tmp_path / "setuid"
    shutil.copy("/bin/true", setuid)
    setuid.chmod(0o4755)
    assert setuid.stat().st_mode & stat.S_ISUID
    assert program.obstacle(str(setuid)) is None, "it changes nothing for its owner"
    monkeypatch.setattr(os, "geteuid", lambda: setuid.stat().st_uid + 1)
    assert program.obstacle(str(setuid)) == "it is setuid"


def test_library_is_found_by_a_command_and_names_no_directory_of_who_built_it() -> None:
    done = subprocess.run([sys.executable, "-m", "snapd.agent"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"{library_path()}\n"
    tree = Path(program.__file__).parents[2]
    for built in (Path(library_path()), *tree.glob("snapd/engine/_engine*.so")):
        assert os.fsencode(tree) not in built.read_bytes(), built
