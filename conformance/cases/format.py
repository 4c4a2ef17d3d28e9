"""What a case file must hold; everything else is told in one line (fixtures/README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from conformance.cases.dialects import DialectError, check, check_sizes
from conformance.files.places import CaseError
from conformance.stages import STAGES, head_shapes, layer_shapes, residual_columns

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
CONTRACTS = ("float64", "float32", "tf32", "mixing", "activation")
LAYOUTS = ("contiguous", "strided")
REQUIRED = ("id", "family", "why", "clause", "dialect", "overrides", "parameters", "layout", "quick", "stages",
            "variants", "bounds")  # fmt: skip
STAGE_KEYS = ("inputs", "weights", "outputs", "options")
VARIANT_KEYS = ("name", "x", "weights", "contract", "stages")


def _one_of(path: Path, kind: str, name: Any, known: Any) -> None:
    if name not in known:
        raise CaseError(f"{path}: unknown {kind} {name!r}, expected one of {', '.join(known)}")


def _keys(path: Path, what: str, entry: Any, keys: tuple[str, ...]) -> None:
    absent = [k for k in keys if k not in entry] if isinstance(entry, dict) else list(keys)
    if absent:
        raise CaseError(f"{path}: {what} must have {', '.join(absent)}")


def check_description(path: Path, case: Any) -> None:
    """The JSON of a case, before any tensor is read.

    Raises:
        CaseError: one line with the file, what was expected and what came.
    """
    _keys(path, "the case", case, REQUIRED)
    _one_of(path, "layout", case["layout"], LAYOUTS)
    for stage, entry in case["stages"].items():
        _one_of(path, "stage", stage, STAGES)
        _keys(path, f"stage {stage}", entry, STAGE_KEYS)
        for kind in ("inputs", "weights", "outputs"):
            for name in entry[kind]:
                _one_of(path, f"{kind[:-1]} of stage {stage}", name, getattr(STAGES[stage], kind))
    for variant in case["variants"]:
        for role in ("x", "weights"):
            _one_of(path, "dtype", variant.get(role), DTYPES)
        _keys(path, "a variant", variant, VARIANT_KEYS)
        _one_of(path, "contract", variant["contract"], CONTRACTS)
        for stage in variant["stages"]:
            _one_of(path, f"stage of variant {variant['name']}", stage, case["stages"])
            if variant["name"] not in case["bounds"].get(stage, {}):
                raise CaseError(f"{path}: bounds of stage {stage} must have variant {variant['name']}, got none")
    parameters = case["parameters"]
    _keys(path, "parameters", parameters, ("streams", "dim", "residual"))
    row = {name: value for name, value in parameters.items() if name not in ("streams", "dim")}
    try:
        check_sizes(parameters["streams"], parameters["dim"], parameters["residual"], str(path))
        check(row, str(path))
    except DialectError as error:
        raise CaseError(str(error)) from error


def _endings(parameters: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The last axes that each input and weight must have."""
    n, dim = parameters["streams"], parameters["dim"]
    res = (residual_columns(n, "permutations"),) if parameters["residual"] == "permutations" else (n, n)
    weights = {**layer_shapes(n, dim, parameters["residual"]), **head_shapes(n, dim)}
    return {
        "input/x": (n, dim), "input/embedding": (dim,), "input/y": (dim,), "input/post": (n,), "input/H": (n, n),
        "input/carried": (n,),
        "input/logits": res, "input/norm_scale": (dim,), "input/branch_scale": (dim,),
        **{f"weight/{name}": shape for name, shape in weights.items()},
    }  # fmt: skip


def check_tensors(path: Path, case: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Names, dtypes, shapes and finiteness, before anything is run.

    Raises:
        CaseError: one line with the file, the tensor, what was expected and what came.
    """
    _check_names(path, case, tensors)
    endings = _endings(case["parameters"])
    layers = case["stages"].get("stack", {}).get("options", {}).get("layers")
    for name in sorted(tensors, key=lambda k: not k.startswith(("input/", "weight/"))):  # the rest is held to these
        value = tensors[name]
        kind, _, rest = name.partition("/")
        stored = [np.dtype(np.float64)] if kind in ("expected", "gradient", "magnitude") else list(DTYPES.values())
        if value.dtype not in stored:
            raise CaseError(f"{path}: {name} must be {' or '.join(map(str, stored))}, got {value.dtype}")
        if not np.isfinite(value.astype(np.float64)).all():
            raise CaseError(f"{path}: {name} must be finite, got NaN or infinity")
        ending = endings.get(name, ())
        if value.shape[value.ndim - len(ending) :] != ending:
            raise CaseError(f"{path}: {name} must end in {list(ending)}, got {list(value.shape)}")
        whole = (layers, *ending) if layers else ending
        if kind == "weight" and value.shape != whole:
            raise CaseError(f"{path}: {name} must have shape {list(whole)}, got {list(value.shape)}")
        if kind in ("cotangent", "expected"):
            other = tensors[f"{'expected' if kind == 'cotangent' else 'cotangent'}/{rest}"]
            if value.shape != other.shape:
                raise CaseError(
                    f"{path}: cotangent and expected of {rest} must agree, got {value.shape} and {other.shape}"
                )
        if kind in ("gradient", "magnitude"):
            source = rest.split("/", 1)[1]
            of = tensors.get(f"input/{source}", tensors.get(f"weight/{source}"))
            if of is not None and of.shape != value.shape:
                raise CaseError(
                    f"{path}: {name} must have the shape of its input, {list(of.shape)}, got {list(value.shape)}"
                )
    for stage, variants in case["bounds"].items():
        for variant, bounds in variants.items():
            absent = [k for k in case["stages"][stage]["outputs"] if k not in bounds]
            absent += [f"d/{k.split('/', 2)[2]}" for k in tensors
                       if k.startswith(f"gradient/{stage}/") and f"d/{k.split('/', 2)[2]}" not in bounds]  # fmt: skip
            if absent:
                raise CaseError(f"{path}: bounds of {stage} in {variant} must have {', '.join(absent)}, got none")


def _check_names(path: Path, case: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    wanted, optional = set(), set()
    for stage, entry in case["stages"].items():
        wanted |= {f"input/{k}" for k in entry["inputs"]} | {f"weight/{k}" for k in entry["weights"]}
        for output in entry["outputs"]:
            wanted |= {f"cotangent/{stage}/{output}", f"expected/{stage}/{output}"}
        optional |= {
            f"{kind}/{stage}/{k}" for kind in ("gradient", "magnitude") for k in (*entry["inputs"], *entry["weights"])
        }
    missing, surplus = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted - optional)
    if missing or surplus:
        raise CaseError(f"{path}: missing tensors {missing or 'none'}, surplus tensors {surplus or 'none'}")
