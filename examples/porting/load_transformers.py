"""Takes the hyper-connections of a transformers model into a module of this repository, and compares one call.

    python examples/porting/load_transformers.py DIRECTORY

DIRECTORY/model is a small DeepSeek-V4 of random weights, as `save_pretrained` writes it, made where there is none yet.
`mhc-conformance port` writes its sites to DIRECTORY/sites.safetensors. One of them is loaded into PyTorch's module, and
into JAX's where JAX is installed; it must return what the model returned when it ran. For a model of your own change
SITE and what `watched` hooks into. It needs transformers: pip install 'mhc-conformance[torch]' 'transformers>=5.20'
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

SITE = "layers.1.attention."
TOLERANCE = 1e-5  # of outputs of order 1 in float32
SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, hc_mult=4, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1,
    head_dim=16, q_lora_rank=16, o_lora_rank=8, o_groups=2, qk_rope_head_dim=8, moe_intermediate_size=16,
    n_routed_experts=4, num_experts_per_tok=2, index_n_heads=2, index_head_dim=16, index_topk=4, sliding_window=8,
    max_position_embeddings=64, initializer_range=0.25,
)  # fmt: skip


def make(directory: Path) -> None:
    """Writes a small model whose hyper-connections are far from their initial values."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**SIZES))
    for name, value in model.named_parameters():
        if "_hc." in name or "hc_head." in name:
            torch.nn.init.normal_(value, std=value.shape[-1] ** -0.5 if name.endswith("fn") else 1.0)
    model.save_pretrained(directory)


def watched(directory: Path) -> dict[str, np.ndarray]:
    """What the site of layer 1's attention was given and returned in a run of the model, and y of the attention."""
    import torch
    import transformers

    model = transformers.DeepseekV4ForCausalLM.from_pretrained(directory).eval()
    layer, seen = model.model.layers[1], {}
    layer.attn_hc.register_forward_hook(lambda module, inputs, outputs: seen.update(x=inputs[0], u=outputs[2]))
    layer.self_attn.register_forward_hook(lambda module, inputs, outputs: seen.update(y=outputs[0]))
    layer.ffn_hc.register_forward_hook(lambda module, inputs, outputs: seen.update(out=inputs[0]))
    with torch.no_grad():
        model(input_ids=torch.arange(1, 9)[None])
    return {name: value.numpy() for name, value in seen.items()}


def in_torch(file: Path, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import torch

    from torch_impl import ManifoldConstrainedHyperConnections, MHCConfig

    config = MHCConfig.from_dialect("deepseek-v4-transformers", streams=x.shape[-2], dim=x.shape[-1])
    site = ManifoldConstrainedHyperConnections(config)
    site.load_weights(file, SITE)
    with torch.no_grad():
        u, context, _ = site.pre(torch.from_numpy(x))
        return u.numpy(), site.post(torch.from_numpy(y), context).numpy()


def in_jax(file: Path, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from flax import nnx

    from jax_impl import ManifoldConstrainedHyperConnections, MHCConfig

    config = MHCConfig.from_dialect("deepseek-v4-transformers", streams=x.shape[-2], dim=x.shape[-1])
    site = ManifoldConstrainedHyperConnections(config, rngs=nnx.Rngs(0))
    site.load_weights(file, SITE)
    u, context, _ = site.pre(x)
    return np.asarray(u), np.asarray(site.post(y, context))


def main(directory: Path) -> int:
    model, file = directory / "model", directory / "sites.safetensors"
    if not model.is_dir():
        make(model)
    port = [sys.executable, "-m", "conformance.cli", "port", str(model), str(file), "--to", "canonical"]
    subprocess.run([*port, "--to-dialect", "deepseek-v4-transformers", "--overwrite"], check=True)
    seen, failed = watched(model), False
    for package, compute in (("torch_impl", in_torch), ("jax_impl", in_jax)):
        if package == "jax_impl" and not importlib.util.find_spec("flax"):
            print("jax_impl    not compared: it needs pip install 'mhc-conformance[jax]'")
            continue
        u, out = compute(file, seen["x"], seen["y"])
        apart = [float(np.abs(mine - seen[name]).max()) for name, mine in (("u", u), ("out", out))]
        failed |= max(apart) > TOLERANCE
        print(f"{package:10}  {SITE} differs from the model's by at most {apart[0]:.1e} in u and {apart[1]:.1e} in out")
    return int(failed)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("expected one argument, the directory to work in: load_transformers.py DIRECTORY")
    if not importlib.util.find_spec("transformers"):
        sys.exit("transformers is missing: pip install 'mhc-conformance[torch]' 'transformers>=5.20'")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(main(Path(sys.argv[1])))
