"""Draws random hyper-connections, writes them as canonical files, and reads them back from any layout.

Sites are a dictionary ``{"layers.0.attention": {"pre_alpha": array, …}, …, "head": {…}}`` of canonical names and flat
shapes. The layer itself is here once more, in plain NumPy after docs/mathematics.md, to check what the porter measures.
"""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from conformance.porter import dialects
from conformance.porter.layouts import layouts
from conformance.porter.storage.opening import open_checkpoint
from conformance.porter.understanding import understand

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
LAYOUTS = tuple(layouts())
SINKHORN = tuple(name for name, layout in layouts().items() if "sinkhorn" in layout.residuals)
IDENTITY = tuple(name for name, layout in layouts().items() if "identity" in layout.residuals)
HEADED = frozenset({"canonical", "deepseek", "gguf", "hunyuan", "maxtext", "megatron", "mlx", "transformers"})
NORMED = frozenset({"canonical", "maxtext", "transformer-engine"})
PARTS = ("pre", "post", "res")


def draw(generator, shape, size, spread=3.0):
    """Values of either sign whose magnitudes lie within a factor of ``spread`` of ``size``, none near zero."""
    sign = generator.choice([-1.0, 1.0], shape)
    return sign * size * spread ** generator.uniform(-1, 1, shape)


def widths(streams, residual="sinkhorn"):
    """Columns of each projection."""
    residuals = {"sinkhorn": streams**2, "permutations": math.factorial(streams), "identity": 0}
    return {"pre": streams, "post": streams, "res": residuals[residual]}


def random_sites(
    seed, streams, dim, *, layers=2, kinds=("attention", "ffn"), residual="sinkhorn", norm=False, head=False,
    dtype="float32",
):  # fmt: skip
    """Weights whose logits deviate by about 2, α of order 1."""
    generator = np.random.default_rng(seed)
    flat = streams * dim
    by_site = {}
    for layer, kind in itertools.product(range(layers), kinds):
        weights = {"mhc_norm.scale": draw(generator, (flat,), 1.0)} if norm else {}
        for part, width in widths(streams, residual).items():
            if width:
                square = part == "res" and residual == "sinkhorn"
                weights[f"{part}_alpha"] = draw(generator, (flat, width), 1.3 / math.sqrt(flat))
                weights[f"{part}_alpha_scale"] = draw(generator, (1,), 1.0, 1.5)
                weights[f"{part}_beta"] = draw(generator, (streams, streams) if square else (width,), 0.5)
        by_site[f"layers.{layer}.{kind}"] = weights
    if head:
        by_site["head"] = {
            "head_fn": draw(generator, (flat, streams), 1.3 / math.sqrt(flat)),
            "head_base": draw(generator, (streams,), 0.5),
            "head_scale": draw(generator, (1,), 1.0, 1.5),
        }
    return {site: {k: v.astype(DTYPES[dtype]) for k, v in weights.items()} for site, weights in by_site.items()}


def sizes(sites):
    """(n, C) of sites."""
    weights = next(iter(sites.values()))
    streams = len(weights["pre_beta"] if "pre_beta" in weights else weights["head_base"])
    wide = weights["pre_alpha"] if "pre_alpha" in weights else weights["head_fn"]
    return streams, len(wide) // streams


def write_canonical(path, sites, dialect="paper"):
    """A canonical safetensors file, as its own software writes it; returns its path."""
    streams, dim = sizes(sites)
    norm = any("mhc_norm.scale" in weights for weights in sites.values())
    parameters = {**dialects.parse(dialect), "norm_weight": norm, "streams": streams, "dim": dim}
    tensors = {
        f"{site}.{name}": np.ascontiguousarray(v) for site, weights in sites.items() for name, v in weights.items()
    }
    save_file(tensors, path, metadata={"format": "mhc-canonical/1", "parameters": json.dumps(parameters)})
    return Path(path)


def read_sites(path, layout=None):
    """The sites of any checkpoint, under canonical names."""
    with open_checkpoint(Path(path)) as checkpoint:
        model = understand(checkpoint, layout)
        model.prepare()
        return {str(site): {k: v.copy() for k, v in model.load(site).items()} for site in model.sites}


def read_tensors(path):
    """Every tensor of a checkpoint under its own name, with scanned layers one by one."""
    with open_checkpoint(Path(path)) as checkpoint:
        checkpoint.prepare(checkpoint.tensors)
        return {name: checkpoint.read(name).copy() for name in checkpoint.tensors}


def differences(actual, expected):
    """A line for each tensor that is missing, extra or differs by a bit; works on sites and on tensors."""
    actual, expected = _flat(actual), _flat(expected)
    lines = [f"missing {name}" for name in expected.keys() - actual.keys()]
    lines += [f"extra {name}" for name in actual.keys() - expected.keys()]
    for name in expected.keys() & actual.keys():
        a, b = actual[name], expected[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            lines.append(f"{name}: {a.dtype}{a.shape} for {b.dtype}{b.shape}")
        elif np.ascontiguousarray(a).tobytes() != np.ascontiguousarray(b).tobytes():
            lines.append(f"{name}: {np.count_nonzero(a != b)} of {a.size} values differ")
    return sorted(lines)


def _flat(values):
    return {
        f"{key} {name}" if name else key: value
        for key, inner in values.items()
        for name, value in (inner.items() if isinstance(inner, dict) else [("", inner)])
    }


def with_ones(sites):
    """The same sites with a norm weight of 1."""
    return {
        site: weights if site == "head" else {"mhc_norm.scale": np.ones_like(weights["pre_alpha"][:, 0]), **weights}
        for site, weights in sites.items()
    }


def rationals(sites):
    """The same sites, in arrays of fractions."""
    return {site: {name: _rational(value) for name, value in weights.items()} for site, weights in sites.items()}


def folded(sites):
    """The same sites, in arrays of fractions, with w φ for w and φ."""
    exact_sites = rationals(sites)
    for weights in exact_sites.values():
        if "mhc_norm.scale" in weights:
            w = weights.pop("mhc_norm.scale")[:, None]
            weights |= {name: value * w for name, value in weights.items() if name.endswith("_alpha")}
    return exact_sites


def _rational(value):
    rational = np.empty(value.shape, object)
    rational.reshape(-1)[:] = [Fraction(v) for v in value.astype(np.float64).reshape(-1).tolist()]
    return rational


def largest_error(actual, exact):
    """The largest |found - exact| / |exact| of all weights, without a rounding of its own."""
    assert {s: set(w) for s, w in actual.items()} == {s: set(w) for s, w in exact.items()}
    errors = [
        abs(a - b) / abs(b)
        for site, weights in actual.items()
        for name, value in weights.items()
        for a, b in zip(_rational(value).reshape(-1), exact[site][name].reshape(-1), strict=True)
        if a != b
    ]
    return max(errors, default=Fraction(0))


def sinkhorn(logits, p):
    """H ``[…, n, n]`` of the logits, as docs/mathematics.md writes it."""
    axes = {"rows": -1, "columns": -2}
    first, second = (-1, -2) if p["order"] == "rows-first" else (-2, -1)
    if p["logit_limit"] is not None:
        logits = np.clip(logits, -p["logit_limit"], p["logit_limit"])
    passes = [first, second] * p["iterations"]
    if p["softmax"] == "none":
        P = np.exp(logits - logits.max(first, keepdims=True))
    else:
        axis = axes[p["softmax"]]
        P = np.exp(logits - logits.max(axis, keepdims=True))
        P = P / P.sum(axis, keepdims=True) + (p["eps"] if p["guard"] == "add" else 0.0)
        passes = passes[1:] if axis == first else passes
    for axis in passes:
        total = P.sum(axis, keepdims=True)
        P = P / {"none": total, "clip": np.maximum(total, p["eps"])}.get(p["guard"], total + p["eps"])
    return P


def layer(x, weights, p):
    """H (first index the input stream), u and out of one site for y = u, in float64; x ``[tokens, n, C]``."""
    n = x.shape[1]
    logits = projections(x, weights, p)
    pre = 1 / (1 + np.exp(-logits["pre"])) + p["pre_eps"]
    post = p["post_scale"] / (1 + np.exp(-logits["post"])) + p["post_eps"]
    if p["residual"] == "identity":
        H = np.broadcast_to(np.eye(n), (len(x), n, n))
    elif p["residual"] == "permutations":
        share = np.exp(logits["res"] - logits["res"].max(-1, keepdims=True))
        matrices = np.eye(n)[list(itertools.permutations(range(n)))]
        H = np.einsum("tp,pij->tij", share / share.sum(-1, keepdims=True), matrices)
    else:
        H = sinkhorn(logits["res"].reshape(-1, n, n), p)
    H = H.swapaxes(-1, -2) if p["mix"] == "out-in" else H
    u = np.einsum("ti,tic->tc", pre, x)
    return {"H": H, "u": u, "out": post[:, :, None] * u[:, None, :] + np.einsum("tij,tic->tjc", H, x)}


def projections(x, weights, p):
    """The logits α h + b of pre, post and res, ``[tokens, columns]``."""
    flat = x.reshape(len(x), -1)
    square = np.mean(flat * flat, -1, keepdims=True)
    inside = p["norm_eps_position"] == "mean"
    normed = flat / (np.sqrt(square + p["norm_eps"]) if inside else np.sqrt(square) + p["norm_eps"])
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    normed = normed * w.get("mhc_norm.scale", 1.0)
    return {
        part: w[f"{part}_alpha_scale"] * (normed @ w[f"{part}_alpha"]) + w[f"{part}_beta"].reshape(-1)
        for part in PARTS
        if f"{part}_alpha" in w
    }
