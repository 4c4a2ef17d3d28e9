"""What a case file must hold; everything else is told in one line (fixtures/README.md)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from conformance.cases.description import CaseDescription, StageDescription
from conformance.cases.dialects import Parameters, check, check_sizes
from conformance.files.places import CaseError
from conformance.files.problems import shown
from conformance.files.reading import Scalar
from conformance.stages import BRANCHES, STAGES, head_shapes, layer_shapes, residual_columns

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
CONTRACTS = ("float64", "float32", "tf32", "mixing", "activation")
LAYOUTS = ("contiguous", "strided")
LONGEST_NAME = 500
OPTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "reduce": {"how": ("sum", "mean", "carried")},
    "layer": {"branch": BRANCHES},
    "stack": {"reduce": ("sum", "mean", "carried", "none")},
}
"""The options that a stage must have, and what each may be; a stack has ``layers`` too."""
UPDATES: dict[str, tuple[int, ...]] = {"load_balance_loss": (), "moe_bias_updates": (3,)}
WITHOUT_TOKENS = ("norm_scale", "branch_scale", *UPDATES)
"""Inputs and outputs that have no batch and no seq."""


def _wrong(path: Path, problem: str) -> CaseError:
    return CaseError(f"{path}: {problem}")


def _one_of(path: Path, place: str, kind: str, name: Scalar, known: Collection[str]) -> None:
    if name not in known:
        raise _wrong(path, f"{place}: unknown {kind} {shown(name)}, expected one of {', '.join(known)}")


def _check_name(path: Path, place: str, name: str) -> None:
    """Refuses a name that a terminal would act on, or that nobody can read: it stands in every report."""
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise _wrong(
            path, f"{place}: expected a name of at most {LONGEST_NAME} printable characters, got {shown(name)}"
        )


def check_description(path: Path, case: CaseDescription) -> None:
    """The description of a case, before any tensor is read.

    Raises:
        CaseError: one line with the file, the place in it, what was expected and what came.
    """
    for place, name in (("id", case.id), ("family", case.family), ("dialect", case.dialect)):
        _check_name(path, place, name)
    _one_of(path, "layout", "layout", case.layout, LAYOUTS)
    for stage, entry in case.stages.items():
        _one_of(path, "stages", "stage", stage, STAGES)
        _check_stage(path, stage, entry)
    for stage in case.bounds:
        _one_of(path, "bounds", "stage", stage, case.stages)
    names: set[str] = set()
    for number, variant in enumerate(case.variants):
        place = f"variants[{number}]"
        _check_name(path, f"{place}.name", variant.name)
        _one_of(path, f"{place}.x", "dtype", variant.x, DTYPES)
        _one_of(path, f"{place}.weights", "dtype", variant.weights, DTYPES)
        _one_of(path, f"{place}.contract", "contract", variant.contract, CONTRACTS)
        if variant.name in names:
            raise _wrong(path, f"{place}.name: {shown(variant.name)} is given twice")
        names.add(variant.name)
        for stage in variant.stages:
            _one_of(path, f"{place}.stages", "stage", stage, case.stages)
            if variant.name not in case.bounds.get(stage, {}):
                raise _wrong(path, f"bounds of stage {stage} must have variant {variant.name}, got none")
    _check_parameters(path, case.values)


def _check_stage(path: Path, stage: str, entry: StageDescription) -> None:
    known = STAGES[stage]
    for kind, names, all_of_them in (
        ("input", entry.inputs, known.inputs),
        ("weight", entry.weights, known.weights),
        ("output", entry.outputs, known.outputs),
    ):
        for name in names:
            _one_of(path, f"stages.{stage}.{kind}s", f"{kind} of stage {stage}", name, all_of_them)
    for option, values in OPTIONS.get(stage, {}).items():
        _one_of(path, f"stages.{stage}.options.{option}", "value", entry.options.get(option), values)
    if stage == "stack":
        layers = entry.options.get("layers")
        if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
            said = f"expected an integer of at least 1, got {shown(layers)}"
            raise _wrong(path, f"stages.stack.options.layers: {said}")


def _check_parameters(path: Path, parameters: Parameters) -> None:
    for name in ("streams", "dim", "residual"):
        if name not in parameters:
            raise _wrong(path, f"parameters must have {name}")
    row = {name: value for name, value in parameters.items() if name not in ("streams", "dim")}
    check_sizes(parameters["streams"], parameters["dim"], parameters["residual"], f"{path}: parameters")
    check(row, f"{path}: parameters")


def _endings(case: CaseDescription) -> dict[str, tuple[int, ...]]:
    """The last axes that each input, weight and output must have (fixtures/README.md, 10 and 11)."""
    parameters = case.values
    n: int = parameters["streams"]
    dim: int = parameters["dim"]
    logits = (residual_columns(n, "permutations"),) if parameters["residual"] == "permutations" else (n, n)
    weights = {**layer_shapes(n, dim, parameters["residual"]), **head_shapes(n, dim)}
    named = {
        "x": (n, dim), "embedding": (dim,), "y": (dim,), "u": (dim,), "pre": (n,), "post": (n,), "carried": (n,),
        "H": (n, n), "logits": logits, "norm_scale": (dim,), "branch_scale": (dim,), **UPDATES,
    }  # fmt: skip
    endings = {f"input/{name}": ending for name, ending in named.items()}
    endings |= {f"weight/{name}": shape for name, shape in weights.items()}
    for stage, entry in case.stages.items():
        whole = stage in ("expand", "post", "layer") or entry.options.get("reduce") == "none"
        for output in entry.outputs:
            endings[f"expected/{stage}/{output}"] = {**named, "out": (n, dim) if whole else (dim,)}[output]
    return endings


def check_tensors(path: Path, case: CaseDescription, tensors: Mapping[str, np.ndarray], infinite: bool = False) -> None:
    """Names, dtypes, shapes and finiteness, before anything is run.

    Args:
        infinite: whether all tensors but the cotangents may have NaN and infinities.

    Raises:
        CaseError: one line with the file, the tensor, what was expected and what came.
    """
    _check_names(path, case, tensors)
    endings = _endings(case)
    layers = case.stages["stack"].options["layers"] if "stack" in case.stages else 0
    tokens: tuple[int, ...] | None = None
    for name in sorted(tensors, key=lambda k: not k.startswith(("input/", "weight/"))):  # the rest is held to these
        value = tensors[name]
        kind, _, rest = name.partition("/")
        stored = [np.dtype(np.float64)] if kind in ("expected", "gradient", "magnitude") else list(DTYPES.values())
        if value.dtype not in stored:
            raise _wrong(path, f"{name} must be {' or '.join(map(str, stored))}, got {value.dtype}")
        with np.errstate(invalid="ignore"):  # a signalling NaN
            finite = np.isfinite(value.astype(np.float64)).all()
        if not finite and (not infinite or kind == "cotangent"):
            raise _wrong(path, f"{name} must be finite, got NaN or infinity")
        ending = endings.get(name, ())
        if value.shape[value.ndim - len(ending) :] != ending:
            raise _wrong(path, f"{name} must end in {list(ending)}, got {list(value.shape)}")
        if kind == "weight":
            whole = (layers, *ending) if layers else ending
            if value.shape != whole:
                raise _wrong(path, f"{name} must have shape {list(whole)}, got {list(value.shape)}")
        elif kind in ("input", "expected"):
            before = value.shape[: value.ndim - len(ending)]
            if rest.rpartition("/")[2] in WITHOUT_TOKENS:
                if before:
                    raise _wrong(path, f"{name} must have shape {list(ending)}, got {list(value.shape)}")
            elif len(before) != 2 or before != (tokens := tokens or before):
                said = f"[batch, seq] = {list(tokens or ())}" if tokens else "two axes, batch and seq,"
                raise _wrong(path, f"{name} must have {said} before {list(ending)}, got {list(value.shape)}")
        _check_partner(path, name, tensors)
    _check_bounds(path, case, tensors)


def _check_partner(path: Path, name: str, tensors: Mapping[str, np.ndarray]) -> None:
    """A cotangent has its output's shape, a gradient and a magnitude that of their input or weight."""
    kind, _, rest = name.partition("/")
    shape = tensors[name].shape
    if kind == "cotangent" and shape != tensors[f"expected/{rest}"].shape:
        expected = tensors[f"expected/{rest}"].shape
        raise _wrong(path, f"cotangent and expected of {rest} must agree, got {shape} and {expected}")
    if kind in ("gradient", "magnitude"):
        source = rest.split("/", 1)[1]
        of = tensors.get(f"input/{source}", tensors.get(f"weight/{source}"))
        if of is not None and of.shape != shape:
            raise _wrong(path, f"{name} must have the shape of its input, {list(of.shape)}, got {list(shape)}")


def _check_bounds(path: Path, case: CaseDescription, tensors: Mapping[str, np.ndarray]) -> None:
    for stage, variants in case.bounds.items():
        start = f"gradient/{stage}/"
        needed = [*case.stages[stage].outputs, *(f"d/{k.removeprefix(start)}" for k in tensors if k.startswith(start))]
        for variant, bounds in variants.items():
            absent = [name for name in needed if name not in bounds]
            if absent:
                raise _wrong(path, f"bounds of {stage} in {variant} must have {', '.join(absent)}, got none")


def _check_names(path: Path, case: CaseDescription, tensors: Mapping[str, np.ndarray]) -> None:
    wanted: set[str] = set()
    optional: set[str] = set()
    for stage, entry in case.stages.items():
        wanted |= {f"input/{k}" for k in entry.inputs} | {f"weight/{k}" for k in entry.weights}
        for output in entry.outputs:
            wanted |= {f"cotangent/{stage}/{output}", f"expected/{stage}/{output}"}
        optional |= {f"{kind}/{stage}/{k}" for kind in ("gradient", "magnitude") for k in entry.inputs + entry.weights}
    missing, surplus = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted - optional)
    if missing or surplus:
        raise _wrong(path, f"missing tensors {missing or 'none'}, surplus tensors {surplus or 'none'}")
