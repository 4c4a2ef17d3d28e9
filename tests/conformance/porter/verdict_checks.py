"""Checks of a report's deviations by the formulas of `porter_data`."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.porter import dialects, probe
from tests.conformance.porter.porter_data import layer

STREAMS, DIM = 4, 6
V4 = "deepseek-v4,reduce=none"
SINGLE_PASS = "pre_from=previous,reduce=carried"
LITE = "mhc-lite,norm_weight=false"
HUNYUAN = "hunyuan-v4,reduce=none"


def assert_nothing_written(directory):
    assert [p.name for p in directory.iterdir()] == ["source.safetensors"]


def deviations(sites, after, source, target, x):
    """The deviations of each site's H, u and out by the formulas of `porter_data`, as the report has them."""
    p, q = dialects.parse(source), dialects.parse(target)
    measured = {}
    for site, weights in sites.items():
        first, second = layer(x, weights, p), layer(x, after[site], q)
        apart = {k: np.max(np.abs(first[k] - second[k])) for k in first}
        measured[site] = {k: v if k == "H" else v / np.max(np.abs(first[k])) for k, v in apart.items()}
    return measured


def assert_measured(report, sites, after, source, target):
    x = probe.activations(report.probes, report.streams, report.dim, 0)
    expected = deviations(sites, after, source, target, x)
    assert report.deviations.keys() == expected.keys()
    for site, row in expected.items():
        for name, value in row.items():
            assert report.deviations[site][name] == pytest.approx(value, rel=1e-6, abs=1e-13), (site, name)


def transposed(sites):
    """The sites with their residual logits transposed, so that Sinkhorn gives the transpose of H."""
    by_site = {}
    for site, weights in sites.items():
        alpha, n = weights["res_alpha"], len(weights["pre_beta"])
        alpha = alpha.reshape(-1, n, n).swapaxes(1, 2).reshape(alpha.shape)
        by_site[site] = {**weights, "res_alpha": alpha, "res_beta": weights["res_beta"].T}
    return by_site


def mirrored(dialect):
    """The dialect whose H is the transpose, on transposed logits: the other mix, softmax and order."""
    p = dialects.parse(dialect)
    other = {"rows": "columns", "columns": "rows", "none": "none", "in-out": "out-in", "out-in": "in-out"}
    order = "columns-first" if p["order"] == "rows-first" else "rows-first"
    return f"{dialect},mix={other[p['mix']]},softmax={other[p['softmax']]},order={order}"
