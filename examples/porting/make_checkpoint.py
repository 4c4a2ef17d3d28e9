"""Writes a small checkpoint as DeepSeek-V4 is released, for trying the porter: three layers, n = 4, C = 8, two shards.

python examples/porting/make_checkpoint.py DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from conformance.oracle.data import normal

STREAMS, DIM, LAYERS = 4, 8, 3
HEIGHT = 2 * STREAMS + STREAMS**2
CONFIG = {
    "model_type": "deepseek_v4", "hidden_size": DIM, "num_hidden_layers": LAYERS, "hc_mult": STREAMS,
    "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6,
}  # fmt: skip


def site(prefix: str, height: int, scales: list[float]) -> dict[str, np.ndarray]:
    """One hyper-connection, or a head, with logits that deviate by about 2."""
    flat = STREAMS * DIM
    found = {
        f"{prefix}fn": normal(f"{prefix}fn", (height, flat)) * 1.5 * flat**-0.5,
        f"{prefix}base": normal(f"{prefix}base", (height,)),
        f"{prefix}scale": np.array(scales),
    }
    return {name: value.astype(np.float32) for name, value in found.items()}


def main(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, np.ndarray]] = [{}, {}]
    for layer in range(LAYERS):
        for kind in ("attn", "ffn"):
            shards[layer > 0].update(site(f"layers.{layer}.hc_{kind}_", HEIGHT, [0.9, -1.3, 1.7]))
        shards[layer > 0][f"layers.{layer}.ffn_norm.weight"] = np.ones(DIM, np.float32)
    shards[1].update(site("hc_head_", STREAMS, [1.1]))
    weight_map = {}
    for k, tensors in enumerate(shards, 1):
        name = f"model-{k:05d}-of-00002.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    size = sum(value.nbytes for tensors in shards for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
