"""Keys of a GGUF file may be missing, impossible to understand, or unable to state a value."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("gguf", reason="gguf, of the extra of that name, is not installed")

import gguf

from conformance.porter.inspection import inspect
from conformance.porter.port import Options, port
from tests.conformance.porter.layout_rows import deepseek
from tests.conformance.porter.misread import DIM, STREAMS, sites, wrapped, write_model
from tests.conformance.porter.porter_data import random_sites, write_canonical
from tests.conformance.porter.small_checkpoint import call, refuses

KEYS = {"hyper_connection.count": STREAMS, "hyper_connection.sinkhorn_iterations": 20, "hyper_connection.epsilon": 1e-6,
        "attention.layer_norm_rms_epsilon": 1e-6, "block_count": 2, "embedding_length": DIM}  # fmt: skip


def model(path, without=(), **changes):
    """A model of two blocks, without some of its keys and with others."""
    writer = gguf.GGUFWriter(path, "deepseek4")
    held = {f"deepseek4.{key}": value for key, value in KEYS.items() if key not in without}
    for key, value in {**held, **changes}.items():
        add = {str: writer.add_string, list: writer.add_array, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](key, value)
    for name, value in deepseek(sites(2, True), STREAMS, DIM).items():
        shown = name.replace("hc_head_", "output_hc_") if name.startswith("hc_head_") else name.replace("layers", "blk")
        writer.add_tensor(f"{shown}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_whole_file_says_what_it_computes(tmp_path):
    report = port(model(tmp_path / "m.gguf"), tmp_path / "o.safetensors", Options(to="canonical"))
    assert (report.reason, report.source_told_by, report.assumed) == ("exact", "from its keys", False)


@pytest.mark.parametrize("key, value", [
    ("deepseek4.hyper_connection.foo", 1), ("deepseek4.hyper_connection.magnitude", 3.0), ("deepseek4.hc.eps", 1e-2),
    ("deepseek4.sinkhorn.iterations", 3), ("deepseek41.hyper_connection.epsilon", 1e-2), ("deepseek4.mhc_eps", 1.0),
    ("hyper_connection.epsilon", 1e-2), ("deepseek4.hyper_connection.scales", [1.0, 2.0]),
])  # fmt: skip
def test_a_key_of_hyper_connections_that_nobody_knows_is_named_as_it_stands_there(tmp_path, key, value):
    path = model(tmp_path / "m.gguf", **{key: value})
    refuses(tmp_path, "port", path, tmp_path / "o.safetensors", "--to", "canonical",
            saying=(f"m.gguf: the key {key} ",), status=6)  # fmt: skip
    assert "not known" in call("inspect", path).stdout


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ("block_count", "embedding_length")])
def test_a_value_that_is_an_array_is_none(tmp_path, key):
    path = model(tmp_path / "m.gguf", without=[key], **{f"deepseek4.{key}": [20, 3]})
    refuses(tmp_path, "port", path, tmp_path / "o.safetensors", "--to", "canonical", saying=("an array",), status=6)


@pytest.mark.parametrize("key", ["block_count", "nextn_predict_layers"])
def test_a_count_of_blocks_that_is_no_number_is_refused(tmp_path, key):
    path = model(tmp_path / "m.gguf", without=[key], **{f"deepseek4.{key}": [2, 3]})
    refuses(tmp_path, "inspect", path, saying=(key, "m.gguf"), status=2)


@pytest.mark.parametrize("without", [
    [key for key in KEYS if "." in key], list(KEYS), ["hyper_connection.epsilon"], ["attention.layer_norm_rms_epsilon"],
    ["hyper_connection.count"], ["hyper_connection.sinkhorn_iterations"],
], ids=lambda keys: f"{len(keys)} {keys[0]}")  # fmt: skip
def test_a_file_without_the_keys_that_its_software_needs_says_nothing(tmp_path, without):
    path = model(tmp_path / "m.gguf", without=without)
    arguments = (path, tmp_path / "o.safetensors", "--to", "canonical")
    refuses(tmp_path, "port", *arguments, saying=("--dialect", "--assume"), status=6)
    assert f"deepseek4.{without[0]}" in call("inspect", path).stdout
    assert call("port", *arguments, "--dialect", "deepseek-v4").exit_code == 0


def test_what_the_keys_state_is_said_of_the_keys(tmp_path):
    path = model(tmp_path / "m.gguf", without=["block_count"], **{"deepseek4.block_count": 5})
    refuses(tmp_path, "port", path, tmp_path / "o.safetensors", "--to", "canonical",
            saying=("the file's keys state 5 layers, and 2 are there",), status=7)  # fmt: skip


def test_another_configuration_is_called_by_its_own_name(tmp_path):
    config = tmp_path / "other.json"
    config.write_text(json.dumps({"model_type": "deepseek4", "hc_eps": 1e-3}))
    done = call("port", model(tmp_path / "m.gguf"), tmp_path / "o.safetensors", "--to", "canonical", "--config", config)
    assert "(from its other.json)" in done.stdout and "in the place of the file's own keys" in done.stdout, done.output


def test_a_value_that_the_keys_cannot_state_is_not_carried(tmp_path):
    """llama.cpp has no key for Xing-4's clamp: a file with another one would be read with its own, 30."""
    tensors = wrapped(
        wrapped(deepseek(sites(3, False), STREAMS, DIM), "hc_attn_", "attn_hc.hc_"), "hc_ffn_", "ffn_hc.hc_"
    )
    config = {"model_type": "xing4_0", "hc_mult": STREAMS, "hidden_size": DIM, "num_hidden_layers": 3,
              "mhc_h_res_clamp_max": 10, "mhc_h_res_clamp_min": -10}  # fmt: skip
    source = write_model(tmp_path / "source", wrapped(tensors, "layers.", "model.layers."), config)
    printed = refuses(tmp_path, "port", source, tmp_path / "o.gguf", "--to", "gguf", saying=("approximate",), status=4)
    assert "the limit of the residual logits 10 becomes 30.0" in printed, printed
    there = tmp_path / "there"
    assert port(source, there, Options(to="xing")).reason == "exact"
    assert inspect(there).dialect == "xing-4,logit_limit=10"


@pytest.mark.parametrize("eps", [1.2345678901e-6, 3e-6])
def test_an_eps_is_the_one_that_float32_holds(tmp_path, eps):
    dialect = f"deepseek-v4,norm_eps={eps}"
    made = write_canonical(tmp_path / "s.safetensors", random_sites(1, STREAMS, DIM, head=True), dialect)
    port(made, tmp_path / "t.gguf", Options(to="gguf"))
    inspection = inspect(tmp_path / "t.gguf")
    assert (
        not inspection.assumed and not inspection.problem and not [line for line in inspection.odd if "noted" in line]
    )
    assert np.float32(float(inspection.dialect.partition("norm_eps=")[2])) == np.float32(eps)


def test_a_key_that_was_changed_after_the_port_is_what_the_software_runs(tmp_path):
    made = write_canonical(tmp_path / "s.safetensors", random_sites(1, STREAMS, DIM, head=True), "deepseek-v4")
    port(made, tmp_path / "t.gguf", Options(to="gguf"))
    reader = gguf.GGUFReader(tmp_path / "t.gguf", "r+")
    field = reader.fields["deepseek4.hyper_connection.sinkhorn_iterations"]
    field.parts[field.data[0]][0] = 3
    reader.data.flush()
    inspection = inspect(tmp_path / "t.gguf")
    assert inspection.dialect == "deepseek-v4,iterations=3"
    assert any("a port noted iterations = 20" in line for line in inspection.odd), inspection.odd
