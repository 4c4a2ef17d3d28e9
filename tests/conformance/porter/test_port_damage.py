"""`inspect` warns of signs in weights and names that a model was damaged before."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from conformance.porter.inspection import inspect
from tests.conformance.porter.porter_data import random_sites, write_canonical
from tests.conformance.porter.small_checkpoint import call

DIALECT = "maxtext,reduce=head"


def model(seed=5, **changes):
    return random_sites(seed, 4, 16, layers=2, norm=True, head=True, **changes)


def odd(tmp_path, sites, dialect=DIALECT):
    return inspect(write_canonical(tmp_path / "source.safetensors", sites, dialect)).odd


def test_a_sound_model_has_no_warning(tmp_path):
    assert odd(tmp_path, model()) == []


@pytest.mark.parametrize("dtype, half", [("bfloat16", 2.0**-9), ("float16", 2.0**-12)])
def test_narrow_tensors_are_said_with_what_they_cost(tmp_path, dtype, half):
    """The figures lie where roundings of that size put them, and grow with the unit of the dtype."""
    (line,) = odd(tmp_path, model(dtype=dtype))
    assert line.startswith(f"tensors are {dtype}, and the software keeps them in float32")
    figures = {part.split(" by ")[0].split()[-1]: float(part.split(" by ")[1]) for part in line.split(", ")[1:]}
    assert set(figures) == {"H", "u", "out", "head"}
    assert all(half / 50 < value < half * 500 for value in figures.values()), figures


def test_the_cost_of_bfloat16_is_that_of_the_weights_before(tmp_path):
    """Of weights that were rounded here, the true cost and the one that is said are of one size."""
    from conformance.porter.convert import Converted
    from conformance.porter.damage import ANOTHER_FUNCTION, TOKENS
    from conformance.porter.dialects import parse
    from conformance.porter.probe import Probes, activations
    from conformance.porter.site import SiteKey

    sites = model()
    narrow = {s: {k: v.astype(ml_dtypes.bfloat16) for k, v in w.items()} for s, w in sites.items()}
    (line,) = odd(tmp_path, narrow)
    row = {**parse(DIALECT), "norm_weight": True}
    probes = Probes(activations(TOKENS, 4, 16, 0), row, row)
    true = 0.0
    for name, weights in sites.items():
        if name != "head":
            site = SiteKey("layers", int(name.split(".")[1]), name.split(".")[2])
            projected = probes.project(site, weights, narrow[name], Converted(dict(narrow[name])))
            true = max(true, probes.measure([projected], ANOTHER_FUNCTION)[0].measured["out"])
    said = float(line.split("out by ")[1].split(",")[0])
    assert true / 4 < said < true * 4, (true, said)


def test_a_projection_on_the_bfloat16_grid_is_seen_in_a_float32_file(tmp_path):
    sites = model()
    weights = sites["layers.1.ffn"]
    weights["res_alpha"] = weights["res_alpha"].astype(ml_dtypes.bfloat16).astype(np.float32)
    (line,) = odd(tmp_path, sites)
    assert line.startswith("layers.1.ffn, res_alpha holds only bfloat16 numbers in a float32 tensor")


def test_one_value_off_the_grid_is_no_sign(tmp_path):
    sites = model()
    value = sites["layers.1.ffn"]["res_alpha"].astype(ml_dtypes.bfloat16).astype(np.float32)
    value[3, 2] = np.nextafter(value[3, 2], np.float32(9))
    sites["layers.1.ffn"]["res_alpha"] = value
    assert odd(tmp_path, sites) == []


@pytest.mark.parametrize("move, words", [(-1.0, "is centred at 0"), (1.0, "is centred at 2: was 1 added to it twice?")])
def test_a_norm_weight_that_lost_or_doubled_its_one_is_seen(tmp_path, move, words):
    sites = model()
    shape = sites["layers.0.attention"]["mhc_norm.scale"].shape
    for weights in sites.values():
        if "mhc_norm.scale" in weights:
            weights["mhc_norm.scale"] = np.full(shape, 1.001, np.float32)
    sites["layers.0.attention"]["mhc_norm.scale"] = np.full(shape, 1.001 + move, np.float32)
    (line,) = odd(tmp_path, sites)
    assert line.startswith("layers.0.attention, mhc_norm.scale is centred at") and words[:14] in line
    assert ("1 + it" in line) if move < 0 else line.endswith(words[-27:])


def test_a_scale_of_0_and_a_head_and_a_site_that_are_missing_are_said(tmp_path):
    sites = model()
    sites["layers.1.attention"]["post_alpha_scale"][:] = 0
    del sites["head"], sites["layers.0.ffn"]
    lines = odd(tmp_path, sites)
    assert "layers 0 have no ffn site" in lines
    assert "the head is missing, and the dialect reduces the streams by one" in lines
    assert "layers.1.attention, post_alpha_scale is 0: the projection has no effect" in lines


def test_layers_that_differ_in_n_are_said_and_the_rest_is_still_inspected(tmp_path):
    sites = random_sites(1, 4, 16, layers=2)
    other = random_sites(2, 2, 32, layers=2)
    sites["layers.1.ffn"] = other["layers.1.ffn"]
    source = write_canonical(tmp_path / "source.safetensors", sites, "deepseek-v4,reduce=none")
    (line,) = inspect(source).odd
    assert "n = 2, C = 32" in line and "n = 4, C = 16" in line and line.endswith("all sites must have the same sizes")
    assert call("port", source, tmp_path / "x", "--to", "deepseek").exit_code == 2


def test_json_has_all_of_it(tmp_path):
    sites = model(dtype="bfloat16")
    sites["layers.0.ffn"]["pre_alpha_scale"][:] = 0
    source = write_canonical(tmp_path / "source.safetensors", sites, DIALECT)
    inspection = json.loads(call("inspect", source, "--json").stdout)
    assert inspection["odd"] == inspect(source).odd and len(inspection["odd"]) == 2
    assert inspection["assumed"] is False and inspection["problem"] == ""
