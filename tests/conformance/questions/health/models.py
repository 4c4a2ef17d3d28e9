"""Small checkpoints of DeepSeek-V4's layout whose health is known: healthy, upcycled, sick in every way."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

N, DIM = 4, 8
M = 2 * N + N * N
PRE, POST, RES = slice(0, N), slice(N, 2 * N), slice(2 * N, M)
SHARP = -20.0 * np.tril(np.ones((N, N)), -1)
"""Logits of res that 20 iterations leave 0.063 off, always on the same side: 24 sites have a gain of 2.43."""
Tensors = dict[str, np.ndarray]


def site(name: str, seed: int = 0, *, alpha: float = 1.0, deviation: float = 1.0) -> Tensors:
    """A site whose logits have about this deviation over tokens, times α, and biases of deviation 1/2."""
    generator = np.random.Generator(np.random.PCG64([seed, *name.encode()]))
    fn = generator.standard_normal((M, N * DIM)) * deviation / math.sqrt(N * DIM)
    base = generator.standard_normal(M) / 2
    return {f"{name}_fn": fn, f"{name}_base": base, f"{name}_scale": np.full(3, alpha)}


def healthy(layers: int = 3) -> Tensors:
    names = [f"layers.{k}.hc_{kind}" for k in range(layers) for kind in ("attn", "ffn")]
    tensors = {name: value for prefix in names for name, value in site(prefix).items()}
    generator = np.random.Generator(np.random.PCG64(1))
    head = generator.standard_normal((N, N * DIM)) / math.sqrt(N * DIM)
    return {**tensors, "hc_head_fn": head, "hc_head_base": np.zeros(N), "hc_head_scale": np.ones(1)}


def upcycled(layers: int = 3) -> Tensors:
    """A model without mHC, as docs/mathematics.md, "Starting from a model without mHC" starts it."""
    tensors = healthy(layers)
    for name in tensors:
        if name.startswith("layers") and name.endswith("_scale"):
            tensors[name][:] = 0
        if name.startswith("layers") and name.endswith("_base"):
            tensors[name][PRE], tensors[name][POST] = -math.log(N - 1), 0
    return tensors


def sick() -> Tensors:
    """A model of which each warning is true once, of its layers or of its multi-token prediction.

    Layers: sums of H off by 0.063 at 24 sites, so that the composite gains 2.43; and one gate closed. Multi-token
    prediction: H at the identity, and nothing depends on the token.
    """
    tensors = healthy(12)
    for name in [name for name in tensors if name.startswith("layers") and name.endswith("_base")]:
        tensors[name][RES] = SHARP.reshape(-1)
        tensors[name.replace("_base", "_scale")][2] = 1e-3
    tensors["layers.1.hc_ffn_base"][POST][2] = -30
    for kind in ("attn", "ffn"):
        tensors |= site(f"mtp.0.hc_{kind}", alpha=0)
        tensors[f"mtp.0.hc_{kind}_base"][RES] = 20 * np.eye(N).reshape(-1)
    return {**tensors, **{f"mtp.0.hc_head_{name}": tensors[f"hc_head_{name}"] for name in ("fn", "base", "scale")}}


def write(directory: Path, tensors: Mapping[str, np.ndarray], **settings: object) -> Path:
    """A checkpoint of one file with its configuration; a setting of None is left out."""
    directory.mkdir(parents=True, exist_ok=True)
    narrow = {name: np.ascontiguousarray(value, np.float32) for name, value in tensors.items()}
    save_file(narrow, directory / "model.safetensors", metadata={"format": "pt"})
    layers = 1 + max(int(number) for name in tensors for number in re.findall(r"layers\.(\d+)\.", name) or [0])
    config = {"model_type": "deepseek_v4", "hidden_size": DIM, "num_hidden_layers": layers, "hc_mult": N,
              "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, **settings}  # fmt: skip
    (directory / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    return directory
