"""Reads the files of `fixtures/trajectories` (fixtures/trajectories/README.md, "The files")."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from conformance.cases.tensors import read_file
from conformance.cases.trajectories.model import TRAJECTORIES, shapes
from conformance.files.places import CaseError, fixtures
from conformance.files.reading import open_bytes, read_text

FORMAT = "mhc-conformance-trajectory/1"
MANIFEST_FORMAT = "mhc-conformance-trajectories/1"
DTYPES = ("float32", "float64")


class Promised(msgspec.Struct, frozen=True):
    """What the manifest says of a file."""

    sha256: str
    bytes: int


class Manifest(msgspec.Struct, frozen=True):
    """The list of the files."""

    format: str
    count: int
    files: dict[str, Promised]


class Told(msgspec.Struct, frozen=True):
    """The metadata of a file: what a step is told, how many there are, and after which the weights are recorded."""

    dialect: str
    config: dict[str, Any]
    steps: int
    kept: tuple[int, ...]
    K: float


@dataclass(frozen=True)
class Trajectory:
    """One file.

    Attributes:
        told: its metadata.
        weights: float32 initial values of each weight.
        tokens: int32 ``[steps, batch, seq + 1]``.
        expected: float64 ``loss [steps]``, ``gradient_norm [steps]``, ``gradient_norm/NAME [steps]`` and, for each step
            that is kept, ``weight/STEP/NAME``.
        bounds: for each dtype, how far each of these may be off: a number for each step, one for each kept weight.
    """

    told: Told
    weights: Mapping[str, np.ndarray]
    tokens: np.ndarray
    expected: Mapping[str, np.ndarray]
    bounds: Mapping[str, Mapping[str, np.ndarray]]

    @property
    def dialect(self) -> str:
        return self.told.dialect

    def config(self, step: int) -> dict[str, Any]:
        """What an implementation is told with one step, the first being 1."""
        return {**self.told.config, "step": step}


def folder() -> Path:
    return fixtures() / "trajectories"


def manifest(where: Path | None = None) -> Manifest:
    """The list of the files.

    Raises:
        CaseError: it can't be read.
    """
    path = (where or folder()) / "MANIFEST.json"
    try:
        found = msgspec.json.decode(read_text(path), type=Manifest)
    except (OSError, ValueError) as error:
        raise CaseError(f"{path}: expected the list of trajectories, got none that can be read ({error})") from error
    if found.format != MANIFEST_FORMAT or found.count != len(found.files):
        raise CaseError(
            f"{path}: expected format {MANIFEST_FORMAT} and as many files as it counts, got {found.format!r}"
        )
    if wrong := [name for name in found.files if name != f"{Path(name).stem}.safetensors"]:
        raise CaseError(f"{path}: expected names of files in its folder, got {wrong[0]!r}")
    return found


def verify(where: Path | None = None) -> list[str]:
    """A line for each file that isn't, to the bit, what the manifest promises.

    Raises:
        CaseError: the manifest can't be read.
    """
    where = where or folder()
    promised = manifest(where).files
    problems = [
        f"{name}: not in the manifest" for name in sorted({p.name for p in where.glob("*.safetensors")} - set(promised))
    ]
    for name, entry in promised.items():
        try:
            with open_bytes(where / name) as file:
                content = file.read()
        except OSError as error:
            problems.append(f"{name}: can't be read ({error.strerror or error})")
            continue
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            problems.append(f"{name}: its bytes aren't those of the manifest")
    return problems


def load(dialect: str, where: Path | None = None) -> Trajectory:
    """The trajectory of a dialect.

    Raises:
        CaseError: there is none, or its file can't be read or isn't whole.
    """
    if dialect not in TRAJECTORIES:
        raise CaseError(f"{dialect}: expected a dialect with a trajectory, {', '.join(TRAJECTORIES)}")
    path = (where or folder()) / f"{dialect}.safetensors"
    metadata, tensors = read_file(path)
    if metadata.get("format") != FORMAT:
        raise CaseError(f"{path}: expected format {FORMAT}, got {metadata.get('format')!r}")
    try:
        told = msgspec.convert(json.loads(metadata.get("trajectory", "")), Told)
    except (ValueError, msgspec.MsgspecError) as error:
        raise CaseError(
            f"{path}: expected the description of a trajectory, got none that can be read ({error})"
        ) from error
    found = Trajectory(
        told,
        _under("weight/", tensors),
        tensors.get("tokens", np.zeros((0, 0, 0), np.int32)),
        _under("expected/", tensors),
        {dtype: _under(f"bound/{dtype}/", tensors) for dtype in DTYPES},
    )
    _check(path, found)
    return found


def _under(prefix: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _check(path: Path, found: Trajectory) -> None:
    """Whether a file has every tensor, in its shape."""
    steps = found.told.steps
    try:
        table = shapes(found.told.config)
    except (KeyError, TypeError, ValueError) as error:
        raise CaseError(
            f"{path}: expected the parameters of a dialect in its description, got others ({error})"
        ) from error
    series = ["loss", "gradient_norm", *(f"gradient_norm/{name}" for name in table)]
    kept = {f"weight/{step}/{name}": shape for step in found.told.kept for name, shape in table.items()}
    expected = {name: (steps,) for name in series} | kept
    wanted = [
        (f"{path}: its initial weights", table, found.weights),
        (f"{path}: its expected values", expected, found.expected),
        *(
            (
                f"{path}: its bounds in {dtype}",
                {name: (steps,) for name in series} | dict.fromkeys(kept, ()),
                found.bounds[dtype],
            )
            for dtype in DTYPES
        ),
    ]
    for what, shapes_of, values in wanted:
        wrong = sorted(set(shapes_of) ^ set(values)) or [n for n, s in shapes_of.items() if values[n].shape != s]
        if wrong:
            raise CaseError(
                f"{what}: expected each tensor of the model in its shape, got another for {', '.join(wrong[:3])}"
            )
    if found.tokens.ndim != 3 or found.tokens.shape[0] != steps:
        raise CaseError(f"{path}: expected tokens of {steps} steps, got the shape {list(found.tokens.shape)}")
