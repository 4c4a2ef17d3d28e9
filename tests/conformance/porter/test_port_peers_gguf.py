"""The package gguf reads the model's own bits from a GGUF file that the porter makes of a transformers model."""

from __future__ import annotations

import json

import numpy as np
import pytest

from conformance.porter.port import Options, port
from tests.conformance.porter import transformers_models as models

gguf = pytest.importorskip("gguf", reason="gguf, of the extra 'gguf', is not installed")
torch = pytest.importorskip("torch", reason="needs the package torch")

CAUSAL, CONDITIONAL = "DeepseekV4ForCausalLM", "Glm5NextForConditionalGeneration"
ARCHITECTURES = {CAUSAL: "deepseek4", CONDITIONAL: "glm5-next"}
BLOCKS = {"attn_hc": "hc_attn", "ffn_hc": "hc_ffn"}


def expected(peer):
    """The model's own tensors under GGUF's names."""
    tensors = {}
    for index, layer in enumerate(peer.text.layers):
        for attribute, short in BLOCKS.items():
            for name in ("fn", "base", "scale"):
                value = getattr(getattr(layer, attribute), name)
                tensors[f"blk.{index}.{short}_{name}.weight"] = value.detach().numpy()
    if peer.head is not None:
        for name in ("fn", "base", "scale"):
            tensors[f"output_hc_{name}.weight"] = getattr(peer.head, f"hc_{name}").detach().numpy()
    return tensors


@pytest.mark.parametrize("name", [CAUSAL, CONDITIONAL])
def test_the_package_reads_the_model_s_own_bits_and_its_configuration(name, tmp_path):
    peer = models.build(name, tmp_path / "model")
    report = port(peer.directory, tmp_path / "there.gguf", Options(to="gguf"))
    assert report.verdict in ("exact", "exact to rounding") and report.rounding == 0
    read = gguf.GGUFReader(tmp_path / "there.gguf")
    stored, wanted = {t.name: t for t in read.tensors}, expected(peer)
    assert stored.keys() == wanted.keys()
    for tensor, value in wanted.items():
        assert stored[tensor].data.dtype == value.dtype == np.float32
        assert np.array_equal(stored[tensor].data, value), tensor
    keys = {key: field.contents() for key, field in read.fields.items()}
    content = json.loads((peer.directory / "config.json").read_text())
    config, lead = content.get("text_config", content), ARCHITECTURES[name]
    assert keys["general.architecture"] == lead
    for key, word in {
        "hyper_connection.count": "hc_mult", "hyper_connection.sinkhorn_iterations": "hc_sinkhorn_iters",
        "hyper_connection.epsilon": "hc_eps", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
    }.items():  # fmt: skip
        assert np.float32(keys[f"{lead}.{key}"]) == np.float32(config[word]), key


@pytest.mark.parametrize("name", [CAUSAL, CONDITIONAL])
def test_the_way_back_gives_the_same_bits(name, tmp_path):
    peer = models.build(name, tmp_path / "model")
    before = models.result(peer.model)
    port(peer.directory, tmp_path / "there.gguf", Options(to="gguf"))
    into = models.spoilt(peer.directory, tmp_path / "into")
    assert not np.array_equal(models.result(models.load(name, into)), before)
    port(tmp_path / "there.gguf", None, Options(to="transformers", into=into))
    assert np.array_equal(models.result(models.load(name, into)), before)
