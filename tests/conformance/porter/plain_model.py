"""Writes a small decoder without hyper-connections, of a few tensors of several dtypes under Llama's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

LAYERS, DIM = 2, 8
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": DIM,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
MODULES = ("input_layernorm", "self_attn.q_proj", "post_attention_layernorm", "mlp.up_proj")


def tensors(layers: int = LAYERS, stem: str = "model.layers", modules: tuple[str, ...] = MODULES) -> dict[str, Any]:
    """The tensors of a decoder."""
    generator = np.random.default_rng(0)
    named = {
        f"{stem}.{k}.{module}.weight": generator.standard_normal((DIM,) if "norm" in module else (DIM, DIM))
        for k in range(layers)
        for module in modules
    }
    values: dict[str, Any] = {name: value.astype(ml_dtypes.bfloat16) for name, value in named.items()}
    values["model.embed_tokens.weight"] = generator.standard_normal((16, DIM)).astype(np.float32)
    values["model.norm.weight"] = np.ones(DIM, np.float16)
    values["lm_head.weight"] = generator.standard_normal((16, DIM)).astype(np.float32)
    values["model.layers.0.self_attn.positions"] = np.arange(3)
    return values


def build(directory: Path, shards: int = 2, values: dict[str, Any] | None = None, **config: Any) -> Path:
    """The decoder as ``save_pretrained`` writes it: shards with an index, or one file; a tokenizer beside them."""
    directory.mkdir(parents=True)
    values = tensors() if values is None else values
    if shards == 1:
        save_file(values, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {key: value for k, (key, value) in enumerate(sorted(values.items())) if k % shards == shard}
            save_file(part, directory / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": sum(v.nbytes for v in values.values())}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    changed = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(changed))
    (directory / "tokenizer.json").write_text('{"kind": "made up"}')
    return directory
