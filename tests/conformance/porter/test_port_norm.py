"""The norm weight is folded into φ, divided out of it or set to 1, and the report says how exact that is."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.porter import dialects, probe
from conformance.porter.errors import PortError
from conformance.porter.port import Options, Refused, port
from tests.conformance.porter.porter_data import (
    ROUNDOFF,
    differences,
    folded,
    largest_error,
    layer,
    random_sites,
    rationals,
    read_sites,
    with_ones,
    write_canonical,
)

STREAMS, DIM = 4, 6
MAXTEXT = "maxtext,coefficients=float32,mixing=float32,reduction=float32"
SAME_EPS = "deepseek-v4,norm_eps=1e-5,head_norm_eps=1e-6"
V4 = "deepseek-v4,reduce=none"  # the sites here are without a head
WITH = f"{V4},norm_weight=true"
SOURCES = ["canonical", "maxtext"]


@pytest.fixture
def folds(tmp_path):
    """Ports sites with a norm weight to DeepSeek's layout, from a canonical file or from an Orbax tree of MaxText's."""

    def run(sites, layout="canonical", dialect=MAXTEXT, to_dialect=SAME_EPS, **options):
        source = write_canonical(tmp_path / "source.safetensors", sites, dialect)
        if layout == "maxtext":
            pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
            port(source, tmp_path / "tree", Options(to="maxtext", dialect=dialect, to_dialect=dialect))
            source = tmp_path / "tree"
        return port(source, tmp_path / "folded.safetensors", Options(to="deepseek", to_dialect=to_dialect, **options))

    return run


def norm_weights(sites, values):
    """The sites with other norm weights, of their own dtype."""
    by_site = {}
    for number, (site, weights) in enumerate(sites.items()):
        w = np.resize(np.roll(values, number), len(weights["pre_alpha"])).astype(weights["pre_alpha"].dtype)
        by_site[site] = {**weights, "mhc_norm.scale": w}
    return by_site


def products(sites):
    """w φ in each weight's own dtype."""
    by_site = {}
    for site, weights in sites.items():
        w = weights["mhc_norm.scale"][:, None]
        by_site[site] = {k: v * w if k.endswith("_alpha") else v for k, v in weights.items() if k != "mhc_norm.scale"}
    return by_site


@pytest.mark.parametrize("layout", SOURCES)
def test_a_fold_is_exact_to_rounding(folds, layout):
    sites = random_sites(1, STREAMS, DIM, norm=True)
    report = folds(sites, layout)
    assert (report.source_layout, report.verdict) == (layout, "exact to rounding")
    assert 0 < report.rounding <= ROUNDOFF["float32"]
    read = read_sites(report.written)
    assert differences(read, products(sites)) == []  # float32's own product is the rounded one
    assert largest_error(read, folded(sites)) == pytest.approx(report.rounding, rel=1e-12)
    assert 0 < max(report.largest.values()) < 1e-5


@pytest.mark.parametrize("layout", SOURCES)
def test_a_fold_between_the_published_dialects_is_exact_to_rounding(folds, layout):
    sites = random_sites(2, STREAMS, DIM, norm=True)
    report = folds(sites, layout, "maxtext")
    assert report.verdict == "exact to rounding" and 0 < report.rounding <= ROUNDOFF["float32"]
    assert differences(read_sites(report.written), products(sites)) == []


@pytest.mark.parametrize("layout", SOURCES)
def test_another_eps_of_the_norm_is_approximate(folds, tmp_path, layout):
    sites = random_sites(3, STREAMS, DIM, norm=True)
    with pytest.raises(Refused) as raised:
        folds(sites, layout, "maxtext", to_dialect="deepseek-v4")
    assert (raised.value.status, raised.value.report.verdict) == (4, "approximate")
    assert not (tmp_path / "folded.safetensors").exists()
    report = folds(sites, dialect="maxtext", to_dialect="deepseek-v4", allow_approximate=True)
    assert report.verdict == "approximate" and "the norm's eps 1e-05 becomes 1e-06" in report.reason


@pytest.mark.parametrize("layout", SOURCES)
def test_the_eps_of_the_norm_is_carried_over_where_no_other_is_asked_for(folds, layout):
    """DeepSeek's software takes it from config.json: what is set there is said, and the function stays."""
    report = folds(random_sites(3, STREAMS, DIM, norm=True), layout, "maxtext", to_dialect=None)
    assert report.verdict == "exact to rounding" and 0 < report.rounding <= ROUNDOFF["float32"]
    assert (report.settings, report.settings_place) == ({"rms_norm_eps": 1e-5}, "config.json")


@pytest.mark.parametrize("layout", SOURCES)
@pytest.mark.parametrize("values", [[1.0], [0.5, 2.0, 1.0, -4.0, 0.125]], ids=["ones", "powers of two"])
def test_a_fold_that_rounds_nothing_is_exact(folds, layout, values):
    sites = norm_weights(random_sites(4, STREAMS, DIM), values)
    report = folds(sites, layout)
    assert (report.verdict, report.rounding) == ("exact", 0)
    assert report.reason.startswith("exact")
    assert max(report.largest.values()) < 1e-14
    read = read_sites(report.written)
    assert differences(read, products(sites)) == [] and largest_error(read, folded(sites)) == 0


@pytest.mark.parametrize("values", [[1.0], [0.5, 2.0]], ids=["ones", "powers of two"])
def test_a_fold_that_rounds_nothing_says_so_where_the_target_rounds_elsewhere(folds, values):
    sites = norm_weights(random_sites(5, STREAMS, DIM), values)
    report = folds(sites, dialect="maxtext")
    assert (report.verdict, report.rounding) == ("exact to rounding", 0)
    assert largest_error(read_sites(report.written), folded(sites)) == 0


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_fold_that_rounds_is_never_called_exact(folds, dtype):
    sites = random_sites(6, STREAMS, DIM, norm=True, dtype=dtype)
    report = folds(sites)
    error = largest_error(read_sites(report.written), folded(sites))
    assert 0 < error <= report.rounding * (1 + 2.0**-50) and report.rounding <= ROUNDOFF[dtype]
    assert report.verdict == "exact to rounding"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_products_that_float64_holds_are_exact(folds, dtype):
    """Products of two of these have 48 bits at most."""
    sites = random_sites(7, STREAMS, DIM, norm=True, dtype=dtype)
    report = folds(sites, dtype="float64")
    assert (report.verdict, report.rounding) == ("exact", 0)
    assert largest_error(read_sites(report.written), folded(sites)) == 0


def test_a_zero_in_the_norm_weight_is_folded(folds):
    sites = norm_weights(random_sites(8, STREAMS, DIM), [0.0, 1.0, 2.0])
    report = folds(sites)
    assert (report.verdict, report.rounding) == ("exact", 0)
    assert differences(read_sites(report.written), products(sites)) == []


def test_the_head_keeps_its_weights_in_a_fold(folds):
    sites = random_sites(9, STREAMS, DIM, norm=True, head=True)
    report = folds(sites, dialect=f"{MAXTEXT},reduce=head")
    assert report.head and report.deviations["head"] == {"head": 0.0}
    assert differences({"head": read_sites(report.written)["head"]}, {"head": sites["head"]}) == []


@pytest.fixture
def unfolds(tmp_path):
    """Ports sites without a norm weight to a layout that has one, divided by the norm weights of a file."""

    def run(sites, norms, to="canonical", **options):
        source = write_canonical(tmp_path / "source.safetensors", sites, V4)
        donor = write_canonical(tmp_path / "norms.safetensors", norms, WITH)
        target = tmp_path / ("tree" if to == "maxtext" else "there.safetensors")
        return port(source, target, Options(to=to, to_dialect=WITH, norm_weight=donor, **options))

    return run


def quotients(sites, norms):
    """φ / w as exact rationals."""
    dividends, divisors = rationals(sites), rationals(norms)
    for site, weights in dividends.items():
        w = divisors[site]["mhc_norm.scale"][:, None]
        weights |= {name: value / w for name, value in weights.items() if name.endswith("_alpha")}
    return dividends


@pytest.mark.parametrize("to", ["canonical", "transformer-engine", "maxtext"])
def test_a_given_norm_weight_is_divided_out(unfolds, to):
    if to == "maxtext":
        pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    sites, norms = random_sites(10, STREAMS, DIM), random_sites(11, STREAMS, DIM, norm=True)
    report = unfolds(sites, norms, to)
    assert report.verdict == "exact to rounding" and 0 < report.rounding <= ROUNDOFF["float32"]
    read = read_sites(report.written)
    expected_norms = {site: {"mhc_norm.scale": norms[site]["mhc_norm.scale"]} for site in sites}
    assert differences({s: {"mhc_norm.scale": w.pop("mhc_norm.scale")} for s, w in read.items()}, expected_norms) == []
    assert largest_error(read, quotients(sites, norms)) == pytest.approx(report.rounding, rel=1e-12)
    x, p = probe.activations(4, STREAMS, DIM, 0), dialects.parse(V4)
    for site, weights in sites.items():
        first, second = layer(x, weights, p), layer(x, {**read[site], **expected_norms[site]}, p)
        apart = np.max(np.abs(first["H"] - second["H"]))
        assert report.deviations[site]["H"] == pytest.approx(apart, rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_a_division_that_rounds_is_never_called_exact(unfolds, dtype):
    sites, norms = (random_sites(12, STREAMS, DIM, dtype=dtype, norm=norm) for norm in (False, True))
    report = unfolds(sites, norms)
    read = read_sites(report.written)
    for weights in read.values():
        del weights["mhc_norm.scale"]
    error = largest_error(read, quotients(sites, norms))
    assert 0 < error <= report.rounding * (1 + 2.0**-50) + 2.0**-53 and report.rounding <= ROUNDOFF[dtype]
    assert report.verdict == "exact to rounding"


@pytest.mark.parametrize("values", [[1.0], [0.5, 2.0, 1.0, -4.0]], ids=["ones", "powers of two"])
def test_a_division_that_rounds_nothing_is_exact_and_undone_by_a_fold(unfolds, tmp_path, values):
    sites = random_sites(13, STREAMS, DIM)
    report = unfolds(sites, norm_weights(sites, values))
    assert (report.verdict, report.rounding) == ("exact", 0)
    again = port(
        tmp_path / "there.safetensors",
        tmp_path / "again.safetensors",
        Options(to="canonical", to_dialect=V4),
    )
    assert (again.verdict, again.rounding) == ("exact", 0)
    assert differences(read_sites(tmp_path / "again.safetensors"), sites) == []


def test_a_norm_weight_with_zeros_cannot_be_divided_out(unfolds, tmp_path):
    sites = random_sites(14, STREAMS, DIM)
    norms = norm_weights(sites, [1.0])
    norms["layers.1.ffn"]["mhc_norm.scale"][-1] = 0
    with pytest.raises(PortError) as raised:
        unfolds(sites, norms, allow_approximate=True)
    assert raised.value.status == 5 and "zeros" in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["norms.safetensors", "source.safetensors"]


@pytest.mark.parametrize(
    "source_norm, to_dialect, norms, said",
    [
        (True, WITH, {}, "source without a norm weight"),
        (False, V4, {}, "source without a norm weight"),
        (False, WITH, {"norm": False}, "must have norm weights"),
        (False, WITH, {"dim": DIM + 1}, "must have norm weights"),
        (False, WITH, {"layers": 1}, "layers.1.attention"),
    ],
)
def test_norm_weights_that_do_not_belong_to_the_source_are_refused(tmp_path, source_norm, to_dialect, norms, said):
    sites = random_sites(15, STREAMS, DIM, norm=source_norm)
    source = write_canonical(tmp_path / "source.safetensors", sites, V4)
    others = random_sites(16, **{"streams": STREAMS, "dim": DIM, "norm": True, **norms})
    donor = write_canonical(tmp_path / "norms.safetensors", others, WITH)
    with pytest.raises(PortError) as raised:
        port(source, tmp_path / "there.safetensors", Options(to="canonical", to_dialect=to_dialect, norm_weight=donor))
    assert raised.value.status == 2 and said in str(raised.value)
    assert not (tmp_path / "there.safetensors").exists()


@pytest.mark.parametrize("to", ["canonical", "transformer-engine"])
def test_where_none_is_given_the_norm_weight_is_1_and_exact(tmp_path, to):
    sites = random_sites(17, STREAMS, DIM)
    source = write_canonical(tmp_path / "source.safetensors", sites, V4)
    report = port(source, tmp_path / "there.safetensors", Options(to=to, to_dialect=WITH))
    assert (report.verdict, report.rounding, set(report.largest.values())) == ("exact", 0, {0.0})
    assert differences(read_sites(tmp_path / "there.safetensors"), with_ones(sites)) == []


@pytest.mark.parametrize("to", ["deepseek", "transformers", "liger", "megatron"])
def test_a_layout_without_a_place_for_the_norm_weight_refuses_a_dialect_with_one(tmp_path, to):
    source = write_canonical(tmp_path / "source.safetensors", random_sites(18, STREAMS, DIM, norm=True), "maxtext")
    with pytest.raises(PortError) as raised:
        port(source, tmp_path / "there.safetensors", Options(to=to, to_dialect=WITH))
    assert raised.value.status == 2 and "norm_weight" in str(raised.value)
    assert not (tmp_path / "there.safetensors").exists()
