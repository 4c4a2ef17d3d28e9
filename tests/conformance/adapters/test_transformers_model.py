"""Streams that hooks take from models of `transformers`, of random weights, and their health."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

pytest.importorskip("torch", reason="needs the package torch")
pytest.importorskip("transformers", reason="needs the package transformers")

from conformance.adapters import transformers_model
from conformance.cli import app
from tests.conformance.porter import transformers_models as made
from tests.conformance.porter.transformers_models import Peer

NAMES = ("DeepseekV4ForCausalLM", "Glm5NextForConditionalGeneration")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module", params=NAMES)
def peer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Peer:
    directory = tmp_path_factory.mktemp(request.param)
    return made.build(request.param, directory)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    return made.build(NAMES[0], tmp_path_factory.mktemp("deepseek"), seed=1)


def test_hooks_take_what_the_model_itself_saw(peer):
    """The same model, loaded from its files, against hooks of the tests' own on the model in memory."""
    sites, last = made.watch(peer)
    ids = np.arange(1, 1 + made.TOKENS)[None]
    run = transformers_model.run(peer.directory, ids, 0, 0)
    assert set(run.streams) - {"head"} == set(sites)
    for name, site in sites.items():
        shape = (made.TOKENS, made.STREAMS, made.DIM)
        np.testing.assert_allclose(run.streams[name], site.x.reshape(shape), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(run.matrices[name], site.H.reshape(-1, 4, 4), rtol=1e-5, atol=1e-6)
    if peer.head is not None:
        np.testing.assert_allclose(run.streams["head"], last["x"].reshape(shape), rtol=1e-5, atol=1e-6)


def test_a_random_model_is_healthy_and_its_own_h_is_that_of_its_dialect(peer):
    done = invoke("health", peer.directory, "--model", "--tokens", 16, "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.output)
    assert content["own"] < 1e-5 and content["tokens"] == 16 and content["warnings"] == []
    assert content["dialect"] == peer.dialect and "16 random token ids" in content["activations"]
    assert [site["name"] for site in content["stacks"][0]["sites"]] == list(peer.connections)


def test_a_port_of_a_model_has_the_same_health(deepseek, tmp_path):
    target = tmp_path / "canonical.safetensors"
    assert invoke("port", deepseek.directory, target, "--to", "canonical").exit_code == 0
    first, second = (json.loads(invoke("health", path, "--json").output) for path in (deepseek.directory, target))
    assert first["stacks"] == second["stacks"] and first["heads"] == second["heads"] and first["warnings"] == []
    assert (first["layout"], second["layout"]) == ("transformers", "canonical")


def test_ids_are_the_users(deepseek, tmp_path):
    np.save(tmp_path / "ids.npy", np.array([[1, 2, 3], [4, 5, 6]]))
    done = invoke("health", deepseek.directory, "--model", "--ids", tmp_path / "ids.npy", "--json")
    assert json.loads(done.output)["tokens"] == 6 and "the ids of" in done.output


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (np.array([[1, 64]]), "token ids must be from 0 to 63, as the model's vocabulary, got 1 to 64"),
        (np.array([1, 2]), r"token ids must be integers \[batch, seq\], got int64 \[2\]"),
        (np.array([[1.0]]), "got float64"),
    ],
)
def test_ids_that_the_model_doesnt_know_are_refused(deepseek, ids, said):
    with pytest.raises(transformers_model.Unfit, match=said):
        transformers_model.run(deepseek.directory, ids, 0, 0)


def test_another_configuration_than_the_models_is_noticed(deepseek, tmp_path):
    """The file says that Sinkhorn runs twice, and the model that ran had 20 iterations."""
    config = json.loads((deepseek.directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hc_sinkhorn_iters": 2}))
    done = invoke("health", deepseek.directory, "--model", "--config", tmp_path / "config.json")
    assert done.exit_code == 1 and "the model's own H differs by" in done.stderr and done.stdout == ""


def test_a_model_that_isnt_whole_is_refused(deepseek, tmp_path):
    """Weights that are missing would be random numbers."""
    from shutil import copytree

    copytree(deepseek.directory, tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    attention = next(name for name in index["weight_map"] if re.search(r"layers\.1\.(?!hc)", name))
    shard = Path(tmp_path / "model" / index["weight_map"][attention])
    from safetensors.numpy import load_file, save_file

    save_file({k: v for k, v in load_file(shard).items() if k != attention}, shard, metadata={"format": "pt"})
    del index["weight_map"][attention]
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    done = invoke("health", tmp_path / "model", "--model")
    assert done.exit_code == 2 and "1 tensors of the model are missing" in done.stderr, done.stderr


def test_a_model_without_hyper_connections_is_refused(tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    with pytest.raises(transformers_model.Unfit, match=r"LlamaModel has no module layers\.N\.attn_hc or ffn_hc"):
        transformers_model.run(tmp_path, None, 4, 0)


def test_what_transformers_cant_load_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    done = invoke("health", tmp_path, "--model")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and "transformers can't run this model" in done.stderr


def test_a_model_whose_h_is_the_identity_returns_none_to_compare(tmp_path):
    hunyuan = pytest.importorskip("tests.conformance.porter.test_port_peers_hunyuan", reason="needs hy_v4")
    hunyuan.build("HYV4ForCausalLM", tmp_path)
    done = invoke("health", tmp_path, "--model", "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.output)
    assert content["own"] is None and content["drifts"] == "neither" and content["dialect"] == "hunyuan-v4"
    assert len(content["stacks"][0]["sites"]) == 6 and len(content["heads"]) == 1
