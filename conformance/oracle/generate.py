"""Writes the golden corpus: expected values from ball arithmetic, bounds from the honest ensemble."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from conformance.cases.case import FORMAT, INFINITE_FORMAT, CaseError
from conformance.cases.tensors import read_file
from conformance.files import atomic, temporary
from conformance.oracle.arithmetic import Arithmetic, Array
from conformance.oracle.balls import BallArithmetic, certified
from conformance.oracle.build import Draft, build
from conformance.oracle.evaluate import evaluate
from conformance.oracle.families import wishes
from conformance.oracle.floats import FloatArithmetic
from conformance.oracle.non_finite import mark_free, plant
from conformance.oracle.pool import processes
from conformance.oracle.residual import axes
from conformance.oracle.style import GATES, K_FLOAT32, K_ROUNDED, K_STACK, K_SUMS, SUMS, Style, ensemble

MANIFEST_FORMAT = "mhc-conformance-manifest/1"


def case_ids() -> list[str]:
    ids = [wish.id for wish in wishes()]
    repeated = {i for i in ids if ids.count(i) > 1}
    if repeated:
        raise ValueError(f"case ids must be unique, these are not: {sorted(repeated)}")
    return ids


def family_names() -> list[str]:
    """The families, in their order."""
    return list(dict.fromkeys(wish.family for wish in _WISHES))


def complete(case: Draft) -> bytes:
    """Completes a case with expected values and bounds; returns the bytes of its file."""
    _inputs_from_oracle(case)
    plant(case)
    infinite = bool(case.non_finite)
    tensors: dict[str, np.ndarray] = {}
    bounds: dict[str, Any] = {}
    for stage, entry in case.stages.items():
        inputs = {k: case.tensors[k] for k in (*entry["inputs"], *entry["weights"])}
        cotangents = case.cotangents[stage]
        routed = {k: v for k, v in cotangents.items() if k not in ("load_balance_loss", "moe_bias_updates")}

        run = _evaluation(case, stage, inputs, routed)
        expected = certified(lambda run=run: run(BallArithmetic()), f"{case.id}, stage {stage}", infinite)
        if infinite:
            with np.errstate(all="ignore"):
                mark_free(expected, run, dict.fromkeys(_contract(v) for v in case.variants if stage in v["stages"]))
        for name, value in expected.items():
            kind, _, tensor = name.rpartition("/")
            tensors[f"{ {'': 'expected', 'd': 'gradient', 'm': 'magnitude'}[kind] }/{stage}/{tensor}"] = value
        for name in set(cotangents) - set(routed):  # handed through by the layer
            tensors[f"expected/{stage}/{name}"] = case.tensors[name].astype(np.float64)
            if case.gradients:
                tensors[f"gradient/{stage}/{name}"] = cotangents[name].astype(np.float64)
        tensors.update({f"cotangent/{stage}/{k}": v for k, v in cotangents.items()})
        with np.errstate(all="ignore" if infinite else None):
            bounds[stage] = _bounds(case, stage, expected, run)
        for name in set(cotangents) - set(routed):
            for row in bounds[stage].values():
                row[name] = row[f"d/{name}"] = {"bound": 0.0, "honest": 0.0, "K": 0.0, "scale": 1.0}
    used_inputs = {k for entry in case.stages.values() for k in entry["inputs"]}
    used_weights = {k for entry in case.stages.values() for k in entry["weights"]}
    tensors.update({f"input/{k}": _stored(k, case) for k in used_inputs})
    tensors.update({f"weight/{k}": case.tensors[k].astype(np.float32) for k in used_weights})
    described = {
        k: getattr(case, k)
        for k in ("id", "family", "why", "clause", "dialect", "overrides", "parameters", "layout", "quick", "stages",
                  "variants")
    }  # fmt: skip
    metadata = {
        "format": INFINITE_FORMAT if infinite else FORMAT,
        "case": json.dumps({**described, "bounds": bounds}, sort_keys=True),
    }
    ordered = {k: np.ascontiguousarray(tensors[k]).reshape(tensors[k].shape) for k in sorted(tensors)}
    return canonical_bytes(ordered, metadata)


def _evaluation(
    case: Draft, stage: str, inputs: dict[str, np.ndarray], cotangents: dict[str, np.ndarray]
) -> Callable[[Arithmetic], dict[str, Array]]:
    """The stage as a function of the arithmetic; without gradients if the case has none."""

    def run(A: Arithmetic) -> dict[str, Array]:
        values = evaluate(stage, inputs, cotangents, case.parameters, case.stages[stage]["options"], A)
        return {k: v for k, v in values.items() if case.gradients or "/" not in k}

    return run


def canonical_bytes(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    """safetensors bytes that depend on the content alone: the header is written again, with sorted keys."""
    raw = save(tensors, metadata=None)
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    text = json.dumps({"__metadata__": metadata, **header}, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def _stored(name: str, case: Draft) -> np.ndarray:
    """An input as it is stored: those like x in bfloat16 if their values fit, all others in float32."""
    value = case.tensors[name].astype(np.float32)
    narrow = value.astype(ml_dtypes.bfloat16)
    fits = np.array_equal(narrow.astype(np.float32), value, equal_nan=True) and any(
        v["x"] in ("bfloat16", "float16") for v in case.variants
    )
    return narrow if fits and name in ("x", "y", "embedding", "norm_scale", "branch_scale") else value


def _inputs_from_oracle(case: Draft) -> None:
    """Sets post's own inputs to the oracle's gates and H for this x, rounded to the grid of the coefficients."""
    if "post" not in case.stages or "H" in case.tensors:
        return
    weights = case.stages["coefficients"]["weights"]
    inputs = {"x": case.tensors["x"], **{k: case.tensors[k] for k in weights}}
    cotangents = case.cotangents["coefficients"]
    gates = certified(
        lambda: {
            k: v
            for k, v in evaluate("coefficients", inputs, cotangents, case.parameters, {}, BallArithmetic()).items()
            if k in ("post", "H")
        },
        f"{case.id}, inputs of post",
    )
    for name, value in gates.items():
        value = value.astype(np.float32)
        if case.parameters["coefficients"] == "activation":
            value = value.astype(ml_dtypes.bfloat16).astype(np.float32)
            value = np.where(np.abs(value) < 2.0**-16, np.float32(0), value)
        case.tensors[name] = value


WIDE = ("float32", None)
"""The contract and narrow dtype of a float32 variant, as `_contract` has them."""


def _bounds(
    case: Draft, stage: str, expected: dict[str, np.ndarray], run: Callable[[Arithmetic], dict[str, Array]]
) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    measured: dict[tuple[str, str | None], tuple[dict[str, float], bool]] = {}
    last_axis = axes(case.parameters)[1] if case.parameters["guard"] == "none" else None
    for variant in case.variants:
        if stage not in variant["stages"]:
            continue
        contract, narrow = key = _contract(variant)
        if narrow and key not in measured:
            probe = FloatArithmetic(Style(round_weights=True, round_logits=True), contract, narrow)
            run(probe)
            if not probe.rounded:  # nothing narrow happens before the last rounding: the float32 figures
                measured[key] = _honest(expected, run, "float32", None, last_axis)
        if key not in measured:
            measured[key] = _honest(expected, run, contract, narrow, last_axis)
        honest, rounded = measured[key]
        factors = [(honest, (K_STACK if stage == "stack" else K_ROUNDED) if rounded else K_FLOAT32)]
        if rounded:  # a tensor that no narrow rounding reaches has float32's figures
            if WIDE not in measured:
                measured[WIDE] = _honest(expected, run, *WIDE, last_axis)
            factors.append((measured[WIDE][0], K_FLOAT32))
        rows[variant["name"]] = {
            name: max(
                (_row(name, expected[name], errors[name], factor, contract, case) for errors, factor in factors),
                key=lambda row: row["bound"],
            )
            for name in honest
            if name != SUMS
        }
        if SUMS in honest and not case.exact:
            error = honest[SUMS]
            rows[variant["name"]][SUMS] = {"bound": K_SUMS * error, "honest": error, "K": K_SUMS, "scale": 1.0}
    return rows


def _contract(variant: Mapping[str, Any]) -> tuple[str, str | None]:
    """What an honest evaluation of a variant keeps, and the dtype of x if it is narrow."""
    narrow = variant["x"] if variant["x"] in ("bfloat16", "float16") else None
    return variant["contract"] if narrow or variant["contract"] in ("float64", "tf32") else "float32", narrow


def _row(name: str, expected: np.ndarray, honest: float, factor: float, contract: str, case: Draft) -> dict[str, float]:
    scale = 1.0 if name in GATES else float(np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected)))
    if case.exact:
        if honest:
            raise ValueError(f"{case.id}: {name} is declared exact, yet an honest evaluation misses it by {honest:g}")
        return {"bound": 0.0, "honest": 0.0, "K": 0.0, "scale": scale}
    floor = (2.0**-53 if contract == "float64" else 2.0**-24) * scale
    return {"bound": factor * max(honest, floor), "honest": honest, "K": factor, "scale": scale}


def _honest(
    expected: dict[str, np.ndarray],
    run: Callable[[Arithmetic], dict[str, Array]],
    contract: str,
    narrow: str | None,
    last_axis: int | None,
) -> tuple[dict[str, float], bool]:
    """Largest error of the ensemble for each output and gradient, and whether narrow roundings took part.

    Args:
        last_axis: the axis of H whose sums are measured on dual potentials; None if none are used.
    """
    tensors = [name for name in expected if not name.startswith("m/")]
    worst = dict.fromkeys(tensors, 0.0)
    rounded = False
    for style in ensemble():
        arithmetic = FloatArithmetic(style, contract, narrow)
        values = run(arithmetic)
        rounded |= arithmetic.rounded
        if style.potentials and "H" in worst and last_axis is not None:
            # The exponential of a logarithm keeps no sum to (n + 2) u: what remains is measured.
            sums = (values["H"].astype(np.float64) - expected["H"]).sum(last_axis)
            sums = sums[np.isfinite(expected["H"].sum(last_axis))]
            worst[SUMS] = max(worst.get(SUMS, 0.0), float(np.max(np.abs(sums), initial=0.0)))
        for name in tensors:
            error = np.abs(values[name].astype(np.float64) - expected[name])[np.isfinite(expected[name])]
            if not np.isfinite(error).all():
                raise ValueError(f"{name} isn't finite in {contract}, {narrow or 'wide'}, {style}")
            worst[name] = max(worst[name], float(np.max(error, initial=0.0)))
    return worst, rounded


def _make(index: int) -> tuple[str, bytes]:
    wish = _WISHES[index]
    try:
        return wish.id, complete(build(wish))
    except Exception as error:
        raise RuntimeError(f"{wish.id}: {error}") from error


_WISHES = list(wishes())


def regenerate(
    target: Path,
    jobs: int = 2,
    check: bool = False,
    progress: Callable[[int, int], None] | None = None,
    families: Collection[str] = (),
) -> list[str]:
    """Rewrites the corpus in ``target`` and says what changed.

    Args:
        target: the folder of golden files.
        jobs: worker processes.
        check: only compare, write nothing.
        progress: called with (done, all) after each case.
        families: only compare the cases of these, and nothing that others have; needs ``check``.

    Returns:
        One line for each file added, removed or changed (with the largest difference).

    Raises:
        ValueError: families are given without ``check``, or one of them is unknown.
    """
    unknown = sorted(set(families) - set(family_names()))
    if unknown or (families and not check):
        raise ValueError(f"expected families of {', '.join(family_names())}, and check, got {', '.join(families)}")
    case_ids()
    indices = [k for k, wish in enumerate(_WISHES) if not families or wish.family in families]
    made: dict[str, bytes] = {}
    with processes(jobs) as pool:
        for done, (name, content) in enumerate(pool.imap_unordered(_make, indices, chunksize=4), 1):
            made[f"{name}.safetensors"] = content
            if progress:
                progress(done, len(indices))
    if families:
        return _differences(target, made)
    files = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in sorted(made.items())
    }
    manifest = {"format": MANIFEST_FORMAT, "count": len(files), "files": files}
    made["MANIFEST.json"] = (json.dumps(manifest, indent=1) + "\n").encode()
    target.mkdir(parents=True, exist_ok=True)
    changes = []
    for name in sorted({p.name for p in target.iterdir()} | set(made)):
        path, content = target / name, made.get(name)
        before = path.read_bytes() if path.exists() else None
        if before == content:
            continue
        changes.append(_change(name, before, content))
        if check:
            continue
        if content is None:
            path.unlink()
        else:
            atomic.write(path, content)
    return changes


def _differences(target: Path, made: Mapping[str, bytes]) -> list[str]:
    """One line for each file that isn't what was made."""
    changes = []
    for name, content in sorted(made.items()):
        path = target / name
        before = path.read_bytes() if path.exists() else None
        if before != content:
            changes.append(_change(name, before, content))
    return changes


def _tensors(path: Path, content: bytes) -> dict[str, np.ndarray]:
    path.write_bytes(content)
    return read_file(path).tensors


def _change(name: str, before: bytes | None, after: bytes | None) -> str:
    if before is None:
        return f"added    {name}"
    if after is None:
        return f"removed  {name}"
    if not name.endswith(".safetensors"):
        return f"changed  {name}"
    try:
        with temporary.within() as folder:
            old, new = (_tensors(Path(folder) / k, content) for k, content in (("old", before), ("new", after)))
    except CaseError as error:
        return f"changed  {name}: the old file can't be read ({error})"
    names = sorted(set(old) ^ set(new))
    largest, where = 0.0, ""
    for tensor in set(old) & set(new):
        if old[tensor].shape != new[tensor].shape or old[tensor].dtype != new[tensor].dtype:
            names.append(tensor)
            continue
        difference = np.abs(old[tensor].astype(np.float64) - new[tensor].astype(np.float64)).max(initial=0.0)
        if difference > largest:
            largest, where = float(difference), f" in {tensor}"
    other = f"; tensors added, removed or reshaped: {', '.join(names[:5])}" if names else ""
    return f"changed  {name}: largest difference {largest:.3g}{where}{other}"
