"""transformers loads upcycled models of its own classes, which then compute what they compute with plain residuals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conformance.porter.storage.holding import hyper_connections
from conformance.porter.upcycling.upcycle import UpcycleOptions, upcycle
from tests.conformance.porter import transformers_models as models

torch = pytest.importorskip("torch", reason="needs the package torch")
files = pytest.importorskip("safetensors.torch", reason="needs the package torch")

CLASSES = ("DeepseekV4ForCausalLM", "Glm5NextForConditionalGeneration")
FLOAT32 = 3e-6
"""The largest change of the logits, as a fraction of the largest logit; measured are 8e-7 and 1.2e-6."""


class Plain(torch.nn.Module):
    """Stands in for a hyper-connection of transformers: with it, every stream follows the plain residual network."""

    def __init__(self, head: bool = False, matrix: bool = True):
        super().__init__()
        self.head, self.matrix = head, matrix

    def forward(self, x: Any) -> Any:
        n, first = x.shape[-2], x[..., 0, :]  # [batch, seq, dim]
        post = torch.ones(x.shape[:-1])
        if self.head:
            return first
        return (post, torch.eye(n).expand(*x.shape[:-2], n, n), first) if self.matrix else (post, first)


def without_sites(directory: Path, target: Path) -> Path:
    """The checkpoint that ``save_pretrained`` has written, less its hyper-connections, in one file."""
    target.mkdir()
    tensors: dict[str, Any] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= files.load_file(shard)
    kept = {name: value for name, value in tensors.items() if name not in set(hyper_connections(tensors))}
    assert len(kept) < len(tensors)
    files.save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(directory / "config.json", target / "config.json")
    return target


def change(before: np.ndarray, after: np.ndarray) -> float:
    return float(np.abs(after - before).max() / np.abs(before).max())


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("name", CLASSES)
def test_a_model_of_its_classes_computes_the_plain_residual_network(tmp_path, name, noise):
    peer = models.build(name, tmp_path / "model")
    before = models.result(peer.model)
    plain = without_sites(tmp_path / "model", tmp_path / "plain")
    report = upcycle(plain, tmp_path / "upcycled", UpcycleOptions(to="transformers", noise=noise))
    assert report.dialect == peer.dialect and report.streams == models.STREAMS
    upcycled = models.Peer(name, models.load(name, tmp_path / "upcycled"), tmp_path / "upcycled")
    after = models.result(upcycled.model)
    for layer in upcycled.text.layers:
        layer.attn_hc, layer.ffn_hc = Plain(), Plain()
    upcycled.text.hc_head = Plain(head=True)
    assert change(models.result(upcycled.model), after) < FLOAT32
    assert change(before, after) > 0.01  # the sites that were taken out were random ones


def test_hunyuans_class_computes_the_plain_residual_network(tmp_path):
    hunyuan = pytest.importorskip("tests.conformance.porter.test_port_peers_hunyuan")
    hunyuan.build("HYV4ForCausalLM", tmp_path / "model", hc_magnitude=2.0)
    plain = without_sites(tmp_path / "model", tmp_path / "plain")
    report = upcycle(plain, tmp_path / "upcycled", UpcycleOptions(to="hunyuan", noise=0.1))
    assert report.dialect.startswith("hunyuan-v4") and report.post == 1.0
    model = hunyuan.load("HYV4ForCausalLM", tmp_path / "upcycled")
    after = hunyuan.result(model)
    for layer in model.model.layers:
        layer.attn_hc, layer.ffn_hc = Plain(matrix=False), Plain(matrix=False)
    model.model.hc_head = Plain(head=True)
    assert change(hunyuan.result(model), after) < FLOAT32


def test_a_model_that_transformers_has_no_sites_for_loads_as_it_was(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "plain")
    upcycle(tmp_path / "plain", tmp_path / "upcycled", UpcycleOptions(to="transformers"))
    assert json.loads((tmp_path / "upcycled" / "config.json").read_text())["hc_mult"] == 4
    loaded, loading = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "upcycled", output_loading_info=True)
    assert not loading["missing_keys"] and len(loading["unexpected_keys"]) == 2 * 2 * 3 + 3
    assert np.array_equal(models.result(loaded.eval()), models.result(model))


@pytest.mark.parametrize("framework", ["jax_impl", "torch_impl"])
def test_both_implementations_load_the_sites(tmp_path, framework):
    from tests.conformance.porter.plain_model import DIM, LAYERS, build

    implementation = pytest.importorskip(framework, reason=f"needs the framework of {framework}")
    upcycle(build(tmp_path / "plain"), tmp_path / "upcycled", UpcycleOptions())
    config = implementation.MHCConfig.from_dialect("deepseek-v4", streams=4, dim=DIM, norm_eps=1e-5)
    rngs = {"rngs": pytest.importorskip("flax.nnx").Rngs(0)} if framework == "jax_impl" else {}
    sites = {
        f"layers.{layer}.{kind}.": implementation.ManifoldConstrainedHyperConnections(config, **rngs)
        for layer in range(LAYERS)
        for kind in ("attention", "ffn")
    }
    sites["head."] = implementation.HyperHead(config, **rngs)
    implementation.load_model(tmp_path / "upcycled" / "model-mhc-00001.safetensors", sites)
    value = sites["layers.1.ffn."].pre_beta
    biases = np.asarray(value[...] if framework == "jax_impl" else value.detach())
    assert biases == pytest.approx(np.full(4, np.log(0.25 / 0.75)), abs=1e-4)
