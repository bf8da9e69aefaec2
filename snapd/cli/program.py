"""What a program file says about whether the agent can be preloaded into it.

Owns the reading of ELF headers and of `#!` lines. The loader ld.so(8) has the last word: whatever this file
cannot tell it leaves to it.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
from pathlib import Path
from typing import BinaryIO, Final

_ELF64_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")
_ELFCLASS32: Final = 1
_EM_X86_64: Final = 62
_PT_INTERP: Final = 3
_SCRIPT_DEPTH: Final = 4  # as deep as the kernel follows `#!` lines
_SCRIPT_LINE_BYTES: Final = 256
_PATH_MAX_BYTES: Final = 4096


def obstacle(cmd: str) -> str | None:
    """Return why the agent cannot be preloaded into the program that `cmd` names, or None when nothing is seen."""
    found, reason = shutil.which(cmd), None
    for _ in range(_SCRIPT_DEPTH + 1):
        if found is None:
            return None
        try:
            reason = _in_mode(found)  # first, because such a program need not be readable
            with Path(found).open("rb") as file:
                interpreter = _interpreter(file)
                if interpreter is None:
                    return reason or _in_elf(file)
        except PermissionError:
            return reason
        except OSError:
            return None
        found = interpreter
    return None


def _interpreter(file: BinaryIO) -> str | None:
    first = file.read(_SCRIPT_LINE_BYTES)
    words = first[2:].split(b"\n", 1)[0].split() if first.startswith(b"#!") else []
    return os.fsdecode(words[0]) if words else None


def _in_elf(file: BinaryIO) -> str | None:
    file.seek(0)
    header = file.read(_ELF64_HEADER.size)
    if not header.startswith(b"\x7fELF"):
        return None
    if header[4:5] == bytes([_ELFCLASS32]):
        return "it is a 32-bit program"
    try:
        _, _, machine, _, _, table_offset, _, _, _, entry_bytes, entries, *_ = _ELF64_HEADER.unpack(header)
        if machine != _EM_X86_64:
            return "it is a program for another processor"
        loader = _loader(file, table_offset, entry_bytes, entries)
    except struct.error:  # cut short: the kernel will refuse it
        return None
    if loader is None:
        return "it is statically linked"
    return "it uses another C library than glibc" if loader.startswith("ld-musl") else None


def _loader(file: BinaryIO, table_offset: int, entry_bytes: int, entries: int) -> str | None:
    for index in range(entries):
        file.seek(table_offset + index * entry_bytes)
        kind, _, offset, _, _, nbytes, *_ = _PROGRAM_HEADER.unpack(file.read(_PROGRAM_HEADER.size))
        if kind == _PT_INTERP:
            file.seek(offset)
            return Path(os.fsdecode(file.read(min(nbytes, _PATH_MAX_BYTES)).rstrip(b"\0"))).name
    return None


def _in_mode(path: str) -> str | None:
    # The kernel then sets AT_SECURE, and the loader takes no preloads from elsewhere.
    status = Path(path).stat()
    if status.st_mode & stat.S_ISUID and status.st_uid != os.geteuid():
        return "it is setuid"
    if status.st_mode & stat.S_ISGID and status.st_mode & stat.S_IXGRP and status.st_gid != os.getegid():
        return "it is setgid"
    if os.getuid() != 0 and "security.capability" in os.listxattr(path):
        return "it has file capabilities"
    return None
