"""A check, what it found, and the sum of all: plain data and how it becomes JSON.

Owns what the words needed and ok mean. Knows no check and no way to show one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapd.doctor.scene import Scene


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check saw, in words; whether that is as it should be; and `mend`, the command that makes it so."""

    detail: str
    ok: bool = True
    mend: str | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that decides whether snapd works here.

    `needed`: when it fails nothing works; else something is worse. `lost` says what. `probe` may raise OSError for
    what it did not foresee.
    """

    name: str
    needed: bool
    lost: str
    probe: Callable[[Scene], Finding]

    def run(self, scene: Scene) -> Result:
        """Look, and return what was found."""
        try:
            return Result(self, self.probe(scene))
        except OSError as error:
            return Result(self, Finding(f"cannot be looked at ({error.strerror or error})", ok=False))


@dataclass(frozen=True, slots=True)
class Result:
    """A check together with what it found."""

    check: Check
    finding: Finding

    @property
    def ok(self) -> bool:
        """Whether it is as it should be."""
        return self.finding.ok

    @property
    def fatal(self) -> bool:
        """Whether nothing works until this is mended."""
        return self.check.needed and not self.ok

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary of JSON types only."""
        return {
            "name": self.check.name,
            "ok": self.ok,
            "needed": self.check.needed,
            "detail": self.finding.detail,
            "lost": self.check.lost,
            "mend": self.finding.mend,
        }


@dataclass(frozen=True, slots=True)
class Examination:
    """The results of all checks, in order."""

    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether all that is needed is there."""
        return not any(result.fatal for result in self.results)

    def to_json(self) -> dict[str, Any]:
        """Return {ok, checks}."""
        return {"ok": self.ok, "checks": [result.to_json() for result in self.results]}
