"""The stages of the layer: what each takes, what it returns, and in which dtype.

One table that the oracle, the case files and the comparison share. Dtype roles are resolved per variant:
``x`` is the dtype of the activations, ``weights`` that of the parameters, ``coefficients`` that of the
gates and of H (docs/mathematics.md, "Precision").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ACTIVATION, WEIGHT, COEFFICIENT = "x", "weights", "coefficients"

PROJECTIONS = ("pre", "post", "res")
LAYER_WEIGHTS = (
    "mhc_norm.scale",
    *(f"{part}_{kind}" for part in PROJECTIONS for kind in ("alpha", "alpha_scale", "beta")),
)
HEAD_WEIGHTS = ("head_fn", "head_base", "head_scale")
DTYPES_OF_X = ("float64", "float32", "bfloat16", "float16")
"""The names of the dtypes of activations; `cases.format.DTYPES` has the dtypes themselves."""
BRANCHES = ("attention", "mlp_dense", "mlp_moe")


def residual_columns(streams: int, residual: str) -> int:
    """Columns of the residual projection: n*n, n! or none."""
    return {"sinkhorn": streams**2, "permutations": math.factorial(streams), "identity": 0}[residual]


def layer_shapes(streams: int, dim: int, residual: str, norm: bool = True) -> dict[str, tuple[int, ...]]:
    """Name and flat shape of each weight of a layer (fixtures/README.md, 11)."""
    flat, columns = streams * dim, residual_columns(streams, residual)
    shapes: dict[str, tuple[int, ...]] = {"mhc_norm.scale": (flat,)} if norm else {}
    for part, width in zip(PROJECTIONS, (streams, streams, columns), strict=True):
        if width:
            beta = (streams, streams) if part == "res" and residual == "sinkhorn" else (width,)
            shapes |= {f"{part}_alpha": (flat, width), f"{part}_alpha_scale": (1,), f"{part}_beta": beta}
    return shapes


def head_shapes(streams: int, dim: int) -> dict[str, tuple[int, ...]]:
    """Name and flat shape of each weight of a head."""
    return {"head_fn": (streams * dim, streams), "head_base": (streams,), "head_scale": (1,)}


NORM = ("norm_eps", "norm_eps_position", "coefficients")
MATRIX = ("residual", "softmax", "order", "guard", "eps", "iterations", "logit_limit", "matrix")
GATES = (*NORM, *MATRIX, "norm_weight", "pre_eps", "post_scale", "post_eps")
MIXING = ("mix", "mixing")


@dataclass(frozen=True)
class Stage:
    """One stage. ``inputs`` and ``outputs`` map a name to its dtype role.

    ``constants`` are inputs of the test's own branch: they are handed over, never differentiated.
    ``parameters`` are those of the configuration that the result depends on, beside streams and dim.
    """

    name: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    parameters: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()


_BRANCH = {"norm_scale": ACTIVATION, "branch_scale": ACTIVATION}
_CARRIED, _HANDED = {"carried": COEFFICIENT}, {"pre": COEFFICIENT}
"""What a single-pass site reads with, and its own pre, which it hands on; only such dialects' cases have them."""
_ROUTER = {"load_balance_loss": "float32", "moe_bias_updates": "float32"}

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("expand", {"embedding": ACTIVATION}, {"out": ACTIVATION}),
        Stage("reduce", {"x": ACTIVATION, **_CARRIED}, {"out": ACTIVATION}, ("how", "reduction")),
        Stage(
            "head",
            {"x": ACTIVATION},
            {"out": ACTIVATION},
            ("norm_eps", "norm_eps_position", "head_norm_eps", "pre_eps"),
            weights=HEAD_WEIGHTS,
        ),
        Stage("residual_matrix", {"logits": COEFFICIENT}, {"H": COEFFICIENT}, MATRIX),
        Stage(
            "coefficients",
            {"x": ACTIVATION},
            {"pre": COEFFICIENT, "post": COEFFICIENT, "H": COEFFICIENT},
            GATES,
            weights=LAYER_WEIGHTS,
        ),
        Stage(
            "pre",
            {"x": ACTIVATION, **_CARRIED},
            {"u": ACTIVATION, **_HANDED},
            (*GATES, "pre_from"),
            weights=LAYER_WEIGHTS,
        ),
        Stage(
            "post",
            {"y": ACTIVATION, "x": ACTIVATION, "post": COEFFICIENT, "H": COEFFICIENT},
            {"out": ACTIVATION},
            MIXING,
        ),
        Stage(
            "layer",
            {"x": ACTIVATION, **_CARRIED, **_BRANCH, **_ROUTER},
            {"out": ACTIVATION, **_HANDED, **_ROUTER},
            (*GATES, *MIXING, "pre_from", "branch"),
            constants=("norm_scale", "branch_scale"),
            weights=LAYER_WEIGHTS,
        ),
        Stage(
            "stack",
            {"embedding": ACTIVATION, **_BRANCH},
            {"out": ACTIVATION},
            (*GATES, *MIXING, "pre_from", "layers", "reduce", "reduction"),
            constants=("norm_scale", "branch_scale"),
            weights=LAYER_WEIGHTS,
        ),
    )
}


def relevant(stage: str, config: dict[str, object]) -> tuple[tuple[str, object], ...]:
    """What of a configuration the stage's result depends on; equal for two items that one compiled graph serves."""
    return tuple((k, config.get(k)) for k in ("streams", "dim", *STAGES[stage].parameters))
