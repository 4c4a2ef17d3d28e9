"""The options of a port, and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conformance.porter.errors import PortError
from conformance.porter.storage.stacks import Stacks
from conformance.porter.storage.target import SHARD_BYTES
from conformance.porter.verdict import EXACT

MOST_PROBES = 4096
MOST_ELEMENTS = 1 << 25
"""Elements of all probe tokens together: they are held in float64 several times, 256 MiB each time."""
"""The largest number of probe tokens. At n = 4 and C = 7168 the probes and their results fill some gigabytes, and
thousands of tokens don't show a fault that a few don't show."""


@dataclass(frozen=True)
class Options:
    """How to port; the command line's options of the same names say more.

    Attributes:
        to: the target's layout.
        source_layout: the source's layout; None to recognise it.
        dialect: the source's dialect; None to take the one that the checkpoint states.
        to_dialect: the target's dialect. If None, it is the row of the target's own software (for canonical: the
            source's dialect), with the source's values wherever its configuration sets them.
        assume: take the layout's own dialect if nothing says which one the source is.
        config: the source's configuration, if it isn't the ``config.json`` in its directory.
        to_config: the target's configuration, which then states the target's dialect.
        allow_partial: port the rest if hyper-connections are missing or have no place.
        dtype: the dtype that weights are stored in; None keeps each weight's own.
        allow_approximate: write even if the target computes another function.
        into: an existing safetensors directory that takes the tensors in a new shard, or a GGUF file that is copied
            with the tensors in it.
        verify: the number of probe tokens on which source and target are evaluated, 1 to `MOST_PROBES`.
        seed: the seed of the probes.
        activations: streams ``[..., n, C]`` on which they are evaluated too.
        norm_weight: a checkpoint with norm weights; φ is divided by them if the target has one and the source none.
        stacks, scan_axis: how MaxText's layers are stacked.
        source_names, names: prefixes of the source's and of the target's tensors if they aren't the layout's, under
            ``attention``, ``ffn`` and ``head``, with ``{layer}`` for the number.
        overwrite: replace a target that exists.
        dry_run: read names and shapes, and write nothing.
        read_back: read the new files before they take their place, and compare every bit.
        shard_bytes: the largest size of a directory's shard.

    Raises:
        PortError: ``verify`` is out of its bounds.
    """

    to: str
    source_layout: str | None = None
    dialect: str | None = None
    to_dialect: str | None = None
    assume: bool = False
    config: Path | None = None
    to_config: Path | None = None
    allow_partial: bool = False
    dtype: str | None = None
    allow_approximate: bool = False
    into: Path | None = None
    verify: int = 4
    seed: int = 0
    activations: np.ndarray | None = None
    norm_weight: Path | None = None
    stacks: Stacks = field(default_factory=Stacks)
    scan_axis: int = 1
    source_names: Mapping[str, str] = field(default_factory=dict[str, str])
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    overwrite: bool = False
    dry_run: bool = False
    read_back: bool = False
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        if not 1 <= self.verify <= MOST_PROBES:
            raise PortError(
                f"--verify must be 1 to {MOST_PROBES} probe tokens, all of which are in memory at once in float64, got "
                f"{self.verify}"
            )


@dataclass
class PortReport:
    """The result of a port, or of a dry run.

    Attributes:
        verdict: the kind of the verdict; `reason` explains it.
        assumed: whether the source's dialect is an assumption; the verdict then holds only if that is right.
        ported_tensors, source_tensors: the numbers of tensors that are ported and that the source has.
        lacking: a line for each part that the source should have and lacks; the verdict is "partial" then.
        settings: the settings that the target's configuration needs; ``settings_place`` says where.
        rounding: the largest relative rounding of a weight; ``underflows`` counts the weights that are too small for
            the dtype's normal numbers and lost more.
        deviations: for each site the measured deviation of H, u and out (``head`` for a head).
        tensors: name, shape and dtype of each tensor that is written, or that a port would write.
        written: the path that was written; None for a dry run or a refusal.
    """

    source: str
    source_layout: str
    target_layout: str
    source_dialect: str
    target_dialect: str
    source_told_by: str
    told_by: str
    streams: int
    dim: int
    sites: int
    layers: int
    head: bool
    source_bytes: int
    source_tensors: int = 0
    ported_tensors: int = 0
    verdict: str = EXACT
    reason: str = EXACT
    assumed: bool = False
    lacking: list[str] = field(default_factory=list[str])
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    settings_place: str = ""
    notes: list[str] = field(default_factory=list[str])
    left_out: list[str] = field(default_factory=list[str])
    rounding: float = 0.0
    underflows: int = 0
    probes: int = 0
    deviations: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    tensors: dict[str, tuple[list[int], str]] = field(default_factory=dict[str, tuple[list[int], str]])
    written: str | None = None
    read_back: bool = False

    @property
    def largest(self) -> dict[str, float]:
        """The largest deviation of each quantity over all sites."""
        largest: dict[str, float] = {}
        for row in self.deviations.values():
            for name, value in row.items():
                largest[name] = max(largest.get(name, 0.0), value)
        return largest

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "largest": self.largest}


class Refused(PortError):
    """The verdict doesn't allow writing.

    Attributes:
        report: the report with the measurements.
    """

    def __init__(self, message: str, status: int, report: PortReport):
        super().__init__(message, status)
        self.report = report
