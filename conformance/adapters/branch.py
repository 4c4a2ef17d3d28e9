"""The sub-layer of the layer and stack cases, and the shapes in memory: the same for every framework.

Only operators are used, so that NumPy, JAX, PyTorch and mlx arrays all pass through. It is public (docs/contract.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from conformance.stages import HEAD_WEIGHTS, LAYER_WEIGHTS, PROJECTIONS

GATES = ("carried", "pre")
"""Inputs and outputs `[batch, seq, streams]`: their last axis is whole where dim is sharded."""


def in_memory(weights: Mapping[str, Any], streams: int, dim: int, lead: tuple[int, ...] = ()) -> dict[str, Any]:
    """Flat weights ``[n*C, m]`` as ``[n, C, m]``; the flat axis is streams first, dim second."""
    shaped = {}
    for name, value in weights.items():
        if name == "mhc_norm.scale":
            value = value.reshape(*lead, streams, dim)
        elif name.endswith("_alpha") or name == "head_fn":
            value = value.reshape(*lead, streams, dim, value.shape[-1])
        shaped[name] = value
    return shaped


def joined(
    weights: Mapping[str, Any], concatenate: Callable[[list[Any]], Any], kinds: Sequence[str] = PROJECTIONS
) -> dict[str, Any]:
    """Canonical flat weights as DeepSeek's files have them: fn [2n+n², n*C], base [2n+n²], scale [3].

    Args:
        concatenate: joins arrays along their first axis: ``torch.cat``, ``numpy.concatenate`` and their like.
        kinds: the projections that there are; without a residual one fn has 2n rows and scale 2 elements.
    """
    return {
        "fn": concatenate([weights[f"{kind}_alpha"].T for kind in kinds]),
        "base": concatenate([weights[f"{kind}_beta"].reshape(-1) for kind in kinds]),
        "scale": concatenate([weights[f"{kind}_alpha_scale"] for kind in kinds]),
    }


def split(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(inputs, weights) of what a stage is handed."""
    names = {*LAYER_WEIGHTS, *HEAD_WEIGHTS}
    return {k: v for k, v in inputs.items() if k not in names}, {k: v for k, v in inputs.items() if k in names}


def norm_fn(inputs: Mapping[str, Any]) -> Callable[[Any], Any]:
    return lambda u: u * inputs["norm_scale"]


def branch_fn(kind: str, inputs: Mapping[str, Any]) -> Callable[..., Any]:
    """The branch that fixtures/README.md describes: products with powers of two."""
    scale = inputs["branch_scale"]

    def attention(inputs_q: Any, inputs_kv: Any) -> Any:
        return scale * (0.5 * inputs_q + 0.5 * inputs_kv), None

    def mlp_dense(inputs: Any) -> Any:
        return scale * inputs

    def mlp_moe(inputs: Any) -> Any:
        return scale * inputs, router["load_balance_loss"], router["moe_bias_updates"]

    router = inputs
    return {"attention": attention, "mlp_dense": mlp_dense, "mlp_moe": mlp_moe}[kind]


def call(kind: str, inputs: Mapping[str, Any], u: Any) -> tuple[Any, dict[str, Any]]:
    """(y, what the layer hands through) of the branch of this kind, called as the layer calls it."""
    run = branch_fn(kind, inputs)
    if kind == "attention":
        y, _ = run(inputs_q=u, inputs_kv=u)
        return y, {}
    if kind == "mlp_dense":
        return run(inputs=u), {}
    y, loss, updates = run(inputs=u)
    return y, {"load_balance_loss": loss, "moe_bias_updates": updates}
