"""What isn't a decoder without hyper-connections is refused in one line, and nothing is written."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from conformance.cli import app
from tests.conformance.porter.plain_model import DIM, MODULES, build, tensors


def refused(tmp_path, source, *arguments, status=2):
    before = sorted(p.name for p in tmp_path.iterdir())
    done = CliRunner().invoke(app, ["upcycle", str(source), str(tmp_path / "out"), *map(str, arguments)])
    assert done.exit_code == status and not done.stdout, done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize(
    ("config", "message", "status"),
    [
        ({"num_hidden_layers": 3}, "states 3 layers, and there are not so many.*model.layers.2", 2),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two', and no model has so many layers", 2),
        ({"num_hidden_layers": None}, "num_hidden_layers must be a positive whole number, got None", 2),
        ({"hidden_size": 16}, "no embedding has the width 16", 2),
        ({"hidden_size": True}, "hidden_size must be a positive whole number, got True", 2),
        ({"is_encoder_decoder": True}, "expected a decoder", 5),
        ({"architectures": ["BertForMaskedLM"]}, "states ForMaskedLM: expected a decoder", 5),
        ({"use_parallel_residual": True}, "attention and MLP read the same stream", 5),
        ({"model_type": "qwen4_exp"}, "gated residual", 5),
        ({"hc_mult": 0}, "states 0 streams, expected 1 to 64", 2),
        ({"text_config": {"hidden_size": 4}}, "hidden_size is 8 outside and 4 inside", 2),
    ],
)
def test_a_configuration_of_something_else(tmp_path, config, message, status):
    source = build(tmp_path / "plain", **config)
    assert re.search(message, refused(tmp_path, source, "--to", "deepseek", status=status))


@pytest.mark.parametrize(
    ("values", "message", "status"),
    [
        (
            {**tensors(), "model.layers.0.attn_hc.fn": np.zeros((24, 32), np.float32)},
            "has hyper-connections already",
            2,
        ),
        (tensors(modules=MODULES[:2]), "model.layers.0 has no MLP", 5),
        (tensors(modules=(*MODULES[2:], "input_layernorm")), "model.layers.1 has no attention", 5),
        (tensors(modules=(MODULES[0], MODULES[1], MODULES[3])), "has one norm, input_layernorm", 5),
        ({**tensors(), **tensors(stem="draft.layers")}, "under draft.layers and under model.layers", 5),
        (tensors(stem="encoder.stages"), "got model.layers (1)", 2),
    ],
)
def test_tensors_of_something_else(tmp_path, values, message, status):
    assert message in refused(tmp_path, build(tmp_path / "plain", values=values), status=status)


def test_a_path_without_a_model(tmp_path):
    assert "no such file or directory" in refused(tmp_path, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "save the model with save_pretrained" in refused(tmp_path, tmp_path / "empty")
    source = build(tmp_path / "plain", shards=1)
    (source / "config.json").unlink()
    assert "has no config.json, which says how many layers" in refused(tmp_path, source)
    (source / "config.json").write_text("[" * 100_000)
    assert "expected JSON" in refused(tmp_path, source)
    save_file({"x": np.zeros(1)}, source / "adapter.safetensors")
    assert "nothing says which hold the model" in refused(tmp_path, source)


def test_an_index_that_transformers_would_not_read(tmp_path):
    source = build(tmp_path / "plain")
    save_file({"x": np.zeros(1)}, source / "model.safetensors")
    assert "transformers reads that file and not the index" in refused(tmp_path, source)
    single = build(tmp_path / "single", shards=1, transformers_weights="model.safetensors")
    assert "names 'model.safetensors' as transformers_weights" in refused(tmp_path, single)


def test_a_shard_that_is_missing_or_cut_short(tmp_path):
    source = build(tmp_path / "plain")
    shard = source / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert "is cut short" in refused(tmp_path, source)
    shard.unlink()
    assert "no such file" in refused(tmp_path, source)


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (("--to", "nowhere"), "unknown layout", 2),
        (("--to", "liger", "--dialect", "deepseek-v4"), "has no head.*reduce=mean", 5),
        (("--to", "deepseek", "--dialect", "hunyuan-v4"), "no place for residual=identity", 5),
        (("--to", "deepseek", "--dialect", "maxtext"), "add norm_weight=false", 2),
        (("--to", "deepseek", "--dialect", "deepseek-v4,norm_eps=1e-6"), "states rms_norm_eps = 1e-05", 2),
        (("--to", "canonical", "--stacks", "unscanned"), "are MaxText's", 2),
        (("--streams", "1"), "take two streams or more", 5),
        (("--dialect", "hunyuan-v4,post_scale=1", "--to", "hunyuan"), "post_scale=2", 5),
        (("--names", "attention=x.{layer}.", "--names", "ffn=x.{layer}."), "give each kind a prefix of its own", 2),
        (("--dialect", "deepseek-v5"), "unknown dialect", 2),
    ],
)
def test_options_that_do_not_fit(tmp_path, arguments, message, status):
    assert re.search(message, refused(tmp_path, build(tmp_path / "plain"), *arguments, status=status))


def test_a_configuration_that_is_nested_too_deeply_is_one_line(tmp_path):
    source = build(tmp_path / "plain")
    config = json.loads((source / "config.json").read_text())
    deep = "{" + '"a": {' * 900 + "}" * 900 + "}"
    (source / "config.json").write_text(json.dumps(config)[:-1] + f', "rope": {deep}' + "}")
    done = CliRunner().invoke(app, ["upcycle", str(source), str(tmp_path / "out")])
    assert done.exit_code in (0, 2) and (done.exit_code == 0 or done.stderr.count("\n") == 1)


def test_widths_other_than_the_streams_are_not_misread(tmp_path):
    values = {**tensors(), "model.embed_tokens.weight": np.zeros((16, DIM + 1), np.float32)}
    values["lm_head.weight"] = np.zeros((16, DIM + 1), np.float32)
    assert f"no embedding has the width {DIM}" in refused(tmp_path, build(tmp_path / "plain", values=values))
