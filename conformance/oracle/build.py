"""From a family's wishes to one complete case: data, weights, stages and variants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conformance.cases.dialects import Dialect, edition, published
from conformance.oracle import data
from conformance.stages import HEAD_WEIGHTS, STAGES

CORE = ("float32-float32", "bfloat16-float32", "float16-float32", "float64-float64")
PURE = ("bfloat16-bfloat16", "float16-float16", "float64-float32")
PROJECTING = ("coefficients", "pre", "head", "layer")
LOGIT_SCALE = 1.4
PER_STREAM = (1, 0.25, 4, 0.5, 2, 1, 0.125, 1)


FRESH = "fresh"
"""What the ids of cases with a seed begin with."""
Elements = Sequence[tuple[tuple[int, ...], float]]
"""Places of a tensor, and the number that isn't finite which stands there."""


@dataclass
class Draft:
    """The contents of a case file before the oracle adds expected values and bounds."""

    id: str
    family: str
    why: str
    clause: str
    dialect: str
    overrides: dict[str, Any]
    parameters: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    variants: list[dict[str, Any]]
    tensors: dict[str, np.ndarray]
    cotangents: dict[str, dict[str, np.ndarray]]
    layout: str = "contiguous"
    quick: bool = False
    exact: bool = False
    gradients: bool = True
    non_finite: Mapping[str, Elements] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Wish:
    """The values that a family asks for; all others are generic.

    Attributes:
        dialect: the row's name, of which ids and data are made.
        row: the row itself; None for the published one of that name.
        stages: names, or (name, options) pairs.
        only: stages that are run in fewer variants than the rest, and which.
        fine: x and the projections keep all of float32's bits (then no narrow variants).
        weights: arrays that replace generated ones.
        tensors: inputs that replace generated ones.
        seed: of data that are made on the spot; None for a golden file's.
        non_finite: by input or weight, the elements that are NaN or infinite.
    """

    family: str
    why: str
    clause: str
    dialect: str
    label: str = ""
    streams: int = 4
    dim: int = 8
    lead: tuple[int, ...] = (3, 4)
    stages: Sequence[str | tuple[str, dict[str, Any]]] = ()
    variants: Sequence[str] = CORE
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    x_scale: float = 1.0
    weights: Mapping[str, np.ndarray | float] = field(default_factory=dict)
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    logit_deviation: float = 2.0
    fine: bool = False
    tf32: bool = False
    layers: int = 0
    layout: str = "contiguous"
    quick: bool = False
    exact: bool = False
    gradients: bool = True
    non_finite: Mapping[str, Elements] = field(default_factory=dict)
    row: Dialect | None = None
    seed: int | None = None

    @property
    def id(self) -> str:
        """Unique, and never used again for other data: a row whose function was corrected has its edition in it."""
        fresh = "" if self.seed is None else f"{FRESH}-{self.seed}"
        return "-".join(part for part in (fresh, self.family, self.label, self.dialect, edition(self.dialect)) if part)


def _float32(values: np.ndarray) -> np.ndarray:
    return np.asarray(values).astype(np.float32)


def stream_scales(streams: int) -> np.ndarray:
    """Powers of two that tell the streams from each other; beyond 8 the pattern repeats with other factors."""
    index = np.arange(streams)
    repeat = index // len(PER_STREAM) % 5
    return np.take(PER_STREAM, index % len(PER_STREAM)) * np.take([1, 0.5, 2, 0.25, 4], repeat)


def layer_weights(wish: Wish, p: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Weights of order 1: alphas 0.9, -1.3, 1.7; a norm weight of powers of two that isn't 1."""
    n, width = p["streams"], p["streams"] * p["dim"]
    columns = {"pre": n, "post": n, "res": math.factorial(n) if p["residual"] == "permutations" else n * n}
    if p["residual"] == "identity":
        del columns["res"]
    snap = _float32 if wish.fine else data.shared_grid
    weights: dict[str, np.ndarray] = {}
    for k, m in columns.items():
        weights[f"{k}_alpha"] = snap(data.normal(f"{wish.id}/{k}_alpha", (width, m)) * (LOGIT_SCALE / math.sqrt(width)))
        weights[f"{k}_alpha_scale"] = data.shared_grid(np.array([{"pre": 0.9, "post": -1.3, "res": 1.7}[k]]))
        shape = (n, n) if k == "res" and p["residual"] == "sinkhorn" else (m,)
        weights[f"{k}_beta"] = data.shared_grid(data.normal(f"{wish.id}/{k}_beta", shape))
    if p["norm_weight"]:
        weights["mhc_norm.scale"] = data.powers_of_two(f"{wish.id}/norm", (width,), -1, 1)
    for name, value in wish.weights.items():
        if name in weights:
            weights[name] = data.shared_grid(np.broadcast_to(np.asarray(value), weights[name].shape))
    if wish.layers:
        weights = {k: np.stack([_vary(wish, k, v, index) for index in range(wish.layers)]) for k, v in weights.items()}
    return weights


def _vary(wish: Wish, name: str, value: np.ndarray, index: int) -> np.ndarray:
    """The weights of layer ``index``: they have the same scales and other numbers."""
    alike = name in wish.weights and np.ndim(wish.weights[name]) == 0  # one number, asked for in every layer
    if name.endswith("_alpha_scale") or name == "mhc_norm.scale" or alike:
        return value
    noise = data.normal(f"{wish.id}/{name}/{index}", value.shape)
    spread = float(np.sqrt(np.mean(np.square(value.astype(np.float64))))) if value.size else 0.0
    return data.shared_grid(noise * data.shared_grid(np.array(spread)))


def build(wish: Wish) -> Draft:
    """All tensors of a case, except post's own inputs where they come from the oracle (`generate`)."""
    row = wish.row or published(wish.dialect)
    p = {**row.parameters, **wish.overrides, "streams": wish.streams, "dim": wish.dim}
    n, width, label = p["streams"], p["streams"] * p["dim"], wish.id
    names = [s if isinstance(s, str) else s[0] for s in wish.stages]
    options = {s if isinstance(s, str) else s[0]: {} if isinstance(s, str) else dict(s[1]) for s in wish.stages}
    snap = _float32 if wish.fine else data.shared_grid
    per_stream = stream_scales(n)[:, None]
    scale = data.normal(f"{label}/token", (*wish.lead, 1, 1)) * 0.25 + 1
    x = snap(data.normal(f"{label}/x", (*wish.lead, n, p["dim"])) * per_stream * scale * wish.x_scale)
    matrix = (math.factorial(n),) if p["residual"] == "permutations" else (n, n)
    to_coefficients = data.shared_grid if p["coefficients"] == "activation" else _float32
    tensors: dict[str, np.ndarray] = {
        "x": x,
        "embedding": snap(data.normal(f"{label}/embedding", (*wish.lead, p["dim"])) * wish.x_scale),
        "y": snap(data.normal(f"{label}/y", (*wish.lead, p["dim"])) * wish.x_scale),
        "logits": to_coefficients(
            data.shared_grid(data.normal(f"{label}/logits", (*wish.lead, *matrix)) * wish.logit_deviation)
        ),
        "norm_scale": data.powers_of_two(f"{label}/norm_scale", (p["dim"],), -1, 1),
        "branch_scale": data.powers_of_two(f"{label}/branch_scale", (p["dim"],), -1, 1)
        * np.where(np.arange(p["dim"]) % 2, -1, 1).astype(np.float32),
        "load_balance_loss": np.array(0.375, np.float32),
        "moe_bias_updates": np.array([0.5, -0.25, 0.125], np.float32),
        # All of float32's bits: where it is cast to a narrow dtype on its way, that shows.
        "carried": _float32(data.uniform(f"{label}/carried", (*wish.lead, n), 2**20, 20 * 2**20) / 2**24),
    }
    tensors.update(wish.tensors)
    tensors.update(layer_weights(wish, p))
    head = {
        "head_fn": snap(data.normal(f"{label}/head_fn", (width, n)) * (LOGIT_SCALE / math.sqrt(width))),
        "head_base": data.shared_grid(data.normal(f"{label}/head_base", (n,))),
        "head_scale": data.shared_grid(np.array([1.3])),
    }
    tensors.update(
        {k: data.shared_grid(np.asarray(wish.weights[k])) if k in wish.weights else v for k, v in head.items()}
    )

    stages, cotangents = {}, {}
    outputs_shape = {
        "out": {"expand": (n, p["dim"]), "layer": (n, p["dim"]), "post": (n, p["dim"])},
        "pre": (n,),
        "post": (n,),
        "H": (n, n),
        "u": (p["dim"],),
    }
    for name in names:
        spec = STAGES[name]
        absent = set() if options[name].get("branch") == "mlp_moe" else {"load_balance_loss", "moe_bias_updates"}
        single_pass = p["pre_from"] == "previous" and options[name].get("how", "carried") == "carried"
        absent |= set() if single_pass else {"carried"}
        inputs = [k for k in spec.inputs if k not in absent]
        outputs = [k for k in spec.outputs if k not in absent and (single_pass or name == "coefficients" or k != "pre")]
        weights = [k for k in spec.weights if k in tensors and (k in HEAD_WEIGHTS) == (name == "head")]
        stages[name] = {"inputs": inputs, "weights": weights, "outputs": outputs, "options": options[name]}
        shapes = {}
        for output in outputs:
            if output in ("load_balance_loss", "moe_bias_updates"):
                shapes[output] = tensors[output].shape
            elif output == "out":
                tail = outputs_shape["out"].get(name, (p["dim"],))
                tail = (n, p["dim"]) if options[name].get("reduce") == "none" else tail
                shapes[output] = (*wish.lead, *tail)
            else:
                shapes[output] = (*wish.lead, *outputs_shape[output])
        cotangents[name] = {k: data.shared_grid(data.normal(f"{label}/{name}/{k}", s)) for k, s in shapes.items()}
    variants = [v for name in wish.variants for v in _variant(name, _wanted(wish, name, names), p, False)]
    if wish.tf32:
        variants += _variant("float32-float32", _wanted(wish, "float32-float32", names), p, True)
    return Draft(
        id=label, family=wish.family, why=wish.why, clause=wish.clause, dialect=row.told,
        overrides={**row.overrides, **wish.overrides}, parameters=p, stages=stages, variants=variants, tensors=tensors,
        cotangents=cotangents, layout=wish.layout, quick=wish.quick, exact=wish.exact, gradients=wish.gradients,
        non_finite=wish.non_finite,
    )  # fmt: skip


def _wanted(wish: Wish, variant: str, stages: list[str]) -> list[str]:
    return [stage for stage in stages if variant in wish.only.get(stage, (variant,))]


def _variant(name: str, stages: list[str], p: Mapping[str, Any], tf32: bool) -> list[dict[str, Any]]:
    """The stages for which a pair of dtypes adds information; empty if there is none."""
    x, weights = name.split("-")
    narrow = x in ("bfloat16", "float16")
    secondary = weights != ("float64" if x == "float64" else "float32")
    contract = "float64" if x == "float64" else "tf32" if tf32 else "float32"
    if not tf32 and x != "float64" and p["mixing"] == "activation":
        contract = "activation" if p["coefficients"] == "activation" else "mixing"
    chosen = [
        s
        for s in stages
        if not (secondary and not STAGES[s].weights)
        and not (tf32 and s not in PROJECTING)
        and not (s == "residual_matrix" and narrow and p["coefficients"] == "float32")
    ]
    if not chosen:
        return []
    return [
        {"name": name + ("-tf32" if tf32 else ""), "x": x, "weights": weights, "contract": contract, "stages": chosen}
    ]
