"""snapd: takes a running process's heap out of memory and gives every page back on touch.

Owns the version and the two names that programs import. Both are looked up lazily: a target that only
wants `cooperate` must not pay for the client, and neither for the daemon.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snapd.agent import cooperate
    from snapd.client import AsyncClient, Client

__version__ = "0.1.0"

__all__ = ["AsyncClient", "Client", "__version__", "cooperate"]

_HOMES = {"cooperate": "snapd.agent", "Client": "snapd.client", "AsyncClient": "snapd.client"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    """List the lazy names too."""
    return sorted({*globals(), *__all__})
