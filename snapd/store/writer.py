"""Makes stores: an unnamed file in the state directory with its header, and frames for tests and tools.

Owns what the errno of a store's file means when it is made or written. While a daemon serves, its engine appends the
frames; both follow `format`. Knows nothing of sessions or page maps.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import zstandard

from snapd.errors import DirectoryUnusable, SnapdError, StoreFailed, StoreFull
from snapd.pages import PAGE
from snapd.store.format import (
    FRAME_HEADER_BYTES,
    STORE_ID_BYTES,
    FrameCodec,
    PageEntry,
    PageState,
    StoreHeader,
    frame_place,
    pack_frame,
)

if TYPE_CHECKING:
    from types import TracebackType

MODE: Final = 0o600
LEVEL: Final = 1

# A file system without O_TMPFILE says EOPNOTSUPP; layers above one (overlay, FUSE) pass on what the open of a directory
# for writing gives them.
NO_TMPFILE: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS})
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_BAD_DIRECTORY: Final = frozenset(
    {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EROFS}
)


def meaning(error: OSError, path: str) -> SnapdError:
    """Return what an error of the store in the directory `path` means to a person."""
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return StoreFull(path)
    if error.errno in _BAD_DIRECTORY:
        return DirectoryUnusable(path, reason)
    return StoreFailed(path, reason)


def open_unnamed(directory: Path) -> int:
    """Return the descriptor of a new file without a name in `directory`: read-write, mode 0600, closed at exec.

    Where the file system has no O_TMPFILE, the file has a name for a moment. OSError as the kernel gives it.
    """
    name = None
    try:
        # Without O_EXCL, so that a store can be given a name later and become a snapshot.
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, MODE)
    except OSError as error:
        if error.errno not in NO_TMPFILE:
            raise
        fd, name = tempfile.mkstemp(prefix="store-", dir=directory)
    try:
        if name is not None:
            Path(name).unlink()
        os.fchmod(fd, MODE)  # whatever the umask took away
    except OSError:
        os.close(fd)
        raise
    return fd


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`, by as many calls as it takes; OSError as the kernel gives it."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


class StoreWriter:
    """A new store and its end. Closes its descriptor unless `detach()` gave it away."""

    def __init__(self, directory: Path, *, level: int = LEVEL) -> None:
        """Make a store in `directory`, which exists.

        Raises DirectoryUnusable, StoreFull or StoreFailed.
        """
        self._path = str(directory)
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
        self.header = StoreHeader(store_id=secrets.token_bytes(STORE_ID_BYTES), created_ns=time.time_ns())
        try:
            self.fd = open_unnamed(directory)
        except OSError as error:
            raise meaning(error, self._path) from error
        self.end = 0
        try:
            self._write(self.header.pack(), 0)
        except SnapdError:
            self.close()
            raise

    def append_frame(self, page: bytes) -> PageEntry:
        """Append one page, compressed or raw, whichever is smaller, and return its entry, in state STORED.

        After StoreFull or StoreFailed the store is as it was before.
        """
        if len(page) != PAGE:
            raise ValueError(f"a page has {PAGE} bytes, not {len(page)}")
        codec, payload = FrameCodec.ZSTD, self._compressor.compress(page)
        if len(payload) >= PAGE:
            codec, payload = FrameCodec.RAW, page
        offset = frame_place(self.end, FRAME_HEADER_BYTES + len(payload))
        frame = pack_frame(self.header.store_id, offset, codec, payload)
        self._write(frame, offset)
        return PageEntry(PageState.STORED, offset, len(frame))

    def _write(self, data: bytes, offset: int) -> None:
        try:
            write_all(self.fd, data, offset)
        except OSError as error:
            # Half a frame would be reported as damage by every later check.
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, self.end)
            raise meaning(error, self._path) from error
        self.end = offset + len(data)

    def detach(self) -> int:
        """Return the descriptor; closing it is the caller's business from now on."""
        fd, self.fd = self.fd, -1
        return fd

    def close(self) -> None:
        """Close the store, which is its end if nobody else holds it; may be called again."""
        if self.fd >= 0:
            os.close(self.detach())

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()
