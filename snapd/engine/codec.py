"""Where the engine's libzstd comes from: the one inside the `zstandard` wheel, else the system's.

Owns the table of function pointers; the only user of `zstandard`'s private cffi module. Knows nothing of frames.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

POINTERS: Final = {
    "create_cctx": "ZSTD_createCCtx",
    "free_cctx": "ZSTD_freeCCtx",
    "set_cctx": "ZSTD_CCtx_setParameter",
    "compress2": "ZSTD_compress2",
    "create_dctx": "ZSTD_createDCtx",
    "free_dctx": "ZSTD_freeDCtx",
    "decompress_dctx": "ZSTD_decompressDCtx",
    "is_error": "ZSTD_isError",
}

_PROTOTYPES: Final = """
    void *ZSTD_createCCtx(void); size_t ZSTD_freeCCtx(void *); size_t ZSTD_CCtx_setParameter(void *, int, int);
    size_t ZSTD_compress2(void *, void *, size_t, const void *, size_t);
    void *ZSTD_createDCtx(void); size_t ZSTD_freeDCtx(void *);
    size_t ZSTD_decompressDCtx(void *, void *, size_t, const void *, size_t); unsigned ZSTD_isError(size_t);
"""


def load() -> tuple[dict[str, int], str, Any]:
    """Return the addresses by field name, the source in words, and what must stay referenced while they are used.

    Raises ImportError when neither the wheel's libzstd nor libzstd.so.1 is there.
    """
    try:
        import zstandard

        private: Any = importlib.import_module("zstandard._cffi")
        lib, ffi = private.lib, private.ffi
        addresses = {field: int(ffi.cast("uintptr_t", ffi.addressof(lib, name))) for field, name in POINTERS.items()}
        source = f"zstandard {zstandard.__version__}, libzstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}"
    except (ImportError, AttributeError):
        return _system()
    return addresses, source, (lib, ffi)


def _system() -> tuple[dict[str, int], str, Any]:
    import cffi

    system: Any = cffi.FFI()
    system.cdef(_PROTOTYPES)
    try:
        library = system.dlopen("libzstd.so.1")
    except OSError as error:
        raise ImportError(f"no libzstd: {error}") from error
    addresses = {
        field: int(system.cast("uintptr_t", system.addressof(library, name))) for field, name in POINTERS.items()
    }
    return addresses, "libzstd.so.1", (library, system)
