"""One run of the bench: what was asked for, where it ran, and all that was found.

Owns the JSON. Knows nothing of how the figures came to be, nor of what they are worth.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from snapd.bench.samples import Pictures, Samples

if TYPE_CHECKING:
    from pathlib import Path

    from snapd.bench.machine import Machine


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure: `parts` by name, on a heap of `mib`; `level` None is the daemon's own choice."""

    mib: int
    rounds: int
    level: int | None
    parts: tuple[str, ...]
    kernel: str | None
    targets: int
    state_dir: Path

    def to_json(self) -> dict[str, Any]:
        """Return all but where."""
        return {
            "size_bytes": self.mib << 20,
            "rounds": self.rounds,
            "level": self.level,
            "parts": list(self.parts),
            "kernel": self.kernel,
            "targets": self.targets,
        }


@dataclass(frozen=True, slots=True)
class Result:
    """What one run found, in which every byte was verified; the shares are of all CPUs."""

    plan: Plan
    machine: Machine
    level: int
    others_share: float
    stolen_share: float
    figures: Samples
    limits: Samples
    kernel: Samples
    pictures: Pictures = field(default_factory=Pictures)
    kernel_label: str | None = None
    digest: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            "machine": asdict(self.machine),
            "neighbours": {"others_share": self.others_share, "stolen_share": self.stolen_share},
            "options": {**self.plan.to_json(), "level": self.level},
            "figures": self.figures.to_json(),
            "limits": self.limits.to_json(),
            "kernel": self.kernel.to_json(),
            **self.pictures.to_json(),
            "verified": True,
            "digest": self.digest,
        }
