"""The verdict on dialects that differ in the mix, in Sinkhorn's softmax or in its order."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.porter import dialects, probe
from conformance.porter.port import Refused
from tests.conformance.porter.porter_data import (
    differences,
    projections,
    random_sites,
    read_sites,
    sinkhorn,
)
from tests.conformance.porter.verdict_checks import (
    DIM,
    LITE,
    STREAMS,
    V4,
    assert_measured,
    assert_nothing_written,
    mirrored,
    transposed,
)


@pytest.mark.parametrize("streams", [2, 3, 4, 5])
@pytest.mark.parametrize("dialect", ["paper", V4, "megatron", "maxtext-v1,norm_weight=false", "xing-4"])
def test_mix_softmax_and_order_flipped_together_are_exact(ported, dialect, streams):
    sites = random_sites(4, streams, DIM)
    report = ported(sites, dialect, mirrored(dialect))
    assert (report.verdict, report.rounding) == ("exact", 0)
    assert max(report.largest.values()) < 1e-13
    after = read_sites(report.written)
    assert differences(after, transposed(sites)) == []
    assert_measured(report, sites, after, dialect, mirrored(dialect))


@pytest.mark.parametrize("back", ["softmax=rows", "order=rows-first"])
def test_mix_flipped_with_one_of_softmax_and_order_is_approximate(ported, back):
    sites = random_sites(4, STREAMS, DIM)
    halfway = f"{mirrored(V4)},{back}"
    report = ported(sites, V4, halfway, allow_approximate=True)
    assert report.verdict == "approximate" and report.largest["H"] > 1e-9
    after = read_sites(report.written)
    assert_measured(report, sites, after, V4, halfway)


@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("source", ["transformer-engine", f"{V4},guard=clip"])
@pytest.mark.parametrize("order", ["rows-first", "columns-first"])
def test_a_softmax_is_the_first_pass_of_a_sinkhorn_without_one(ported, source, order, streams):
    sites = random_sites(17, streams, DIM)
    source = f"{source},order={order},softmax={order.removesuffix('-first')}"
    report = ported(sites, source, f"{source},softmax=none")
    assert report.verdict == "exact to rounding" and max(report.largest.values()) < 1e-13
    assert differences(read_sites(report.written), sites) == []
    report = ported(sites, source, f"{mirrored(source)},softmax=none", name="turned.safetensors")
    assert report.verdict == "exact to rounding" and max(report.largest.values()) < 1e-13
    assert differences(read_sites(report.written), transposed(sites)) == []


@pytest.mark.parametrize("streams", [3, 4, 5])
def test_mix_flipped_alone_is_approximate_and_nearer_than_a_copy(ported, tmp_path, streams):
    flipped = f"{V4},mix=out-in"
    sites, p = random_sites(5, streams, DIM), dialects.parse(V4)
    with pytest.raises(Refused) as raised:
        ported(sites, V4, flipped)
    assert raised.value.status == 4
    assert_nothing_written(tmp_path)
    report = ported(sites, V4, flipped, allow_approximate=True)
    after = read_sites(report.written)
    assert report.verdict == "approximate" and differences(after, transposed(sites)) == []
    assert_measured(report, sites, after, V4, flipped)
    x = probe.activations(report.probes, streams, DIM, 0)
    for site, weights in sites.items():
        logits = projections(x, weights, p)["res"].reshape(-1, streams, streams)
        assert 1 < logits.std() < 3.5
        H = sinkhorn(logits, p)
        turned = np.abs(sinkhorn(logits.swapaxes(-1, -2), p).swapaxes(-1, -2) - H).max()
        copied = np.abs(H.swapaxes(-1, -2) - H).max()
        assert report.deviations[site]["H"] == pytest.approx(turned, rel=1e-6)
        assert 0 < turned < copied / 3, f"{site}: transposed {turned:.3g}, copied {copied:.3g}"


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 5])
def test_permutations_with_mix_flipped_are_exact(ported, streams):
    sites = random_sites(6, streams, DIM, residual="permutations")
    report = ported(sites, LITE, f"{LITE},mix=out-in")
    assert (report.verdict, report.rounding) == ("exact", 0)
    assert max(report.largest.values()) < 1e-13
    after = read_sites(report.written)
    assert_measured(report, sites, after, LITE, f"{LITE},mix=out-in")
    assert (streams > 2) == bool(differences(after, sites))  # permutations of two are their own inverses


@pytest.mark.parametrize(
    "change",
    ["mix=out-in", "order=columns-first", "mix=out-in,order=columns-first", "softmax=columns",
     "softmax=columns,order=columns-first,mix=out-in"],
)  # fmt: skip
def test_a_single_stream_has_neither_mix_nor_order(ported, change):
    sites = random_sites(7, 1, DIM)
    report = ported(sites, V4, f"{V4},{change}")
    assert (report.verdict, report.rounding, set(report.largest.values())) == ("exact", 0, {0.0})
    assert differences(read_sites(report.written), sites) == []


def test_a_single_stream_shows_how_often_it_is_divided(ported):
    """Of 1 + eps one division leaves 1 - eps + 2 eps^2, two leave 1 - eps to the next order."""
    sites = random_sites(7, 1, DIM)
    once = f"{V4},iterations=1,eps=0.25"
    report = ported(sites, once, f"{once},softmax=columns", allow_approximate=True)
    assert report.verdict == "approximate" and report.largest["H"] > 1e-3
    report = ported(sites, f"{once},guard=clip", f"{once},guard=clip,softmax=columns", name="clip.safetensors")
    assert report.verdict == "exact"
