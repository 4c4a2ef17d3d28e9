"""A checkpoint's figures: against a direct evaluation, on every kind of streams, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from conformance.oracle.data import normal
from conformance.porter.errors import PortError
from conformance.questions.health.measure import Options, Ran, measure
from examples.naive import residual_matrix
from tests.conformance.questions.health import models
from tests.conformance.questions.health.models import DIM, POST, PRE, RES, M, N


def by_hand(tensors, name, x):
    """pre and post as sigmoids, and H, of DeepSeek-V4, a token at a time (docs/mathematics.md, "Forward")."""
    flat = x.reshape(len(x), N * DIM)
    normed = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-6)
    fn, base, scale = (
        tensors[f"{name}_{part}"].astype(np.float32).astype(np.float64) for part in ("fn", "base", "scale")
    )
    z = normed @ fn.T * np.repeat(scale, [N, N, N * N]) + base
    row = {"softmax": "rows", "order": "rows-first", "guard": "add", "eps": 1e-6, "iterations": 20, "logit_limit": None,
           "residual": "sinkhorn"}  # fmt: skip
    H = residual_matrix(z[:, RES].reshape(-1, N, N), row)
    return 1 / (1 + np.exp(-z[:, PRE])), 1 / (1 + np.exp(-z[:, POST])), H


def test_made_streams_go_through_the_sites(tmp_path):
    tensors = models.healthy(2)
    health = measure(models.write(tmp_path, tensors), Options(tokens=5, seed=3))
    (stack,) = health.stacks
    names = [f"layers.{k}.hc_{kind}" for k in range(2) for kind in ("attn", "ffn")]
    x = np.repeat(normal("health 3 layers embedding", (5, 1, DIM)), N, 1)
    C = np.eye(N)
    for index, (name, site) in enumerate(zip(names, stack.sites, strict=True)):
        pre, post, H = by_hand(tensors, name, x)
        assert site.pre.mean == pytest.approx(pre.mean(0), abs=1e-9)
        assert site.post.mean == pytest.approx(post.mean(0), abs=1e-9)
        assert site.gains.backward_sums == pytest.approx(H.sum(-1).mean(0), abs=1e-9)
        assert site.gains.forward_sums == pytest.approx(H.sum(-2).mean(0), abs=1e-9)
        assert site.share == pytest.approx((np.square(x).sum(-1) / np.square(x).sum((-1, -2))[:, None]).mean(0))
        C = C @ H
        composite = stack.composite[index]
        assert (composite.forward, composite.backward) == pytest.approx(
            (np.abs(C.sum(-2)).max(-1).mean(), np.abs(C.sum(-1)).max(-1).mean()), abs=1e-9
        )
        y = normal(f"health 3 layers branch {index}", (5, DIM))
        x = 2 * post[:, :, None] * y[:, None] + np.einsum("tij,tic->tjc", H, x)
    (head,) = health.heads
    flat = x.reshape(5, -1)
    normed = flat / np.sqrt((flat**2).mean(-1, keepdims=True) + 1e-6)
    z = normed @ tensors["hc_head_fn"].astype(np.float32).T
    assert head.gate.mean == pytest.approx((1 / (1 + np.exp(-z))).mean(0), abs=1e-6)
    assert health.tokens == 5 and health.drifts == "backward" and health.dialect == "deepseek-v4"


def test_given_streams_by_the_names_of_sites(tmp_path):
    path, tensors = models.write(tmp_path / "model", models.healthy(1)), models.healthy(1)
    xs = {f"layers.0.{kind}": normal(kind, (2, 3, N, DIM)).astype(np.float32) for kind in ("attention", "ffn")}
    save_file(xs, tmp_path / "x.safetensors")
    health = measure(path, Options(activations=tmp_path / "x.safetensors"))
    for site, name in zip(health.stacks[0].sites, ("attn", "ffn"), strict=True):
        x = xs[site.name].astype(np.float64).reshape(6, N, DIM)
        assert site.post.mean == pytest.approx(by_hand(tensors, f"layers.0.hc_{name}", x)[1].mean(0), abs=1e-9)
    assert health.tokens == 6 and "a tensor for each site" in health.activations
    assert health.notes == ["there are no streams for head, which is left out"] and not health.heads


def test_one_array_for_every_site(tmp_path):
    path = models.write(tmp_path / "model", models.healthy(1))
    x = normal("x", (4, N, DIM))
    np.save(tmp_path / "x.npy", x)
    save_file({"whatever": x}, tmp_path / "x.safetensors")
    first, second = (measure(path, Options(activations=tmp_path / f"x.{kind}")) for kind in ("npy", "safetensors"))
    assert first.stacks == second.stacks and first.heads and first.tokens == 4


def refused(said, status=2, **options):
    path = options.pop("path")
    ran = options.pop("ran", None)
    with pytest.raises(PortError, match=said) as caught:
        measure(path, Options(**options), ran)
    assert caught.value.status == status


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"layers.0.attention": (3, N, DIM)}, "must hold streams under the name layers.0.ffn"),
        ({"a": (3, N, DIM), "b": (3, N, DIM)}, r"under the name of each site \(layers.0.attention, …\), got 2: a, b"),
        ({"a": (3, N, DIM + 1)}, r"must hold streams \[..., 4, 8\] of one token at least, .* got \[3, 4, 9\]"),
        ({"layers.0.attention": (0, N, DIM), "layers.0.ffn": (0, N, DIM)}, "one token at least"),
        ({"layers.0.attention": (3, N, DIM), "layers.0.ffn": (2, N, DIM)},
         "streams of layers.0.ffn must be of as many tokens as those of the sites before, 3, got 2"),
    ],
)  # fmt: skip
def test_streams_that_dont_fit_are_refused(tmp_path, tensors, said):
    path = models.write(tmp_path / "model", models.healthy(1))
    save_file({name: np.ones(shape, np.float32) for name, shape in tensors.items()}, tmp_path / "x.safetensors")
    refused(said, path=path, activations=tmp_path / "x.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused_by_name(tmp_path, value):
    tensors = models.healthy(1)
    x = {f"layers.0.{kind}": np.ones((3, N, DIM), np.float32) for kind in ("attention", "ffn")}
    x["layers.0.ffn"][1, 2, 3] = value
    save_file(x, tmp_path / "x.safetensors")
    path = models.write(tmp_path / "model", tensors)
    refused(
        "layers.0.ffn must be finite, and aren't for 1 of 3 tokens", path=path, activations=tmp_path / "x.safetensors"
    )
    tensors["layers.0.hc_ffn_base"][3] = value
    path = models.write(tmp_path / "sick", tensors)
    refused(r"layers.0.hc_ffn_base must be finite, got (nan|inf) at \[3\]", path=path)


def test_a_model_that_ran_is_compared_with_the_dialect(tmp_path):
    tensors = models.healthy(1)
    path = models.write(tmp_path, tensors)
    xs = {f"layers.0.{kind}": normal(kind, (5, N, DIM)) for kind in ("attention", "ffn")}
    own = {
        site: by_hand(tensors, f"layers.0.hc_{name}", xs[site])[2]
        for site, name in (("layers.0.attention", "attn"), ("layers.0.ffn", "ffn"))
    }
    health = measure(path, Options(), Ran(xs, own, "of a test"))
    assert health.own is not None and health.own < 1e-12 and health.activations == "of a test"
    transposed = {site: H.swapaxes(-1, -2) for site, H in own.items()}
    refused("layers.0.attention: the model's own H differs by .* from that of deepseek-v4", 1, path=path,
            ran=Ran(xs, transposed, ""))  # fmt: skip
    refused("layers.0.ffn was expected among the model's hyper-connections that ran", path=path,
            ran=Ran({"layers.0.attention": xs["layers.0.attention"]}, {}, ""))  # fmt: skip


def test_the_side_that_drifts_changes_with_the_mix(tmp_path):
    """The same weights, read as a dialect that mixes the other way: the gains change sides."""
    path = models.write(tmp_path, models.sick())
    x = tmp_path / "x.npy"
    np.save(x, normal("x", (7, N, DIM)))
    first = measure(path, Options(activations=x))
    second = measure(path, Options(activations=x, dialect="deepseek-v4,mix=out-in"))
    assert (first.drifts, second.drifts) == ("backward", "forward")
    for a, b in zip(first.stacks[0].sites, second.stacks[0].sites, strict=True):
        assert (a.gains.forward, a.gains.backward) == (b.gains.backward, b.gains.forward)
    last = second.stacks[0].composite[-1]
    assert last.forward > 2 and last.backward == pytest.approx(1, abs=1e-4)


def test_extra_layers_begin_anew(tmp_path):
    health = measure(models.write(tmp_path, models.sick()), Options())
    layers, ahead = health.stacks
    assert (layers.name, len(layers.sites), ahead.name, len(ahead.sites)) == ("layers", 24, "mtp.0", 2)
    assert ahead.composite[0] == ahead.sites[0].gains and [head.name for head in health.heads] == ["head", "mtp.0.head"]


def test_an_identity_has_no_logits_and_no_side_that_drifts(tmp_path):
    names = {"layers": "model.layers", "hc_attn_": "hc_attn_layer.hc_pre.hc_", "hc_ffn_": "hc_mlp_layer.hc_pre.hc_",
             "hc_head_": "model.hc_head.hc_head_"}  # fmt: skip
    tensors = {}
    for name, value in models.healthy(1).items():
        kept = value if "head" in name else value[:2] if name.endswith("scale") else value[: 2 * N]
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = kept
    health = measure(models.write(tmp_path, tensors, model_type="hy_v4", hc_sinkhorn_iters=None), Options())
    site = health.stacks[0].sites[0]
    assert health.drifts == "neither" and set(site.alpha) == {"pre", "post"} and site.deviation == 0
    assert site.matrix.from_identity == 0 and not health.warnings


def test_a_missing_layer_is_noted(tmp_path):
    tensors = {name: value for name, value in models.healthy(3).items() if not name.startswith("layers.1.")}
    health = measure(models.write(tmp_path, tensors), Options())
    assert any("layers 1 are missing" in note for note in health.notes)
    assert [site.name for site in health.stacks[0].sites][2] == "layers.2.attention"


def test_a_head_alone_and_an_unknown_model_are_refused(tmp_path):
    heads = {name: value for name, value in models.healthy(1).items() if "head" in name}
    refused("holds a head alone", path=models.write(tmp_path / "head", heads))
    path = models.write(tmp_path / "unknown", models.healthy(1), model_type="deepseek_v9")
    refused("model_type deepseek_v9 is not known", 6, path=path)
    assert measure(path, Options(dialect="deepseek-v4")).dialect == "deepseek-v4"


def test_the_result_is_json_with_a_format(tmp_path):
    health = measure(models.write(tmp_path, models.sick()), Options())
    content = json.loads(json.dumps(health.as_dict(), allow_nan=False))
    assert content["format"] == "mhc-conformance-health/1" and len(content["warnings"]) == 5
    assert content["stacks"][0]["sites"][0]["pre"]["closed"] == [0] * N and M == 24


def test_the_same_seed_gives_the_same_figures(tmp_path):
    path = models.write(tmp_path, models.healthy())
    first, again, other = (measure(path, Options(seed=seed)).stacks for seed in (1, 1, 2))
    assert first == again != other
