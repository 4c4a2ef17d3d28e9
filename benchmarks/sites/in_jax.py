"""`jax_impl`'s site beside the layer written plainly, both under `jax.jit`: seconds at one shape, in turns."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.sites.numbers import FLOOR_UNITS, STREAMS, TOLERANCE, Shape, quartiles, rounds_are_enough
from jax_impl import MHCConfig, functional

ROW = "deepseek-v4-transformers"
OURS = "jax_impl"
HIGHEST = jax.lax.Precision.HIGHEST
Weights = Mapping[str, Array]


def drawn(config: MHCConfig) -> dict[str, Array]:
    """Weights of a site under their canonical names, in float32, the same at every call."""
    generator = np.random.default_rng(0)
    weights: dict[str, Array] = {}
    for name, shape in functional.weight_shapes(config).items():
        value = generator.standard_normal(shape, np.float32)
        weights[name] = jnp.asarray(value * (config.streams * config.dim) ** -0.5 if name.endswith("_alpha") else value)
    return weights


def ours(weights: Weights, x: Array, config: MHCConfig) -> Array:
    u, context, _ = functional.pre(x, weights, config)
    return functional.post(u, context)


def written(weights: Weights, x: Array, config: MHCConfig) -> Array:
    """The layer as a page of its mathematics writes it."""
    n, eps = config.streams, config.eps or 0.0
    flat = x.reshape(*x.shape[:-2], -1).astype(jnp.float32)
    normed = flat * jax.lax.rsqrt(jnp.mean(flat * flat, -1, keepdims=True) + config.norm_eps)

    def logits(kind: str) -> Array:
        phi = weights[f"{kind}_alpha"]
        h = jnp.matmul(normed, phi.reshape(-1, phi.shape[-1]), precision=HIGHEST)
        return weights[f"{kind}_alpha_scale"] * h + weights[f"{kind}_beta"].reshape(-1)

    pre = jax.nn.sigmoid(logits("pre")) + config.pre_eps
    post = config.post_scale * jax.nn.sigmoid(logits("post")) + config.post_eps
    H = jax.nn.softmax(logits("res").reshape(*x.shape[:-2], n, n), -1) + eps
    H = H / (H.sum(-2, keepdims=True) + eps)

    def both(H: Array, _: None) -> tuple[Array, None]:
        H = H / (H.sum(-1, keepdims=True) + eps)
        return H / (H.sum(-2, keepdims=True) + eps), None

    H = jax.lax.scan(both, H, None, length=(config.iterations or 0) - 1)[0]
    u = (pre[..., None] * x.astype(jnp.float32)).sum(-2).astype(x.dtype)
    mixed = jnp.einsum("...ij,...ic->...jc", H.astype(x.dtype), x, precision=HIGHEST)
    return post.astype(x.dtype)[..., None] * u[..., None, :] + mixed


def measured(shape: Shape) -> dict[str, Any]:
    """The quartiles of both, or a sentence for one whose results are another function's."""
    config = MHCConfig.from_dialect(ROW, streams=STREAMS, dim=shape.dim)
    weights = drawn(config)
    x = jnp.asarray(
        np.random.default_rng(1).standard_normal((1, shape.tokens, STREAMS, shape.dim), np.float32), shape.dtype
    )
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    results: dict[str, Any] = {}
    for name, function in ((OURS, ours), ("written plainly", written)):
        forward = jax.jit(partial(function, config=config))
        both = jax.jit(lambda w, x, f=function: jax.vjp(lambda w, x: f(w, x, config), w, x)[1](jnp.ones_like(x)))
        calls[name, "forward"] = partial(forward, weights, x)
        calls[name, "both"] = partial(both, weights, x)
        results[name] = (np.asarray(forward(weights, x), np.float32), np.asarray(both(weights, x)[1], np.float32))
    cells: dict[str, Any] = {}
    for name, (out, gradient) in results.items():
        true = results["written plainly"]
        errors = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip((out, gradient), true, strict=True)]
        if not max(errors) <= TOLERANCE[shape.dtype]:
            cells[name] = f"not measured: off by {max(errors):.2g} of the largest value"
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    while not rounds_are_enough(times):
        for key, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            times[key].append(time.perf_counter() - began)
    for name in results:
        cells.setdefault(name, {"seconds": {kind: quartiles(times[name, kind]) for kind in FLOOR_UNITS}})
    return cells


if __name__ == "__main__":
    print(json.dumps(measured(Shape(**json.loads(sys.argv[1])))))
