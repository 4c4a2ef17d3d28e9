"""DeepSeek-V4 goes to MaxText and back without an option, with its eps, and MaxText's own code computes the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conformance.implementations.registry import unavailable
from conformance.porter.inspection import inspect
from conformance.porter.port import Options, port
from conformance.porter.storage.checkpoint import PORT_KEY
from conformance.porter.storage.opening import open_checkpoint
from conformance.porter.storage.stacks import Stacks
from tests.conformance.porter import bounds
from tests.conformance.porter import transformers_models as models
from tests.conformance.porter.porter_data import differences, read_sites, read_tensors

torch = pytest.importorskip("torch", reason="needs the package torch")
jax = pytest.importorskip("jax", reason="needs the package jax")
orbax = pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")

CAUSAL = "DeepseekV4ForCausalLM"
VERSION = "0.2.5"
MODULES = {"attention": "mhc_attention", "ffn": "mhc_mlp"}
MERGE = Path(__file__).parents[3] / "examples" / "porting" / "merge_maxtext.py"


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
    reduced = maxtext_layer.head(mhc, read, {**head, "x": jax.numpy.asarray(last["x"])})
    weights = {key: np.asarray(value) for key, value in head.items()}
    bounds.within(bounds.head(last["x"], weights, parameters).ratios({"out": reduced}), "maxtext, head")


@pytest.fixture
def whole(tree):
    """A model's leaves under their names: zeros in the place of the ported tensors, and others."""
    random = np.random.default_rng(5)
    tensors = {name: np.zeros(value.shape, value.dtype) for name, value in read_tensors(tree[0]).items()}
    tensors["params/params/decoder/layers_0/mlp/wi/kernel"] = random.standard_normal((8, 4)).astype(np.float32)
    tensors["params/params/token_embedder/embedding"] = random.standard_normal((16, 8)).astype(np.float32)
    return tensors


def merged(whole, ported, folder):
    """Runs the recipe of the examples."""
    nested: dict = {}
    for name, value in whole.items():
        *parents, leaf = name.split("/")
        node = nested
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    checkpointer = orbax.Checkpointer(orbax.PyTreeCheckpointHandler())
    checkpointer.save(folder / "model", orbax.args.PyTreeSave(nested), custom_metadata={"run": "seven"})
    command = [sys.executable, str(MERGE), str(folder / "model"), str(ported), str(folder / "merged")]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_ported_tree_is_merged_into_a_whole_checkpoint(tree, whole, tmp_path):
    """The ported leaves replace the model's, and every other leaf keeps its bits; both metadata are kept."""
    ran = merged(whole, tree[0], tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert differences(read_tensors(tmp_path / "merged"), {**whole, **read_tensors(tree[0])}) == []
    with open_checkpoint(tmp_path / "merged") as there, open_checkpoint(tree[0]) as ported:
        assert there.metadata == {"run": "seven", PORT_KEY: ported.metadata[PORT_KEY]}


def without(whole, name):
    return {key: value for key, value in whole.items() if name not in key}


CHANGES = {
    "headless": (lambda whole: without(whole, "hc_head"), "hc_head: is not in the model"),
    "narrow": (
        lambda whole: {**whole, **{k: v.astype(jax.numpy.bfloat16) for k, v in whole.items() if "hc_head" in k}},
        "port with --dtype bfloat16",
    ),
    "one-more-layer": (
        lambda whole: {**whole, "params/params/decoder/layers_99/mhc_mlp/pre_beta": np.zeros(4, np.float32)},
        "layers_99/mhc_mlp/pre_beta: the model has 1 tensors of hyper-connections that the port lacks",
    ),
    "a-leaf": (
        lambda whole: {**without(whole, "hc_head"), "params/params/decoder/hc_head": np.zeros(4, np.float32)},
        "hc_head: the port has a subtree, the model an array",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_cannot_take_the_port_is_not_merged(tree, whole, tmp_path, change):
    edit, saying = CHANGES[change]
    ran = merged(edit(whole), tree[0], tmp_path)
    assert ran.returncode and saying in ran.stderr, ran.stderr
    assert not (tmp_path / "merged").exists()


def test_an_optimizers_moments_are_no_hyper_connections_that_the_port_lacks(tree, whole, tmp_path):
    moments = {name.replace("params/", "opt_state/mu/", 1): value for name, value in whole.items()}
    ran = merged({**whole, **moments}, tree[0], tmp_path)
    assert ran.returncode == 0, ran.stderr
