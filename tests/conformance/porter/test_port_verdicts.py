"""The verdict on a port agrees with the measurement: exact, exact to rounding, approximate or impossible."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.porter import dialects, probe
from conformance.porter.errors import PortError
from conformance.porter.layout import Layout
from conformance.porter.layouts import layout_named
from conformance.porter.port import Options, Refused, port
from tests.conformance.porter.porter_data import (
    LAYOUTS,
    differences,
    layer,
    random_sites,
    read_sites,
    write_canonical,
)
from tests.conformance.porter.verdict_checks import (
    DIM,
    HUNYUAN,
    LITE,
    SINGLE_PASS,
    STREAMS,
    V4,
    assert_measured,
    assert_nothing_written,
)


@pytest.mark.parametrize(
    "dialect",
    ["paper", V4, "liger", "megatron", "transformer-engine", "glm-5", "deepseek-v4-transformers,reduce=none", LITE,
     HUNYUAN],
)  # fmt: skip
def test_the_same_dialect_is_exact(ported, dialect):
    residual = dialects.parse(dialect)["residual"]
    sites = random_sites(1, STREAMS, DIM, residual=residual)
    report = ported(sites, dialect, dialect)
    assert (report.verdict, report.rounding, set(report.largest.values())) == ("exact", 0, {0.0})
    assert differences(read_sites(report.written), sites) == []


@pytest.mark.parametrize(
    "change",
    [
        "norm_eps=1e-5", "norm_eps_position=root", "guard=clip", "guard=none,eps=0", "eps=1e-5", "iterations=19",
        "pre_eps=0", "post_scale=1", "post_eps=1e-6", "order=columns-first",
        "softmax=columns", "softmax=columns,order=columns-first", "guard=denominator", "guard=denominator,softmax=none",
        "logit_limit=0.5",
    ],
)  # fmt: skip
def test_another_function_is_approximate_and_refused(ported, tmp_path, change):
    sites = random_sites(2, STREAMS, DIM)
    with pytest.raises(Refused) as raised:
        ported(sites, V4, f"{V4},{change}")
    assert (raised.value.status, raised.value.report.verdict) == (4, "approximate")
    assert raised.value.report.written is None and max(raised.value.report.largest.values()) > 0
    assert_nothing_written(tmp_path)
    report = ported(sites, V4, f"{V4},{change}", allow_approximate=True)
    assert report.verdict == "approximate" and report.reason.startswith("approximate: ")
    assert report.deviations == raised.value.report.deviations
    after = read_sites(report.written)
    assert differences(after, sites) == []
    assert_measured(report, sites, after, V4, f"{V4},{change}")


@pytest.mark.parametrize(
    "change",
    ["coefficients=activation,mixing=activation", "mixing=activation", "reduction=activation",
     "coefficients=activation,mixing=activation,matrix=activation"],
)  # fmt: skip
def test_another_place_of_rounding_is_exact_to_rounding(ported, change):
    sites = random_sites(3, STREAMS, DIM)
    report = ported(sites, V4, f"{V4},{change}")
    assert (report.verdict, report.rounding) == ("exact to rounding", 0)
    assert differences(read_sites(report.written), sites) == []


@pytest.mark.parametrize("source, target", [(V4, f"{V4},{SINGLE_PASS}"), (f"{V4},{SINGLE_PASS}", V4)])
def test_the_single_pass_is_another_function_and_its_first_site_is_measured(ported, source, target):
    sites = random_sites(18, STREAMS, DIM, layers=1)
    report = ported(sites, source, target, allow_approximate=True)
    assert report.verdict == "approximate" and "the previous site's" in report.reason
    assert differences(read_sites(report.written), sites) == []
    x = probe.activations(report.probes, STREAMS, DIM, 0)
    for site, weights in sites.items():
        u = layer(x, weights, dialects.parse(V4))["u"]
        size = np.max(np.abs(u if source == V4 else x[:, 0]))
        assert report.deviations[site]["u"] == pytest.approx(np.max(np.abs(u - x[:, 0])) / size, rel=1e-6)
        assert report.deviations[site]["H"] == 0


def test_a_head_has_a_norm_eps_of_its_own(ported):
    plain, other = "deepseek-v4", "deepseek-v4,head_norm_eps=1e-2"
    sites = random_sites(19, STREAMS, DIM, head=True)
    report = ported(sites, plain, other, allow_approximate=True)
    assert report.verdict == "approximate" and "the head's norm eps 1e-06 becomes 0.01" in report.reason
    assert report.deviations["head"]["head"] > 1e-4 and report.deviations["layers.0.attention"]["u"] == 0
    same = ported(sites, plain, f"{plain},head_norm_eps=1e-6", name="same.safetensors")
    assert same.verdict == "exact" and set(same.largest.values()) == {0.0}
    without = {site: weights for site, weights in sites.items() if site != "head"}
    assert ported(without, V4, f"{V4},head_norm_eps=1e-2", name="without.safetensors").verdict == "exact"


@pytest.mark.parametrize(
    "residual, dialect, to_dialect, to",
    [
        ("permutations", LITE, "paper", "canonical"),
        ("permutations", LITE, None, "deepseek"),
        ("permutations", LITE, None, "liger"),
        ("sinkhorn", "paper", LITE, "canonical"),
        ("sinkhorn", "paper", "hunyuan-v4", "canonical"),
        ("identity", HUNYUAN, "paper", "canonical"),
        ("identity", HUNYUAN, None, "liger"),
        ("permutations", LITE, LITE, "deepseek"),
        ("permutations", LITE, LITE, "liger"),
        ("permutations", LITE, LITE, "transformer-engine"),
        ("identity", HUNYUAN, HUNYUAN, "liger"),
        ("identity", HUNYUAN, HUNYUAN, "megatron"),
    ],
)
@pytest.mark.parametrize("allow", [False, True])
def test_another_residual_matrix_is_impossible(ported, tmp_path, residual, dialect, to_dialect, to, allow):
    sites = random_sites(8, STREAMS, DIM, residual=residual)
    with pytest.raises(PortError) as raised:
        ported(sites, dialect, to_dialect, to, allow_approximate=allow)
    assert raised.value.status == 5 and "impossible" in str(raised.value)
    assert_nothing_written(tmp_path)


def test_maxtext_to_permutations_it_cannot_become_is_impossible(tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    sites = random_sites(9, 3, DIM, residual="permutations", norm=True)
    source = write_canonical(tmp_path / "source.safetensors", sites, "mhc-lite")
    port(source, tmp_path / "lite", Options(to="maxtext"))
    with pytest.raises(PortError) as raised:
        port(tmp_path / "lite", tmp_path / "there.safetensors", Options(to="deepseek"))
    assert raised.value.status == 5 and not (tmp_path / "there.safetensors").exists()


@pytest.mark.parametrize("to", ["liger", "transformer-engine"])
def test_a_head_without_a_place_is_approximate(ported, tmp_path, to):
    sites = random_sites(10, STREAMS, DIM, head=True)
    with pytest.raises(Refused) as raised:
        ported(sites, "deepseek-v4", "deepseek-v4", to)
    assert raised.value.status == 4 and "head" in raised.value.report.reason
    assert_nothing_written(tmp_path)
    report = ported(sites, "deepseek-v4", "deepseek-v4", to, allow_approximate=True)
    assert report.left_out == ["head"]
    assert differences(read_sites(report.written), {k: v for k, v in sites.items() if k != "head"}) == []


@pytest.mark.parametrize("form", ["there.safetensors", "there", "there.pt"])
def test_a_refusal_leaves_what_was_there(tmp_path, form):
    if form.endswith(".pt"):
        pytest.importorskip("torch", reason="torch is not installed")
    source = write_canonical(tmp_path / "source.safetensors", random_sites(11, STREAMS, DIM), V4)
    port(source, tmp_path / form, Options(to="deepseek"))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(Refused):
        port(source, tmp_path / form, Options(to="deepseek", to_dialect=f"{V4},eps=1e-5", overwrite=True))
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("scale", [100, 1000, 10_000])
@pytest.mark.parametrize("dialect", ["paper", V4, "megatron", "transformer-engine"])
def test_large_logits_are_copied_exactly(ported, dialect, scale):
    """Logits up to 1e4 give finite results (docs/mathematics.md, "Overflow")."""
    sites = random_sites(12, STREAMS, DIM)
    for weights in sites.values():
        weights["res_beta"] = (weights["res_beta"] * scale / 2).astype(np.float32)
    report = ported(sites, dialect, dialect)
    assert report.verdict == "exact" and set(report.largest.values()) == {0.0}


@pytest.mark.parametrize("dtype, value", [("float16", 7e4), ("bfloat16", 3.4e38), ("float32", 1e39)])
def test_a_value_that_does_not_fit_is_impossible(ported, tmp_path, dtype, value):
    sites = random_sites(13, STREAMS, DIM, dtype="float64" if dtype == "float32" else "float32")
    sites["layers.1.ffn"]["post_beta"][2] = value
    with pytest.raises(PortError) as raised:
        ported(sites, V4, V4, dtype=dtype)
    assert raised.value.status == 5
    assert "layers.1.ffn" in str(raised.value) and "post_beta [2]" in str(raised.value) and dtype in str(raised.value)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_what_is_not_finite_is_a_broken_source(ported, tmp_path, dtype, bad):
    sites = random_sites(14, STREAMS, DIM)
    sites["layers.1.ffn"]["post_beta"][2] = bad
    with pytest.raises(PortError) as raised:
        ported(sites, V4, V4, dtype=dtype)
    assert raised.value.status == 2 and "must be finite" in str(raised.value)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_product_that_does_not_fit_is_impossible(ported, tmp_path, dtype):
    sites = random_sites(15, STREAMS, DIM, norm=True, dtype=dtype)
    large = {"float64": 1e200, "float32": 1e30}[dtype]
    sites["layers.0.ffn"]["mhc_norm.scale"][5] = large
    sites["layers.0.ffn"]["pre_alpha"][5] = large
    with pytest.raises(PortError) as raised:
        ported(sites, V4, V4, "deepseek")
    assert raised.value.status == 5 and "layers.0.ffn" in str(raised.value)
    assert_nothing_written(tmp_path)


def test_every_site_of_the_report_is_measured(ported):
    sites = random_sites(16, STREAMS, DIM, layers=3, head=True)
    report = ported(sites, "deepseek-v4", "deepseek-v4", "deepseek")
    assert report.deviations.keys() == sites.keys() and set(report.deviations["head"]) == {"head"}


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"canonical"}))
def test_what_a_layout_s_own_software_computes_is_the_default(tmp_path, layout, head):
    if layout in ("maxtext", "gguf"):
        pytest.importorskip({"maxtext": "orbax.checkpoint"}.get(layout, layout))
    identity = layout == "hunyuan"
    dialect = "hunyuan-v4" if identity else "deepseek-v4" if head else V4
    sites = random_sites(3, 4, 3, head=head or identity, residual="identity" if identity else "sinkhorn")
    source = write_canonical(tmp_path / "source.safetensors", sites, dialect)
    target = tmp_path / ("there.gguf" if layout == "gguf" else "there")
    report = port(source, target, Options(to=layout, dry_run=True))
    assert report.target_dialect.split(",")[0] == layout_named(layout).dialect


def test_a_mistake_shows_though_the_norms_differ_and_weights_underflow(tmp_path, monkeypatch):
    sites = random_sites(4, 4, 3)
    for weights in sites.values():
        weights["pre_alpha"][0, 0] = weights["res_alpha"][1, 2] = 1e-9
    source = write_canonical(tmp_path / "source.safetensors", sites, V4)
    pack = Layout.pack

    def swapped(self, site, weights, *sizes):
        turned = {**weights, "pre_beta": weights["post_beta"], "post_beta": weights["pre_beta"]}
        return pack(self, site, turned if "pre_beta" in weights else weights, *sizes)

    other_norm = Options(to="canonical", to_dialect=f"{V4},norm_eps=1e-5", allow_approximate=True)
    narrow = Options(to="deepseek", dtype="float16")
    honest = port(source, tmp_path / "honest.safetensors", narrow)
    assert honest.underflows == 8 and honest.rounding <= 2.0**-11
    monkeypatch.setattr(Layout, "pack", swapped)
    for options in (other_norm, narrow):
        with pytest.raises(PortError, match="a mistake of the porter") as caught:
            port(source, tmp_path / "there.safetensors", options)
        assert caught.value.status == 1 and not (tmp_path / "there.safetensors").exists()


def test_roundings_that_meet_in_one_product_are_no_contradiction(tmp_path):
    """Three roundings by the same relative amount move a product by more than three times it."""
    value = np.float32(1 + 2.0**-8 + 2.0**-23)
    names = {"mhc_norm.scale": (1,), **{f"{p}_alpha": (1, 1) for p in ("pre", "post", "res")}}
    names |= {f"{p}_alpha_scale": (1,) for p in ("pre", "post", "res")}
    weights = {name: np.full(shape, value, np.float32) for name, shape in names.items()}
    weights |= {f"{p}_beta": np.zeros((1, 1) if p == "res" else 1, np.float32) for p in ("pre", "post", "res")}
    source = write_canonical(tmp_path / "source.safetensors", {"layers.0.attention": weights}, "maxtext")
    assert port(source, tmp_path / "there.safetensors", Options(to="canonical", dtype="bfloat16")).rounding > 0
