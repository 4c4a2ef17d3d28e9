"""Makes, runs and writes small models of the transformers library with hyper-connections of random weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch", reason="needs the package torch")
transformers = pytest.importorskip("transformers", reason="needs the package transformers")

STREAMS, DIM, TOKENS = 4, 16, 7
DEEPSEEK: dict[str, Any] = dict(
    vocab_size=64, hidden_size=DIM, moe_intermediate_size=16, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=1, head_dim=16, q_lora_rank=16, o_lora_rank=8, o_groups=2, qk_rope_head_dim=8,
    n_routed_experts=4, num_experts_per_tok=2, hc_mult=STREAMS, index_n_heads=2, index_head_dim=16, index_topk=4,
    sliding_window=8, max_position_embeddings=64, initializer_range=0.25,
)  # fmt: skip
GLM: dict[str, Any] = dict(
    vocab_size=64, pad_token_id=0, hidden_size=DIM, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=3,
    num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
    qk_rope_head_dim=0, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, hc_mult=STREAMS, index_n_heads=2,
    index_head_dim=8, index_topk=4, index_kpool=2, linear_head_dim=8, linear_num_heads=2, max_position_embeddings=64,
    layer_types=["linear_attention", "indexed_attention", "linear_attention"],
    mlp_layer_types=["dense", "sparse", "sparse"], initializer_range=0.25,
)  # fmt: skip
VISION: dict[str, Any] = dict(
    depth=1, hidden_size=16, num_heads=2, image_size=28, patch_size=14, out_hidden_size=DIM, intermediate_size=16,
    projection_intermediate_size=16,
)  # fmt: skip


def _deepseek() -> Any:
    return transformers.DeepseekV4Config(**DEEPSEEK)


def _glm_text() -> Any:
    return pytest.importorskip(MODULES["glm5_next"]).Glm5NextTextConfig(**GLM)


def _glm() -> Any:
    return pytest.importorskip(MODULES["glm5_next"]).Glm5NextConfig(text_config=GLM, vision_config=VISION)


MODULES = {k: f"transformers.models.{k}.modeling_{k}" for k in ("deepseek_v4", "glm5_next")}
CONFIGURATIONS = {"Deepseek": _deepseek, "Glm5NextText": _glm_text, "Glm5NextFor": _glm}
NORM_EPS = {"Deepseek": 1e-6, "Glm5Next": 1e-5}  # their own defaults
DIALECTS = {"Deepseek": "deepseek-v4-transformers", "Glm5Next": "glm-5"}


def _of(table: Mapping[str, Any], name: str) -> Any:
    return next(value for start, value in table.items() if name.startswith(start))


@dataclass
class Site:
    """The inputs and outputs of one hyper-connection in a run of the model, and its branch's output."""

    x: np.ndarray
    post: np.ndarray
    H: np.ndarray
    u: np.ndarray
    y: np.ndarray
    out: np.ndarray


@dataclass
class Peer:
    """A model written by ``save_pretrained``, with its directory.

    Attributes:
        connections: its hyper-connections under the porter's names of sites, in the order in which they run.
    """

    name: str
    model: Any
    directory: Path

    @property
    def connections(self) -> dict[str, Any]:
        text = self.text
        kinds = (("attention", "attn_hc"), ("ffn", "ffn_hc"))
        return {
            f"layers.{k}.{kind}": getattr(layer, attribute)
            for k, layer in enumerate(text.layers)
            for kind, attribute in kinds
        }

    @property
    def text(self) -> Any:
        inner = getattr(self.model, "model", self.model)
        return getattr(inner, "language_model", inner)

    @property
    def head(self) -> Any:
        return self.text.hc_head if hasattr(self.text.hc_head, "hc_fn") else None

    @property
    def mhc_names(self) -> set[str]:
        return {name for name, _ in self.model.named_parameters() if re.search(r"(attn_hc|ffn_hc|hc_head)\.", name)}

    @property
    def norm_eps(self) -> float:
        return _of(NORM_EPS, self.name)

    @property
    def dialect(self) -> str:
        return _of(DIALECTS, self.name)


def modelling(name: str) -> Any:
    """The class of that name."""
    family = "deepseek_v4" if name.startswith("Deepseek") else "glm5_next"
    return getattr(pytest.importorskip(MODULES[family], reason=f"needs transformers with {family}"), name)


def build(name: str, directory: Path, seed: int = 0, dtype: str = "float32") -> Peer:
    """A random model, written in several shards."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = modelling(name)(_of(CONFIGURATIONS, name)()).eval().to(getattr(torch, dtype))
    peer = Peer(name, model, directory)
    randomise(peer, seed)
    model.save_pretrained(directory, max_shard_size="12KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    return peer


def randomise(peer: Peer, seed: int) -> None:
    """Gating scalars and biases of order 1, logits with a deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: Any) -> Any:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        for index, module in enumerate(peer.connections.values()):
            scale = torch.tensor([0.9, -1.3, 1.7]).roll(index)
            module.scale.copy_(scale)
            module.base.copy_(normal(module.base.shape))
            n, parts = STREAMS, normal(module.fn.shape) * 2 / module.fn.shape[1] ** 0.5
            rows = torch.repeat_interleave(scale.abs(), torch.tensor([n, n, n * n]))
            module.fn.copy_(parts / rows[:, None])
        if peer.head is not None:
            peer.head.hc_scale.copy_(torch.tensor([-1.1]))
            peer.head.hc_base.copy_(normal(peer.head.hc_base.shape))
            peer.head.hc_fn.copy_(normal(peer.head.hc_fn.shape) * 2 / peer.head.hc_fn.shape[1] ** 0.5)


def result(model: Any) -> np.ndarray:
    """Logits, or the last hidden state of a model without them."""
    ids = torch.arange(1, 1 + TOKENS)[None]
    with torch.no_grad():
        outputs = model(input_ids=ids)
    return array(outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state)


def array(value: Any) -> np.ndarray:
    return value.detach().float().numpy().copy()


def watch(peer: Peer) -> tuple[dict[str, Site], dict[str, np.ndarray]]:
    """Runs the model and records the inputs and outputs of its sites and of its head (``x`` and ``out``)."""
    seen: list[tuple[np.ndarray, ...]] = []
    branches: list[np.ndarray] = []
    last: dict[str, np.ndarray] = {}

    def connection(module: Any, inputs: Any, outputs: Any) -> None:
        seen.append((array(inputs[0]), *(array(v) for v in outputs)))

    def branch(module: Any, inputs: Any, outputs: Any) -> None:
        branches.append(array(outputs[0] if isinstance(outputs, tuple) else outputs))

    def head(module: Any, inputs: Any, outputs: Any) -> None:
        last.update(x=array(inputs[0]), out=array(outputs))

    hooks = [module.register_forward_hook(connection) for module in peer.connections.values()]
    for block in peer.text.layers:
        hooks += [block.self_attn.register_forward_hook(branch), block.mlp.register_forward_hook(branch)]
    hooks.append(peer.text.hc_head.register_forward_hook(head))
    try:
        result(peer.model)
    finally:
        for hook in hooks:
            hook.remove()
    after = [x for x, *_ in seen[1:]] + [last["x"]]
    sites = {
        name: Site(x, post, H, u, y, out)
        for name, (x, post, H, u), y, out in zip(peer.connections, seen, branches, after, strict=True)
    }
    return sites, last


def canonical(module: Any) -> dict[str, np.ndarray]:
    """The flat weights of a hyper-connection, split here and not by the porter."""
    n, fn, base = STREAMS, array(module.fn), array(module.base)
    scale = array(module.scale)
    return {
        "pre_alpha": fn[:n].T, "post_alpha": fn[n : 2 * n].T, "res_alpha": fn[2 * n :].T,
        "pre_beta": base[:n], "post_beta": base[n : 2 * n], "res_beta": base[2 * n :].reshape(n, n),
        "pre_alpha_scale": scale[:1], "post_alpha_scale": scale[1:2], "res_alpha_scale": scale[2:],
    }  # fmt: skip


def load(name: str, directory: Path) -> Any:
    """The model as ``from_pretrained`` makes it; nothing may be missing, left over or of another shape."""
    model, loading = modelling(name).from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def spoilt(source: Path, target: Path) -> Path:
    """A copy of the directory whose mHC tensors are garbage."""
    shutil.copytree(source, target)
    random = np.random.Generator(np.random.PCG64(99))
    count = 0
    for file in sorted(target.glob("*.safetensors")):
        tensors = load_file(file)
        for name in tensors:
            if "hc_" in name:
                tensors[name] = random.standard_normal(tensors[name].shape).astype(tensors[name].dtype)
                count += 1
        save_file(tensors, file, metadata={"format": "pt"})
    assert count
    return target


def index(directory: Path) -> dict[str, str]:
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
