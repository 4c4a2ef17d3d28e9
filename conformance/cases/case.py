"""Reads one case file and hands out its arrays in the dtypes of a variant."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from conformance.cases.description import DESCRIPTION, Bounds, CaseDescription, StageDescription, Variant
from conformance.cases.dialects import Parameters, dialect_names
from conformance.cases.format import DTYPES, check_description, check_tensors
from conformance.cases.tensors import read_file, read_metadata
from conformance.files.places import CaseError
from conformance.files.problems import shown
from conformance.files.reading import Scalar
from conformance.stages import COEFFICIENT, STAGES, WEIGHT

FORMAT = "mhc-conformance-case/1"
INFINITE_FORMAT = "mhc-conformance-case/2"
"""The format of a case whose inputs, weights or true values aren't all finite; otherwise it is the same."""


@dataclass(frozen=True)
class Item:
    """One stage of one case in one variant: what is run and compared at a time."""

    case: Case
    stage: str
    variant: Variant

    @property
    def id(self) -> str:
        return f"{self.case.id}::{self.stage}::{self.variant.name}"

    @property
    def config(self) -> dict[str, Any]:
        """What an implementation is told: parameters, dialect and the stage's options."""
        return {**self.case.parameters, "dialect": self.case.dialect, **self.case.stages[self.stage].options}

    def dtype(self, name: str) -> np.dtype:
        """The dtype of an input, a weight or an output in this variant."""
        stage = STAGES[self.stage]
        role = WEIGHT if name in stage.weights else {**stage.inputs, **stage.outputs}[name]
        return DTYPES[self._resolved(role)]

    def output_dtype(self, name: str) -> np.dtype:
        return DTYPES[self._resolved(STAGES[self.stage].outputs[name])]

    def _resolved(self, role: str) -> str:
        if role == COEFFICIENT:
            if self.variant.x == "float64":
                return "float64"
            return "float32" if self.case.parameters["coefficients"] == "float32" else self.variant.x
        return {"x": self.variant.x, WEIGHT: self.variant.weights}.get(role, role)

    def inputs(self) -> dict[str, np.ndarray]:
        """Inputs and weights under their names; fresh arrays, non-contiguous where the case says so."""
        entry = self.case.stages[self.stage]
        found = {k: self._cast(f"input/{k}", self._input_dtype(k)) for k in entry.inputs}
        found.update({k: self._cast(f"weight/{k}", DTYPES[self.variant.weights]) for k in entry.weights})
        if self.case.layout == "strided":
            found = {k: _strided(v) for k, v in found.items()}
        return found

    def _input_dtype(self, name: str) -> np.dtype:
        return DTYPES[self._resolved(STAGES[self.stage].inputs[name])]

    def cotangents(self) -> dict[str, np.ndarray]:
        outputs = self.case.stages[self.stage].outputs
        return {k: self._cast(f"cotangent/{self.stage}/{k}", self.output_dtype(k)) for k in outputs}

    def _cast(self, tensor: str, dtype: np.dtype) -> np.ndarray:
        value = self.case.tensors[tensor]
        with np.errstate(over="ignore"):  # what overflows isn't exact
            cast = value.astype(dtype)
        if not np.array_equal(cast.astype(np.float64), value.astype(np.float64), equal_nan=True):
            raise CaseError(
                f"{self.case.path}: {tensor} must be exact in {dtype}, as variant {self.variant.name} needs"
            )
        return cast

    @property
    def expected(self) -> dict[str, np.ndarray]:
        """float64 true values: ``<output>`` and ``d/<input>``."""
        return {
            ("d/" if kind == "gradient" else "") + name[len(f"{kind}/{self.stage}/") :]: value
            for kind in ("expected", "gradient")
            for name, value in self.case.tensors.items()
            if name.startswith(f"{kind}/{self.stage}/")
        }

    def magnitude(self, tensor: str) -> np.ndarray | None:
        return self.case.tensors.get(f"magnitude/{self.stage}/{tensor.removeprefix('d/')}")

    @property
    def bounds(self) -> Bounds:
        return self.case.bounds[self.stage][self.variant.name]


@dataclass(frozen=True)
class Case:
    """One case file, checked."""

    path: Path
    metadata: CaseDescription
    infinite: bool = False
    """Whether some of its inputs and true values may not be finite."""
    opened: str = ""
    """The hash of the metadata that it was opened with."""

    @property
    def id(self) -> str:
        return self.metadata.id

    @property
    def family(self) -> str:
        return self.metadata.family

    @property
    def why(self) -> str:
        return self.metadata.why

    @property
    def clause(self) -> str:
        return self.metadata.clause

    @property
    def dialect(self) -> str:
        return self.metadata.dialect

    @property
    def unpublished(self) -> bool:
        """Whether its dialect is a row of its own, from a file, that ``fixtures/dialects.json`` doesn't have."""
        return self.dialect not in dialect_names()

    @property
    def overrides(self) -> dict[str, Scalar]:
        return self.metadata.overrides

    @property
    def parameters(self) -> Parameters:
        return self.metadata.values

    @property
    def layout(self) -> str:
        return self.metadata.layout

    @property
    def quick(self) -> bool:
        return self.metadata.quick

    @property
    def stages(self) -> dict[str, StageDescription]:
        return self.metadata.stages

    @property
    def bounds(self) -> dict[str, dict[str, Bounds]]:
        return self.metadata.bounds

    @property
    def variants(self) -> tuple[Variant, ...]:
        return self.metadata.variants

    @cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """Every tensor of the file, read once.

        Raises:
            CaseError: it can't be read, or isn't the case any more that was opened.
        """
        metadata, tensors = read_file(self.path)
        if digest(metadata) != self.opened:
            raise CaseError(f"{self.path}: was replaced while it was read: it describes another case now; run it again")
        check_tensors(self.path, self.metadata, tensors, self.infinite)
        return tensors

    def items(self) -> list[Item]:
        return [
            Item(self, stage, variant) for stage in self.stages for variant in self.variants if stage in variant.stages
        ]


def _strided(value: np.ndarray) -> np.ndarray:
    """The same values, every second element of a larger array along the last axis."""
    if value.ndim == 0:
        return value
    wide = np.zeros((*value.shape[:-1], 2 * value.shape[-1]), value.dtype)
    wide[..., ::2] = value
    return wide[..., ::2]


def digest(metadata: Mapping[str, str]) -> str:
    """A hash of a file's metadata."""
    return hashlib.sha256(repr(sorted(metadata.items())).encode(errors="surrogatepass")).hexdigest()


def load_case(path: Path) -> Case:
    """Opens a case; its tensors are read and checked at their first use.

    Raises:
        CaseError: one line with the file, what was expected and what came.
    """
    metadata = read_metadata(path)
    if metadata.get("format") not in (FORMAT, INFINITE_FORMAT):
        expected = f"format {FORMAT!r} or {INFINITE_FORMAT!r}"
        raise CaseError(f"{path}: expected {expected} in the metadata, got {shown(metadata.get('format'))}")
    described = DESCRIPTION.decode(metadata.get("case", ""), str(path))
    check_description(path, described)
    return Case(path, described, metadata["format"] == INFINITE_FORMAT, digest(metadata))
