"""Gives a small model of the transformers library hyper-connections, compares logits, and trains it for some seconds.

    python examples/upcycle.py [dense | tied | experts] [DIALECT[,key=value…]]
    python examples/upcycle.py --save DIRECTORY [dense | tied | experts]     the plain model alone
    python examples/upcycle.py --table     every dialect, all three models, in float64 and float32

The model's own attention, MLP and norms stay as they are. `upcycled` loads a directory that `mhc-conformance upcycle
--to canonical` has written, and puts an `UpcycledLayer` around each layer of the model. docs/upcycling.md explains it.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from conformance.cases.dialects import dialect_names
from conformance.porter.upcycling.upcycle import UpcycleOptions, upcycle
from torch_impl import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections, MHCConfig, expand, reduce

SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
)  # fmt: skip
EXPERTS: dict[str, Any] = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
)


class UpcycledLayer(nn.Module):
    """A layer of a transformers model with a site around its attention and one around its MLP.

    The first layer expands its input to streams, and the last one reduces them, so that the model around the layers
    needs no change. A single-pass dialect hands its gates from layer to layer in ``shared``.
    """

    def __init__(self, layer: nn.Module, config: MHCConfig, dtype: torch.dtype, shared: dict[str, Any]):
        super().__init__()
        self.layer, self.config, self.shared = layer, config, shared
        self.attention_site = ManifoldConstrainedHyperConnections(config, dtype=dtype)
        self.mlp_site = ManifoldConstrainedHyperConnections(config, dtype=dtype)
        self.first, self.last, self.head = False, False, None
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type  # the model chooses the mask by it

    def forward(self, hidden_states: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        layer, x = self.layer, hidden_states
        if self.first:
            x = expand(hidden_states, self.config.streams)  # [batch, seq, streams, dim]
            self.shared["carried"] = self.attention_site.one_hot(x) if self.config.pre_from == "previous" else None

        def attend(inputs_q: Tensor, inputs_kv: Tensor, **more: Any) -> tuple[Tensor, Any]:
            return layer.self_attn(hidden_states=inputs_q, **more)

        def mlp(inputs: Tensor) -> Tensor:
            y = layer.mlp(inputs)
            return y[0] if isinstance(y, tuple) else y

        carried = self.shared["carried"]
        kind = HyperConnectionType.ATTENTION
        x, metadata = self.attention_site(layer.input_layernorm, attend, x, kind, carried=carried, **kwargs)
        kind, carried = HyperConnectionType.MLP_DENSE, metadata.get("carried")
        x, metadata = self.mlp_site(layer.post_attention_layernorm, mlp, x, kind, carried=carried)
        self.shared["carried"], self.shared["streams"] = metadata.get("carried"), x.detach()
        return self.reduced(x) if self.last else x

    def reduced(self, x: Tensor) -> Tensor:
        if self.head is not None:
            return self.head(x)
        how = "mean" if self.config.reduce == "none" else str(self.config.reduce)
        return reduce(x, how, self.shared["carried"], reduction=self.config.reduction)


def upcycled(directory: Path, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """The model in a directory that ``upcycle`` has written in the layout canonical, with its sites."""
    model = computing_in(transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype), dtype)
    shards = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    first = directory / shards["layers.0.attention.pre_alpha"]
    with safe_open(first, "pt") as file:
        config = MHCConfig.from_parameters(json.loads(file.metadata()["parameters"]))
        stored = file.get_tensor("layers.0.attention.pre_alpha").dtype
    layers, shared = model.model.layers, dict[str, Any]()
    for k, layer in enumerate(layers):
        layers[k] = UpcycledLayer(layer, config, stored, shared)
        for site, name in ((layers[k].attention_site, "attention"), (layers[k].mlp_site, "ffn")):
            prefix = f"layers.{k}.{name}."
            site.load_weights(directory / shards[f"{prefix}pre_alpha"], prefix)
    layers[0].first, layers[-1].last = True, True
    if config.reduce == "head":
        layers[-1].head = HyperHead(config, dtype=stored)
        layers[-1].head.load_weights(directory / shards["head.head_fn"], "head.")
    return model


def computing_in(model: transformers.PreTrainedModel, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model itself; for float64 with norms that don't round to float32, as those of transformers do."""
    if dtype == torch.float64:
        for name, norm in [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")]:
            exact = nn.RMSNorm(norm.weight.shape[0], norm.variance_epsilon, dtype=dtype)
            exact.weight = norm.weight
            model.set_submodule(name, exact)
        if hasattr(model.config, "num_experts"):
            model.set_experts_implementation("eager")  # the others have no float64
    return model


def plain(shape: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A random decoder: ``dense``, with ``tied`` embeddings, or a mixture of ``experts``."""
    torch.manual_seed(0)
    if shape == "experts":
        model = transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SIZES, **EXPERTS))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=shape == "tied"))
    return computing_in(model.to(dtype), dtype)


def logits(model: nn.Module) -> Tensor:
    tokens = torch.arange(48).reshape(2, 24) % 61
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.double()


def change(shape: str, options: UpcycleOptions, dtype: torch.dtype, folder: Path) -> tuple[float, nn.Module]:
    """The largest change of the logits, as a fraction of the largest logit, and the model with its sites."""
    before = plain(shape, dtype).eval()
    before.save_pretrained(folder / "plain", max_shard_size="60KB")
    upcycle(folder / "plain", folder / "upcycled", options)
    model = upcycled(folder / "upcycled", dtype).eval()
    expected = logits(before)
    return float((logits(model) - expected).abs().max() / expected.abs().max()), model


def spread(model: nn.Module) -> float:
    """How far the streams behind the last layer lie apart, as a fraction of their mean."""
    logits(model)
    x = model.model.layers[-1].shared["streams"]  # [batch, seq, streams, dim]
    mean = x.mean(-2, keepdim=True)
    return float(((x - mean).square().mean() / mean.square().mean()).sqrt())


def train(model: nn.Module, steps: int) -> list[float]:
    """The losses of some steps in which the model learns to repeat the token that stood two places before."""
    torch.manual_seed(1)
    model.train()
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), list[float]()
    for _ in range(steps):
        tokens = torch.randint(64, (16, 24))
        predicted = model(input_ids=tokens, use_cache=False).logits[:, 2:]
        loss = functional.cross_entropy(predicted.flatten(0, 1), tokens[:, :-2].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def table() -> None:
    """The change of the logits for each dialect, the largest of the three models."""
    print("| dialect | float64 | float32 | float64 with noise |\n|---|---|---|---|")
    for name in dialect_names():
        cells = list[str]()
        for dtype, noise in ((torch.float64, 0.0), (torch.float32, 0.0), (torch.float64, 0.1)):
            largest = 0.0
            for shape in ("dense", "tied", "experts"):
                stored = str(dtype).removeprefix("torch.")
                options = UpcycleOptions(dialect=name, dtype=stored, noise=noise, allow_approximate=True)
                with tempfile.TemporaryDirectory() as folder:
                    largest = max(largest, change(shape, options, dtype, Path(folder))[0])
            cells.append(f"{largest:.0e}")
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)


def main(shape: str = "dense", dialect: str = "deepseek-v4") -> None:
    for dtype in (torch.float64, torch.float32):
        for noise in (0.0, 0.1):
            stored = str(dtype).removeprefix("torch.")
            options = UpcycleOptions(dialect=dialect, dtype=stored, noise=noise, allow_approximate=True)
            with tempfile.TemporaryDirectory() as folder:
                largest, model = change(shape, options, dtype, Path(folder))
            apart = f"the streams lie {spread(model):.0e} apart" if noise else "the streams are equal"
            print(f"{stored}, noise {noise}: the logits change by {largest:.0e}, {apart}")
    losses = train(model, 60)
    print(f"loss {losses[0]:.1f} at first, {losses[-1]:.1f} after {len(losses)} steps")


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    arguments = sys.argv[1:]
    if arguments[:1] == ["--table"]:
        table()
    elif arguments[:1] == ["--save"]:
        plain(arguments[2] if arguments[2:] else "dense", torch.float32).save_pretrained(arguments[1])
    else:
        main(*arguments)
