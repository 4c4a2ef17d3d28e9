"""The model that is trained and its optimizer, as data (fixtures/trajectories/README.md has the formulas)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conformance.stages import head_shapes, layer_shapes

STEP = "step"
"""The stage of the contract that trains one step; no golden case asks for it."""
STREAMS, DIM, VOCABULARY, LAYERS, HEADS, WIDTH = 4, 32, 64, 2, 2, 64
BATCH, SEQ, STEPS = 2, 8, 30
KEPT = (10, 30)
"""The steps after which all weights are recorded; losses and norms are at every step."""
SITES = ("attention", "mlp")
TRAJECTORIES = ("maxtext-v1", "deepseek-v4", "deepseek-v4.1", "megatron")
"""The dialects whose training is recorded."""
MODEL_NORM_EPS = 2.0**-20
OPTIMIZER: dict[str, float] = {
    "learning_rate": 2.0**-8,
    "beta1": 0.875,
    "beta2": 0.96875,
    "adam_eps": 2.0**-20,
    "weight_decay": 0.125,
}
"""Powers of two and sums of a few of them, which no dtype has to round."""
DECAYED = ("head_fn", "embedding", "positions", "query", "key", "value", "out", "up", "down", "output")
"""Last words of the names of tensors that decay: matrices and tables. Biases, norm weights and scalars don't."""


def shapes(parameters: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of each weight under a dialect, in the order of the names."""
    table: dict[str, tuple[int, ...]] = {
        "embedding": (VOCABULARY, DIM),
        "positions": (SEQ, DIM),
        "final_norm": (DIM,),
        "output": (DIM, VOCABULARY),
    }
    site = layer_shapes(STREAMS, DIM, parameters["residual"], bool(parameters["norm_weight"]))
    for layer in range(LAYERS):
        before = f"layers.{layer}."
        table |= {f"{before}{kind}.{name}": shape for kind in SITES for name, shape in site.items()}
        table |= {f"{before}{kind}_norm": (DIM,) for kind in SITES}
        table |= {f"{before}{name}": (DIM, DIM) for name in ("query", "key", "value", "out")}
        table |= {f"{before}up": (DIM, WIDTH), f"{before}up_bias": (WIDTH,)}
        table |= {f"{before}down": (WIDTH, DIM), f"{before}down_bias": (DIM,)}
    if parameters["reduce"] == "head":
        table |= {f"head.{name}": shape for name, shape in head_shapes(STREAMS, DIM).items()}
    return dict(sorted(table.items()))


def decays(name: str) -> bool:
    """Whether weight decay reaches a tensor."""
    last = name.rpartition(".")[2]
    return last in DECAYED or last.endswith("_alpha")


def site_weights(weights: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The weights under a prefix, by the names of a site or a head."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def configuration(dialect: str, parameters: Mapping[str, Any], step: int) -> dict[str, Any]:
    """What an implementation is told with step number ``step``, the first being 1 (docs/trajectories.md)."""
    return {
        **parameters,
        "dialect": dialect,
        "streams": STREAMS,
        "dim": DIM,
        "layers": LAYERS,
        "heads": HEADS,
        "model_norm_eps": MODEL_NORM_EPS,
        **OPTIMIZER,
        "decayed": [name for name in shapes(parameters) if decays(name)],
        "step": step,
    }
