"""Build hook: compiles the native parts of snapd inside the source tree and puts them into the wheel.

Owns the compiler flags, what a machine must have to build, and when a file is compiled again; knows nothing of what
the C does. Run as a script it needs no hatchling: `check` looks at the machine, `build` compiles, `syntax` only asks
the compiler for its opinion, `faults` compiles the tests' own engine, which has fault points. CC and SNAPD_CFLAGS are
honoured; -fsanitize flags do not reach the freestanding agent.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
# Relative to ROOT, where the compiler runs: the commands, and so the digests, are the same wherever the tree is.
BUILD = Path("build/native")
ENGINE = Path("snapd/engine")
AGENT = Path("snapd/agent")
AGENT_LIBRARY = AGENT / "libsnapd-agent.so"
FAULTS = Path("build/faults")
FAULT_POINTS = Path("tests/faults/faultpoint.c")
BENCH = Path("snapd/bench")
# Programs: a machine that is measured need not have a compiler.
BENCH_PROGRAMS = {BENCH / "load": BENCH / "load.c", BENCH / "raw": BENCH / "raw.c"}

MODULE = "snapd.engine._engine"
GLUE = BUILD / "_engine.c"

WARNINGS = ["-Wall", "-Wextra", "-Werror"]
ENGINE_FLAGS = ["-O2", "-g", "-std=gnu11", "-fPIC", "-pthread", "-fvisibility=hidden", f"-I{ENGINE}", f"-I{AGENT}"]
# cffi's generated code is not ours to keep free of the warnings that only -Wextra gives.
GLUE_WARNINGS = ["-Wall", "-Werror"]
# The keeper has unmapped every library by the time it runs.
FREESTANDING = ["-ffreestanding", "-fno-stack-protector", "-fno-builtin"]
KEEPER = ENGINE / "keeper.c"
# Symbols are bound at load: a fault thread that had to resolve its first call would wait for the loader's lock.
ENGINE_LINK = ["-shared", "-pthread", "-Wl,-z,now,-z,noexecstack"]
AGENT_FLAGS = ["-O2", "-g", "-std=gnu11", *FREESTANDING, "-fPIC", "-fvisibility=hidden"]
# -z defs: a call that the compiler invents (memcpy, a libgcc helper) fails here and not in somebody's process.
AGENT_LINK = ["-nostdlib", "-shared", "-Wl,-z,now,-z,noexecstack,-z,defs"]
BENCH_FLAGS = ["-O2", "-g", "-std=gnu11", "-pthread", f"-I{AGENT}"]
BENCH_LINK = ["-pthread"]


class Step(NamedTuple):
    """One run of the compiler: `command` makes `output` (its last word) from `inputs`."""

    command: list[str]
    output: Path
    inputs: list[Path]


def check_platform() -> None:
    """Exit with one sentence on anything but CPython >= 3.11 for 64-bit Linux on x86-64."""
    here = sys.platform, platform.machine(), sys.implementation.name, struct.calcsize("P")
    if here != ("linux", "x86_64", "cpython", 8) or sys.version_info < (3, 11):
        version = platform.python_version()
        sys.exit(
            "snapd needs CPython 3.11 or newer on 64-bit Linux x86-64; this is "
            f"{platform.python_implementation()} {version} ({here[3] * 8}-bit) on {platform.system()} {here[1]}."
        )


def find_compiler() -> list[str]:
    """Words of the compiler's command: CC, or the first of cc, gcc and clang; exits when there is none."""
    asked = shlex.split(os.environ.get("CC", ""))
    for words in [asked] if asked else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(words[0]):
            return words
    missing = f"the C compiler that CC names ({asked[0]}) is not there" if asked else "there is no C compiler here"
    sys.exit(f"snapd cannot be built: {missing}; install one: {packages('gcc libc6-dev', 'gcc glibc-devel')}.")


def find_python_headers() -> Path:
    """Directory of Python.h; exits when the interpreter has none."""
    include = Path(sysconfig.get_path("include"))
    if (include / "Python.h").exists():
        return include
    sys.exit(
        f"snapd cannot be built: Python's C headers are missing ({include}/Python.h); "
        f"install them: {packages('python3-dev', 'python3-devel')}."
    )


def packages(debian: str, fedora: str) -> str:
    """Clause that tells how to install the packages that a distribution calls so."""
    return f"`apt install {debian}` on Debian or Ubuntu, `dnf install {fedora}` on Fedora"


def module_path() -> Path:
    """Where the cffi module of this interpreter goes, relative to ROOT."""
    return ENGINE / f"_engine{sysconfig.get_config_var('EXT_SUFFIX')}"


def write_glue() -> None:
    """Generate the cffi module's C from api.h; left alone, mtime and all, when it would not change."""
    from cffi import FFI

    ffi = FFI()
    header = (ROOT / ENGINE / "api.h").read_text(encoding="utf-8")
    ffi.cdef(re.sub(r"/\*.*?\*/|//[^\n]*", " ", header, flags=re.DOTALL))
    ffi.set_source(MODULE, '#include "engine.h"')
    with contextlib.redirect_stdout(io.StringIO()):
        ffi.emit_c_code(str(ROOT / GLUE))


def plan(*, syntax_only: bool = False, faults: bool = False) -> tuple[list[Step], list[Step]]:
    """Steps that compile, and steps that link what those made; `syntax_only`: no generated C, nothing to link.

    `faults`: the engine alone, with fault points, in a place of its own.
    """
    compiler = find_compiler()
    headers = sorted(path.relative_to(ROOT) for path in (ROOT / "snapd").rglob("*.h"))
    extra = shlex.split(os.environ.get("SNAPD_CFLAGS", ""))
    agent_extra = [flag for flag in extra if not flag.startswith("-fsanitize")]
    flags = [*ENGINE_FLAGS, "-DSN_FAULT_POINTS"] if faults else ENGINE_FLAGS
    sources = [*sources_of(ENGINE), FAULT_POINTS] if faults else sources_of(ENGINE)
    engine_flags = {source: [*flags, *WARNINGS, *extra] for source in sources}
    engine_flags[KEEPER] = [*flags, *FREESTANDING, *WARNINGS, *agent_extra]
    objects = FAULTS / "native" if faults else BUILD

    def compile_step(source: Path, flags: list[str]) -> Step:
        output = (objects / (GLUE.name if source == GLUE else source)).with_suffix(".o")
        tail = ["-fsyntax-only"] if syntax_only else ["-c", "-o", str(output)]
        return Step([*compiler, *flags, str(source), *tail], output, [source, *headers])

    def link_step(steps: list[Step], output: Path, flags: list[str]) -> Step:
        made = [step.output for step in steps]
        return Step([*compiler, *flags, *map(str, made), "-o", str(output)], output, made)

    agent = [compile_step(source, [*AGENT_FLAGS, *WARNINGS, *agent_extra]) for source in sources_of(AGENT)]
    engine = [compile_step(source, flags) for source, flags in engine_flags.items()]
    programs = {} if faults else BENCH_PROGRAMS
    bench = {program: compile_step(source, [*BENCH_FLAGS, *WARNINGS, *extra]) for program, source in programs.items()}
    if faults:
        agent = []
    if syntax_only:
        return [*agent, *engine, *bench.values()], []
    write_glue()
    engine.append(compile_step(GLUE, [*ENGINE_FLAGS, f"-I{find_python_headers()}", *GLUE_WARNINGS, *extra]))
    module = FAULTS / module_path().name if faults else module_path()
    links = [link_step(engine, module, [*ENGINE_LINK, *extra])]
    if not faults:
        links.append(link_step(agent, AGENT_LIBRARY, [*AGENT_LINK, *agent_extra]))
    links += [link_step([step], program, [*BENCH_LINK, *extra]) for program, step in bench.items()]
    return [*agent, *engine, *bench.values()], links


def sources_of(directory: Path) -> list[Path]:
    """The C files of a directory, relative to ROOT; exits when there is none: the tree is not whole."""
    sources = sorted(path.relative_to(ROOT) for path in (ROOT / directory).glob("*.c"))
    if not sources:
        sys.exit(f"snapd cannot be built: {directory} holds no C files; is this the whole source tree?")
    return sources


def digest_of(step: Step) -> str:
    """Digest of the command and the bytes of all inputs: new flags count as new sources do, a mere new mtime not."""
    digest = hashlib.sha256("\0".join(["nowhere", *step.command]).encode())
    for path in step.inputs:
        digest.update((ROOT / path).read_bytes())
    return digest.hexdigest()


def make(step: Step) -> bool:
    """Run one step unless its output was made by this command from these inputs; whether that went well.

    The output is replaced whole, never written in place: running processes have the old library mapped.
    """
    name = str(step.output).replace("/", "-")
    stamp, partial = ROOT / BUILD / "stamps" / f"{name}.sha256", ROOT / BUILD / "partial" / name
    output, digest = ROOT / step.output, digest_of(step)
    if output.exists() and stamp.exists() and stamp.read_text() == digest:
        return True
    for directory in (stamp.parent, partial.parent, output.parent):
        directory.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    # Not in the digest: what is made is the same wherever the tree and Python's headers are.
    nowhere = [f"-ffile-prefix-map={ROOT}=.", f"-ffile-prefix-map={sysconfig.get_path('include')}=python"]
    if not run([*step.command[:-1], str(partial.relative_to(ROOT)), *nowhere]):
        return False
    partial.replace(output)
    stamp.write_text(digest)
    return True


def run(command: list[str]) -> bool:
    """Run the compiler in ROOT and pass on what it says in one piece; whether it exited with 0."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.stdout or done.returncode:
        sys.stderr.write(f"{shlex.join(command)}\n{done.stdout}")
    return done.returncode == 0


def finish(action: Callable[[Step], bool], steps: list[Step]) -> None:
    """Take `action` on all steps, as many at once as there are CPUs for us; exits when one went wrong."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        outcomes = list(pool.map(action, steps))
    if not all(outcomes):
        sys.exit("snapd cannot be built: the compiler's complaint stands above.")


def check() -> None:
    """Exit with one sentence unless this machine can build and run snapd."""
    check_platform()
    find_compiler()
    find_python_headers()


def build(*, faults: bool = False) -> list[Path]:
    """Compile and link what is not fresh; the paths of what was linked, relative to ROOT."""
    check()
    (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
    # Two builds in one tree (an editable install and `make`) take turns.
    with (ROOT / BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        compiles, links = plan(faults=faults)
        for steps in (compiles, links):
            finish(make, steps)
    return [step.output for step in links]


def build_faults() -> None:
    """Compile the engine that the tests of deaths load."""
    build(faults=True)


def syntax() -> None:
    """Show every C file to the compiler and make nothing."""
    check()
    for faults in (False, True) if (ROOT / FAULT_POINTS).exists() else (False,):
        finish(lambda step: run(step.command), plan(syntax_only=True, faults=faults)[0])


def get_build_hook() -> type[BuildHookInterface[Any]]:
    """What hatchling asks this file for; lazy, because the script form runs where hatchling is not installed."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class NativeBuildHook(BuildHookInterface[Any]):
        """Builds before the wheel (or the editable install) is put together and adds what it makes to it."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
            build_data["artifacts"] += [f"/{path}" for path in build()]
            build_data["pure_python"] = False
            build_data["infer_tag"] = True

    return NativeBuildHook


if __name__ == "__main__":
    actions: dict[str, Callable[[], object]] = {
        "check": check,
        "build": build,
        "syntax": syntax,
        "faults": build_faults,
    }
    if len(sys.argv) != 2 or sys.argv[1] not in actions:
        sys.exit(f"usage: hatch_build.py {'|'.join(actions)}")
    actions[sys.argv[1]]()
