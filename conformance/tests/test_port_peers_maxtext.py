"""DeepSeek-V4 to MaxText and back without an option: the eps is carried, and MaxText's own code computes the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conformance.porter.inspection import inspect
from conformance.porter.port import Options, port
from conformance.porter.storage.stacks import Stacks
from conformance.registry import unavailable
from conformance.tests import bounds
from conformance.tests import transformers_models as models
from conformance.tests.porter_data import differences, read_sites, read_tensors

torch = pytest.importorskip("torch", reason="needs the package torch")
jax = pytest.importorskip("jax", reason="needs the package jax")
orbax = pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")

CAUSAL = "DeepseekV4ForCausalLM"
VERSION = "0.2.5"
MODULES = {"attention": "mhc_attention", "ffn": "mhc_mlp"}
MERGE = Path(__file__).parents[2] / "examples" / "porting" / "merge_maxtext.py"


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    return models.build(CAUSAL, tmp_path_factory.mktemp("peer") / "model")


@pytest.fixture(scope="module")
def tree(peer, tmp_path_factory):
    """The port to MaxText and its report."""
    target = tmp_path_factory.mktemp("tree") / "maxtext"
    return target, port(peer.directory, target, Options(to="maxtext", stacks=Stacks.parse("unscanned")))


def test_the_eps_is_carried_over_and_said(peer, tree):
    _, report = tree
    assert peer.norm_eps == 1e-6 and report.verdict == "exact to rounding" and report.rounding == 0
    assert report.settings == {"normalization_layer_epsilon": 1e-6} and "MaxText" in report.settings_place
    assert set(report.largest.values()) == {0.0}, report.largest


def test_the_way_back_is_bit_for_bit(peer, tree, tmp_path):
    report = port(tree[0], tmp_path / "back", Options(to="transformers"))
    assert report.verdict == "exact to rounding" and report.rounding == 0 and not report.settings
    assert differences(read_sites(tmp_path / "back"), read_sites(peer.directory)) == []
    assert inspect(tmp_path / "back").dialect == inspect(peer.directory).dialect == "deepseek-v4-transformers"


def test_maxtext_loads_the_port_and_computes_what_the_model_runs(peer, tree):
    """Every site, with the configuration that the port says must be set, and the head."""
    reason = unavailable("maxtext-0.2.5")
    if reason:
        pytest.skip(reason)
    from conformance.adapters import maxtext_layer

    target, report = tree
    decoder = orbax.PyTreeCheckpointer().restore(target)["params"]["params"]["decoder"]
    mhc = maxtext_layer.load(VERSION)
    sites, last = models.watch(peer)
    (eps,) = report.settings.values()
    config = {"dialect": "maxtext", **bounds.dialect("maxtext", models.STREAMS, norm_eps=eps), "dim": models.DIM}
    read = maxtext_layer.configuration(VERSION, config, jax.numpy.float32, jax.numpy.float32)
    assert read.normalization_layer_epsilon == 1e-6
    parameters = bounds.dialect(peer.dialect, models.STREAMS, norm_eps=peer.norm_eps)
    for name, site in sites.items():
        _, layer, kind = name.split(".")
        node = decoder[f"layers_{layer}"][MODULES[kind]]
        weights = {key: value for key, value in node.items() if key != "mhc_norm"}
        weights["mhc_norm.scale"] = node["mhc_norm"]["scale"]
        values = {key: jax.numpy.asarray(value) for key, value in {**weights, "x": site.x}.items()}
        y = jax.numpy.asarray(site.y)
        out, _, (pre, post, H) = maxtext_layer.run(mhc, read, values, lambda u: u, lambda inputs, y=y: y, "mlp_dense")
        expected = bounds.site(site.x, site.y, models.canonical(peer.connections[name]), parameters)
        bounds.within(expected.ratios({"pre": pre, "post": post, "H": H, "out": out}), f"maxtext, {name}")
    head = {ours: jax.numpy.asarray(decoder["hc_head"][theirs]) for theirs, ours in maxtext_layer.HEAD.items()}
    found = maxtext_layer.head(mhc, read, {**head, "x": jax.numpy.asarray(last["x"])})
    weights = {key: np.asarray(value) for key, value in head.items()}
    bounds.within(bounds.head(last["x"], weights, parameters).ratios({"out": found}), "maxtext, head")


def test_a_ported_tree_is_merged_into_a_whole_checkpoint(tree, tmp_path):
    """The recipe of the examples: the ported leaves replace the model's, and every other leaf keeps its bits."""
    random = np.random.default_rng(5)
    whole = {name: np.zeros(value.shape, value.dtype) for name, value in read_tensors(tree[0]).items()}
    whole["params/params/decoder/layers_0/mlp/wi/kernel"] = random.standard_normal((8, 4)).astype(np.float32)
    whole["params/params/token_embedder/embedding"] = random.standard_normal((16, 8)).astype(np.float32)
    nested: dict = {}
    for name, value in whole.items():
        *parents, leaf = name.split("/")
        node = nested
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    orbax.PyTreeCheckpointer().save(tmp_path / "model", nested)
    command = [sys.executable, str(MERGE), str(tmp_path / "model"), str(tree[0]), str(tmp_path / "merged")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert differences(read_tensors(tmp_path / "merged"), {**whole, **read_tensors(tree[0])}) == []
    del nested["params"]["params"]["decoder"]["hc_head"]
    orbax.PyTreeCheckpointer().save(tmp_path / "headless", nested)
    command = [sys.executable, str(MERGE), str(tmp_path / "headless"), str(tree[0]), str(tmp_path / "not")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode and "hc_head: is not in the model" in ran.stderr and not (tmp_path / "not").exists()
