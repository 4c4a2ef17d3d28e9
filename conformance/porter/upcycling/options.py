"""The options of an upcycling, and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from conformance.porter.errors import PortError
from conformance.porter.options import MOST_PROBES
from conformance.porter.storage.stacks import Stacks
from conformance.porter.verdict import ROUNDING

SHARD_BYTES = 1 << 28
"""Bytes of hyper-connections that are held at once where a whole model is written, and that one shard has at most."""
STREAMS = 4
"""Streams where neither the user nor the configuration says how many: those of all published models."""
MOST_NOISE = 0.5


@dataclass(frozen=True)
class UpcycleOptions:
    """How to upcycle; the command line's options of the same names say more.

    Attributes:
        to: the target's layout.
        dialect: the target's dialect; None for the one that the configuration's ``model_type`` or the layout has.
        streams: n; None for the number that the configuration states, or `STREAMS`.
        noise, seed: how far the streams are driven apart, and the seed of everything that is drawn.
        dtype: of the hyper-connections; None for the layout's own, or float32.
        names: prefixes of the target's tensors, under ``attention``, ``ffn`` and ``head``.
        stacks, scan_axis: how MaxText's layers are stacked.
        verify: the number of probe tokens.
        allow_approximate: write even where the model's output changes by more than rounding.
        overwrite: replace a target that exists.
        dry_run: write nothing.
        read_back: read the hyper-connections again before they take their place, and compare every bit.
        shard_bytes: the largest size of a shard of hyper-connections.

    Raises:
        PortError: a number is out of its bounds.
    """

    to: str = "canonical"
    dialect: str | None = None
    streams: int | None = None
    noise: float = 0.0
    seed: int = 0
    dtype: str | None = None
    names: Mapping[str, str] = field(default_factory=dict[str, str])
    stacks: Stacks = field(default_factory=Stacks)
    scan_axis: int = 1
    verify: int = 4
    allow_approximate: bool = False
    overwrite: bool = False
    dry_run: bool = False
    read_back: bool = False
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        if not 1 <= self.verify <= MOST_PROBES:
            raise PortError(f"--verify must be 1 to {MOST_PROBES} probe tokens, got {self.verify}")
        if not 0 <= self.noise <= MOST_NOISE:
            raise PortError(f"--noise must be 0 to {MOST_NOISE}, a share of the post gates' value, got {self.noise}")
        if self.streams is not None and not 1 <= self.streams <= 64:
            raise PortError(f"--streams must be 1 to 64, got {self.streams}")


@dataclass
class UpcycleReport:
    """The result of an upcycling, or of a dry run.

    Attributes:
        pre, post, kept: the gates and the sums of H at the first site, without noise.
        factor: what the model's last norm is handed, as a multiple of what it is handed in the plain model.
        change: the largest change on the probe tokens behind that norm, as a fraction of the largest value.
        spread: how far the streams of the probe tokens lie apart at the end, as a fraction of their mean.
        whole: whether the target is a whole model, and not its hyper-connections alone.
        plain_tensors, plain_bytes: the tensors that are copied, and their size.
        tensors: name, shape and dtype of each tensor of hyper-connections.
        written: the path that was written; None for a dry run or a refusal.
    """

    source: str
    model_type: str
    target_layout: str
    dialect: str
    told_by: str
    streams: int
    dim: int
    layers: int
    head: bool
    dtype: str
    verdict: str = ROUNDING
    reason: str = ""
    pre: float = 0.0
    post: float = 0.0
    kept: float = 1.0
    factor: float = 1.0
    change: float = 0.0
    spread: float = 0.0
    probes: int = 0
    whole: bool = True
    plain_tensors: int = 0
    plain_bytes: int = 0
    nbytes: int = 0
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    settings_place: str = ""
    notes: list[str] = field(default_factory=list[str])
    tensors: dict[str, tuple[list[int], str]] = field(default_factory=dict[str, tuple[list[int], str]])
    written: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class UpcycleRefused(PortError):
    """The model's output would change by more than rounding, and that isn't allowed.

    Attributes:
        report: the report with the measurements.
    """

    def __init__(self, message: str, status: int, report: UpcycleReport):
        super().__init__(message, status)
        self.report = report
