"""The JSON object of a case file as a record (fixtures/README.md, "The JSON object"); its reader ignores other keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta, Struct

from conformance.files.places import CaseError
from conformance.files.reading import Reader, Scalar

Text = Annotated[str, Meta(min_length=1)]
Size = Annotated[float, Meta(ge=0)]


@dataclass(frozen=True)
class Variant:
    """The dtypes that a case is run in."""

    name: str
    x: str
    weights: str
    contract: str
    stages: tuple[str, ...]

    @property
    def secondary(self) -> bool:
        """True where the weights are in x's narrow dtype, or in float32 under a float64 x."""
        return self.weights != ("float64" if self.x == "float64" else "float32")


class Bound(Struct, frozen=True, gc=False):
    """What one tensor is allowed to be off by.

    Attributes:
        bound: the largest error beyond the last rounding.
        honest: the error of the ensemble that the bound comes from.
        K, scale: how the bound was made of it.
    """

    bound: Size
    honest: Size
    K: Size
    scale: Size


Bounds = dict[str, Bound]
"""By tensor: an output's name, ``d/<input>`` for a gradient, ``H stochastic`` for the sums of H."""


class StageDescription(Struct, frozen=True):
    """The names of a stage's inputs, weights and outputs, and its options, which an implementation is told."""

    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]
    options: dict[str, Scalar]


class CaseDescription(Struct, frozen=True):
    """Everything that a case file says beside its tensors.

    Attributes:
        why: the mistake that the case catches.
        clause: the section of the mathematics that it is about.
        dialect: a row's name.
        overrides: parameters that depart from that row.
        parameters: all of them, with ``streams`` and ``dim``.
        layout: ``contiguous`` or ``strided``.
        quick: whether it belongs to the quick subset.
        bounds: by stage, then by the name of a variant.
    """

    id: Text
    family: Text
    why: str
    clause: str
    dialect: Text
    overrides: dict[str, Scalar]
    parameters: dict[str, Scalar]
    layout: str
    quick: bool
    stages: dict[str, StageDescription]
    variants: tuple[Variant, ...]
    bounds: dict[str, dict[str, Bounds]]

    @property
    def values(self) -> dict[str, Any]:
        """The parameters, each of the type that `conformance.cases.rules.domains` says."""
        return self.parameters


DESCRIPTION = Reader(CaseDescription, "the description of a case", CaseError)
