"""Models of the transformers library, ported to a MaxText tree and back, compute what they computed before."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from conformance.porter.errors import PortError
from conformance.porter.inspection import inspect
from conformance.porter.port import Options, port
from conformance.porter.storage.stacks import Stacks
from tests.conformance.porter import bounds
from tests.conformance.porter import transformers_models as models

torch = pytest.importorskip("torch", reason="needs the package torch")
jax = pytest.importorskip("jax", reason="needs the package jax")
orbax = pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")
jax_impl = pytest.importorskip("jax_impl")
functional = jax_impl.functional

CAUSAL, CONDITIONAL = "DeepseekV4ForCausalLM", "Glm5NextForConditionalGeneration"
BASES = ("DeepseekV4Model", "Glm5NextTextModel")
MODULES = {"attention": "mhc_attention", "ffn": "mhc_mlp"}
SCANNED, UNSCANNED = Stacks(), Stacks.parse("unscanned")


@pytest.fixture(scope="module", params=(CAUSAL, CONDITIONAL, *BASES))
def any_peer(request, tmp_path_factory):
    return models.build(request.param, tmp_path_factory.mktemp("peer") / "model")


@pytest.fixture(scope="module", params=(CAUSAL, CONDITIONAL))
def peer(request, tmp_path_factory):
    return models.build(request.param, tmp_path_factory.mktemp("peer") / "model")


@pytest.fixture(scope="module")
def seen(peer):
    """The run of a peer with its true values: (sites, head, expected of sites, expected of the head)."""
    sites, last = models.watch(peer)
    parameters = bounds.dialect(peer.dialect, models.STREAMS, norm_eps=peer.norm_eps)
    expected = {
        name: bounds.site(site.x, site.y, models.canonical(peer.connections[name]), parameters)
        for name, site in sites.items()
    }
    of_head = None
    if peer.head is not None:
        weights = {
            "head_fn": models.array(peer.head.hc_fn).T, "head_base": models.array(peer.head.hc_base),
            "head_scale": models.array(peer.head.hc_scale),
        }  # fmt: skip
        of_head = bounds.head(last["x"], weights, parameters)
    return sites, last, expected, of_head


def to_maxtext(peer, target, stacks=SCANNED, **changes):
    options = Options(to="maxtext", to_dialect=f"maxtext,norm_eps={peer.norm_eps}", stacks=stacks, **changes)
    return port(peer.directory, target, options)


def config_of(peer):
    reduce = "head" if peer.head is not None else "sum"
    return jax_impl.MHCConfig.from_dialect(
        "maxtext", streams=models.STREAMS, dim=models.DIM, norm_eps=peer.norm_eps, reduce=reduce
    )


def from_tree(tree, config, stacks, name):
    """The in-memory weights of a site (the head's for ``head``) from a restored MaxText tree."""
    decoder = tree["params"]["params"]["decoder"]
    if name == "head":
        leaves = {k.replace("hc_", "head_"): v for k, v in decoder["hc_head"].items()}
    else:
        _, layer, kind = name.split(".")
        node = decoder["layers" if stacks is SCANNED else f"layers_{layer}"][MODULES[kind]]
        leaves = {**{k: v for k, v in node.items() if k != "mhc_norm"}, "mhc_norm.scale": node["mhc_norm"]["scale"]}
        if stacks is SCANNED:
            leaves = {k: np.take(np.asarray(v), int(layer), 1) for k, v in leaves.items()}
    shapes = functional.head_shapes(config) if name == "head" else functional.weight_shapes(config)
    return jax_impl.from_flat({k: jax.numpy.asarray(v) for k, v in leaves.items()}, config, shapes)


def computed(weights, config, site):
    """The values of `jax_impl` for a captured site."""
    x = jax.numpy.asarray(site.x)
    gates, _, _ = functional.coefficients(x, weights, config)
    u, context, _ = functional.pre(x, weights, config)
    out = functional.post(jax.numpy.asarray(site.y), context)
    return {"pre": gates, "post": context.post, "H": context.H, "u": u, "out": out}


def restored(how, path):
    checkpointer = {"PyTree": orbax.PyTreeCheckpointer, "Standard": orbax.StandardCheckpointer}[how]
    return checkpointer().restore(path)


def test_the_captured_runs_are_not_bland(peer, seen):
    sites, last, _, _ = seen
    assert list(sites) == [f"layers.{k}.{kind}" for k in range(3) for kind in ("attention", "ffn")]
    for name, site in sites.items():
        assert site.post.std() > 0.2 and site.H.std() > 0.15, name
        assert np.abs(site.out - site.x).max() > 0.1 * np.abs(site.x).max(), name
        assert np.abs(site.H - site.H.swapaxes(-1, -2)).max() > 0.3, name
    assert np.abs(last["x"] - last["x"].mean(2, keepdims=True)).max() > 0.1 * np.abs(last["x"]).max()


def test_the_running_modules_are_within_the_bounds(peer, seen):
    sites, last, expected, of_head = seen
    for name, site in sites.items():
        bounds.within(expected[name].ratios({k: getattr(site, k) for k in ("post", "H", "u", "out")}), f"torch, {name}")
    if of_head:
        bounds.within(of_head.ratios({"out": last["out"]}), "torch, head")


@pytest.mark.parametrize("how", ("PyTree", "Standard", "canonical"))
@pytest.mark.parametrize("stacks", (SCANNED, UNSCANNED), ids=str)
def test_jax_computes_from_the_maxtext_tree_what_the_model_runs(peer, seen, stacks, how, tmp_path):
    sites, last, expected, of_head = seen
    report = to_maxtext(peer, tmp_path / "tree", stacks)
    assert report.rounding == 0 and report.verdict != "approximate" and report.sites == len(sites) + bool(of_head)
    config = config_of(peer)
    wanted = [*sites, "head"] if of_head else list(sites)
    if how == "canonical":
        file = tmp_path / "c.safetensors"
        assert port(tmp_path / "tree", file, Options(to="canonical")).verdict == "exact"
        shapes = {"head": functional.head_shapes(config)}
        weights = {k: jax_impl.load_weights(file, config, f"{k}.", shapes.get(k)) for k in wanted}
    else:
        tree = restored(how, tmp_path / "tree")
        weights = {k: from_tree(tree, config, stacks, k) for k in wanted}
    for name, site in sites.items():
        values = computed(weights[name], config, site)
        bounds.within(expected[name].ratios(values), f"jax, {name}")
        ran = {k: getattr(site, k) for k in values if k != "pre"}
        bounds.within(expected[name].ratios({k: values[k] for k in ran}, against=ran), f"jax against torch, {name}")
    if of_head:
        out = {"out": functional.head(jax.numpy.asarray(last["x"]), weights["head"], config)}
        bounds.within(of_head.ratios(out), "jax, head")
        bounds.within(of_head.ratios(out, against=last), "jax against torch, head")


@pytest.mark.parametrize("name, dialect", [
    (CAUSAL, "deepseek-v4-transformers"), (CONDITIONAL, "glm-5"),
    ("DeepseekV4Model", ""), ("Glm5NextTextModel", "glm-5"),
])  # fmt: skip
def test_the_config_tells_the_dialect_of_what_save_pretrained_wrote(name, dialect, tmp_path):
    """The bare DeepSeek model is written under the released files' names, and either of their dialects is right."""
    peer = models.build(name, tmp_path / "model")
    inspection = inspect(peer.directory)
    allowed = (dialect,) if dialect else ("deepseek-v4", "deepseek-v4-transformers")
    assert "config.json" in inspection.told_by and inspection.dialect in allowed, (
        inspection.dialect,
        inspection.told_by,
    )


def test_the_way_back_gives_the_same_bits(any_peer, tmp_path):
    """Into a copy whose mHC tensors are garbage; with its old index it loads as it was."""
    before = models.result(any_peer.model)
    to_maxtext(any_peer, tmp_path / "tree")
    garbage = models.spoilt(any_peer.directory, tmp_path / "into")
    old_index = (garbage / "model.safetensors.index.json").read_bytes()
    wrong = models.result(models.load(any_peer.name, garbage))
    assert not np.array_equal(wrong, before)
    port(tmp_path / "tree", None, Options(to=inspect(garbage).layout, into=garbage))
    assert np.array_equal(models.result(models.load(any_peer.name, garbage)), before)
    (garbage / "model.safetensors.index.json").write_bytes(old_index)
    assert np.array_equal(models.result(models.load(any_peer.name, garbage)), wrong)


@pytest.mark.parametrize("name", BASES)
def test_a_port_into_a_directory_of_another_layout_is_refused_or_right(name, tmp_path):
    """A model without its outer class is written as ``layers.0.hc_attn_fn``, and loads ``model.layers.…`` too."""
    peer = models.build(name, tmp_path / "model")
    options = Options(to="maxtext", dialect=f"{peer.dialect},norm_eps={peer.norm_eps}",
                      to_dialect=f"maxtext,norm_eps={peer.norm_eps}")  # fmt: skip
    port(peer.directory, tmp_path / "tree", options)
    into = models.spoilt(peer.directory, tmp_path / "into")
    before = models.index(into)
    try:
        port(tmp_path / "tree", None, Options(to="transformers", into=into))
    except PortError:
        assert models.index(into) == before
    else:
        assert np.array_equal(models.result(models.load(name, into)), models.result(peer.model))


def test_the_newest_port_into_a_directory_counts(any_peer, tmp_path):
    name, into = any_peer.name, models.spoilt(any_peer.directory, tmp_path / "into")
    other = models.build(name, tmp_path / "other", seed=5)
    with torch.no_grad():  # the same model, but for its hyper-connections
        rest = {k: v for k, v in any_peer.model.state_dict().items() if k not in any_peer.mhc_names}
        other.model.load_state_dict(rest, strict=False)
    for source in (any_peer, other, any_peer, other):
        tree = tmp_path / "tree"
        to_maxtext(source, tree, overwrite=True)
        port(tree, None, Options(to=inspect(into).layout, into=into))
        assert np.array_equal(models.result(models.load(name, into)), models.result(source.model))
    wrong = [k for k, file in models.index(into).items() if ("hc_" in k) != file.startswith("model-mhc-")]
    assert wrong == []
    shards = sorted(f for f in models.index(into).values() if f.startswith("model-mhc-"))
    assert shards[0] == shards[-1] == "model-mhc-00004.safetensors"


def test_the_way_back_names_the_parameters_of_the_model(peer, tmp_path):
    """On its own DeepSeek's; GLM's language model needs --names."""
    to_maxtext(peer, tmp_path / "tree")
    names = {}
    if peer.name == CONDITIONAL:
        lead = "model.language_model.layers.{layer}"
        names = {"attention": f"{lead}.attn_hc.", "ffn": f"{lead}.ffn_hc."}
    options = Options(to="transformers", to_dialect=f"{peer.dialect},norm_eps={peer.norm_eps}", names=names)
    port(tmp_path / "tree", tmp_path / "back", options)
    (file,) = (tmp_path / "back").glob("*.safetensors")
    tensors = load_file(file)
    assert set(tensors) == peer.mhc_names == set(models.index(tmp_path / "back"))
    other = models.build(peer.name, tmp_path / "other", seed=5).model
    keys = other.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=False)
    assert keys.unexpected_keys == [] and not peer.mhc_names & set(keys.missing_keys)
    state = peer.model.state_dict()
    assert all(torch.equal(value, state[k]) for k, value in other.state_dict().items() if k in peer.mhc_names)


def test_a_site_of_two_dtypes_keeps_both(tmp_path):
    """GLM in bfloat16 keeps base and scale in float32."""
    peer = models.build(CONDITIONAL, tmp_path / "model", dtype="bfloat16")
    with torch.no_grad():
        for module in peer.connections.values():
            module.base.data, module.scale.data = module.base.data.float() + 1e-4, module.scale.data.float() + 1e-4
    peer.model.save_pretrained(peer.directory, max_shard_size="12KB")
    reference = models.load(CONDITIONAL, peer.directory)
    first = next(iter(models.Peer(CONDITIONAL, reference, peer.directory).connections.values()))
    assert (first.fn.dtype, first.base.dtype, first.scale.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    to_maxtext(peer, tmp_path / "tree")
    into = models.spoilt(peer.directory, tmp_path / "into")
    port(tmp_path / "tree", None, Options(to="transformers", into=into))
    back = models.load(CONDITIONAL, into)
    assert np.array_equal(models.result(back), models.result(reference))
    assert all(torch.equal(v, reference.state_dict()[k]) for k, v in back.state_dict().items())


@pytest.mark.parametrize("name", (CAUSAL, CONDITIONAL))
def test_other_eps_in_the_config_are_read_and_must_be_met(name, tmp_path):
    """A port that leaves out the config's eps says that it is approximate, and writes nothing."""
    peer = models.build(name, tmp_path / "model")
    content = json.loads((peer.directory / "config.json").read_text())
    place = content.get("text_config", content)
    place |= {"rms_norm_eps": 3e-4, "hc_eps": 2e-5, "hc_sinkhorn_iters": 7}
    (peer.directory / "config.json").write_text(json.dumps(content))
    # MaxText's own head keeps its eps of 1e-6 whatever the configuration says: that alone makes the port approximate.
    dialect = "maxtext,norm_eps=3e-4,eps=2e-5,pre_eps=2e-5,iterations=7,head_norm_eps=null"
    assert port(peer.directory, tmp_path / "tree", Options(to="maxtext", to_dialect=dialect)).verdict != "approximate"
    for change in ("norm_eps=1e-6", "eps=1e-6", "pre_eps=1e-6", "iterations=20"):
        with pytest.raises(PortError, match="approximate") as refused:
            port(peer.directory, tmp_path / "wrong", Options(to="maxtext", to_dialect=f"{dialect},{change}"))
        assert refused.value.status == 4
        assert not (tmp_path / "wrong").exists()
    into = models.spoilt(peer.directory, tmp_path / "into")
    port(tmp_path / "tree", None, Options(to="transformers", into=into))
    assert np.array_equal(models.result(models.load(name, into)), models.result(models.load(name, peer.directory)))
