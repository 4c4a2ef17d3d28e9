"""Signs in the weights themselves that something went wrong with a checkpoint before it came here."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from conformance.porter.convert import Converted
from conformance.porter.errors import PortError
from conformance.porter.model import Model
from conformance.porter.probe import Probes, activations
from conformance.porter.site import NORM, SiteKey
from conformance.porter.verdict import APPROXIMATE, Reason, Verdict

NARROW = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
TOKENS = 4
ANOTHER_FUNCTION = Verdict((Reason(APPROXIMATE, ""),))
"""The verdict for comparing weights that aren't held to any bound."""


def signs(model: Model) -> Iterator[str]:
    """A line for each sign of damage in the weights of a model."""
    model.prepare()
    for site in model.sites:
        try:
            weights = model.load(site)
        except PortError as error:
            yield str(error)
            continue
        for name, value in weights.items():
            yield from _of_weight(f"{site}, {name}", name, value)
        if len({str(value.dtype) for value in weights.values()}) > 1:
            yield f"{site}: its tensors have different dtypes"
    yield from _narrow(model)


def _of_weight(label: str, name: str, value: np.ndarray) -> Iterator[str]:
    bad = int(np.count_nonzero(~np.isfinite(value)))
    if bad:
        yield f"{label}: {bad} of {value.size} values aren't finite"
        return
    if name.endswith("_scale") and not value.any():
        yield f"{label} is 0: the projection has no effect"
    elif name == NORM:
        yield from _of_norm(label, value.astype(np.float64))
    elif name.endswith(("_alpha", "_fn")) and not value.any():
        yield f"{label} is all zeros"
    elif name.endswith(("_alpha", "_fn")) and _on_the_grid(value):
        yield (
            f"{label} holds only bfloat16 numbers in a {value.dtype} tensor: it was rounded before it was stored, "
            f"which no port can undo"
        )


def _of_norm(label: str, value: np.ndarray) -> Iterator[str]:
    zeros = int(np.count_nonzero(value == 0))
    middle = float(np.median(value))
    if zeros:
        yield f"{label} has {zeros} zeros: folding it can't be undone"
    if abs(middle) < 0.25:
        yield f"{label} is centred at {middle:.2g}: the norm multiplies by it, and not by 1 + it; was 1 taken off?"
    elif 1.75 < middle < 2.25:
        yield f"{label} is centred at {middle:.2g}: was 1 added to it twice?"


def _on_the_grid(value: np.ndarray) -> bool:
    """Whether every value of a wider tensor is a bfloat16 number, which for so many would be no accident."""
    if str(value.dtype) in NARROW or value.size < 16 or len(np.unique(value)) < 4:
        return False
    with np.errstate(over="ignore"):
        return bool(np.array_equal(value.astype(ml_dtypes.bfloat16).astype(value.dtype), value))


def _narrow(model: Model) -> Iterator[str]:
    """A line on how far the rounding of float32 weights to a narrow dtype moves the results of the sites in it.

    The weights before the rounding are unknown: numbers that round to these are drawn, and both are evaluated.
    """
    narrow = sorted({*model.dtypes} & {*NARROW})
    if not narrow:
        return
    probes = Probes(activations(TOKENS, model.streams, model.dim, 0), model.parameters, model.parameters)
    largest: dict[str, float] = {}
    for site in model.sites:
        if model.sizes[site][:2] != (model.streams, model.dim):
            continue
        try:
            weights = model.load(site)
        except PortError:
            continue
        if not all(np.isfinite(value).all() for value in weights.values()):
            continue
        before = {name: _before(site, name, value) for name, value in weights.items()}
        row = probes.project(site, before, weights, Converted(dict(weights)))
        (deviation,) = probes.measure([row], ANOTHER_FUNCTION)
        largest |= {name: max(largest.get(name, 0.0), value) for name, value in deviation.measured.items()}
    figures = ", ".join(f"{name} by {value:.1g}" for name, value in largest.items())
    yield (
        f"tensors are {', '.join(narrow)}, and the software keeps them in float32: on {TOKENS} probe tokens the "
        f"rounding of float32 weights to these moves {figures}"
    )


def _before(site: SiteKey, name: str, value: np.ndarray) -> np.ndarray:
    """Numbers that round to these, drawn from the half units around each; wider ones as they are."""
    if str(value.dtype) not in NARROW:
        return value
    wide = value.astype(np.float64)
    unit = np.abs(np.spacing(np.abs(value)).astype(np.float64)) if value.dtype == np.float16 else _spacing(wide)
    drawn = np.random.default_rng(zlib.crc32(f"{site} {name}".encode())).uniform(-0.5, 0.5, value.shape)
    return wide + unit * drawn


def _spacing(value: np.ndarray) -> np.ndarray:
    """Distance of bfloat16 numbers around each value."""
    return np.exp2(np.floor(np.log2(np.maximum(np.abs(value), 2.0**-126))) - 7)
