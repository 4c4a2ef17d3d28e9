"""GGUF files of small models, made and read by the package ``gguf``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf, of the extra 'gguf', is not installed")

import gguf

STREAMS, DIM = 4, 3
Q8, F16 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16
HEAD = {"fn": (STREAMS, STREAMS * DIM), "base": (STREAMS,), "scale": (1,)}


def rows(identity: bool = False) -> dict[str, tuple[int, ...]]:
    columns = 2 * STREAMS + (0 if identity else STREAMS**2)
    return {"fn": (columns, STREAMS * DIM), "base": (columns,), "scale": (2 if identity else 3,)}


def model(
    path: Path,
    architecture: str = "deepseek4",
    ahead: int = 1,
    half: bool = False,
    keys: Mapping[str, float] | None = None,
) -> Path:
    """A model's file: quantised tensors, a vocabulary, two blocks and ``ahead`` more for multi-token prediction."""
    random = np.random.default_rng(5)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2 + ahead)
    if ahead:
        writer.add_uint32(f"{architecture}.nextn_predict_layers", ahead)
    numbers = {"hyper_connection.count": STREAMS, "hyper_connection.sinkhorn_iterations": 20,
               "hyper_connection.epsilon": 1e-6, "attention.layer_norm_rms_epsilon": 1e-6, **(keys or {})}  # fmt: skip
    for key, value in numbers.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{architecture}.{key}", value)
    writer.add_token_list(["ein", "Wort", "größer"])
    writer.add_array("some.numbers", [1.5, 2.5])
    writer.add_bool("some.truth", True)
    wide = np.float16 if half else np.float32
    identity, head = architecture == "hyv4", architecture in ("deepseek4", "hyv4")
    for block in range(2 + ahead):
        quantised = random.integers(0, 255, (8, 34), dtype=np.uint8)
        writer.add_tensor(f"blk.{block}.attn_q.weight", quantised, raw_dtype=Q8)
        for kind in ("attn", "ffn"):
            for name, shape in rows(identity).items():
                value = random.standard_normal(shape).astype(wide if name == "fn" else np.float32)
                writer.add_tensor(f"blk.{block}.hc_{kind}_{name}.weight", value)
    heads = (["output_hc_"] if head else []) + [f"blk.{2 + k}.nextn.hc_head_" for k in range(ahead)]
    for prefix in heads:
        for name, shape in HEAD.items():
            writer.add_tensor(f"{prefix}{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors(path: Path) -> dict[str, tuple[int, list[int], bytes]]:
    """Type, shape and bytes of every tensor, as the package reads them."""
    read = gguf.GGUFReader(path).tensors
    return {t.name: (int(t.tensor_type), t.shape.tolist(), t.data.tobytes()) for t in read}


def keys(path: Path) -> dict[str, Any]:
    return {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
