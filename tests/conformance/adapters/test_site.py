"""What adapters share: weights joined, and a package's own settings left alone where the case doesn't override them."""

from __future__ import annotations

import numpy as np
import pytest

from conformance.adapters.branch import joined
from conformance.adapters.site import settings_of
from conformance.cases.dialects import dialect_rows
from conformance.stages import layer_shapes

NAMES = {"norm_eps": "rms_norm_eps", "eps": "hc_eps", "pre_eps": "hc_eps"}
CONFIG = {**dialect_rows()["deepseek-v4"], "dialect": "deepseek-v4"}


def test_weights_are_joined_as_in_the_released_files():
    shapes = layer_shapes(4, 6, "sinkhorn", norm=False)
    weights = {k: np.arange(np.prod(s), dtype=np.float32).reshape(s) for k, s in shapes.items()}
    ours = joined(weights, np.concatenate)
    assert {k: v.shape for k, v in ours.items()} == {"fn": (24, 24), "base": (24,), "scale": (3,)}
    assert np.array_equal(ours["fn"][8:], weights["res_alpha"].T)
    assert np.array_equal(ours["base"][4:8], weights["post_beta"])
    assert joined(weights, np.concatenate, ("pre", "post"))["scale"].shape == (2,)


def test_nothing_is_set_where_the_case_overrides_nothing():
    assert settings_of(CONFIG, NAMES) == {}


def test_what_the_case_overrides_is_set():
    assert settings_of({**CONFIG, "norm_eps": 0.5}, NAMES) == {"rms_norm_eps": 0.5}
    assert settings_of({**CONFIG, "eps": 0.5, "pre_eps": 0.5}, NAMES) == {"hc_eps": 0.5}


def test_two_values_of_one_setting_are_refused():
    with pytest.raises(NotImplementedError, match="hc_eps is one value for eps and pre_eps"):
        settings_of({**CONFIG, "eps": 0.5}, NAMES)


def test_a_dialect_without_a_row_sets_everything():
    told = {**CONFIG, "dialect": "mine"}
    assert settings_of(told, NAMES) == {"rms_norm_eps": CONFIG["norm_eps"], "hc_eps": CONFIG["eps"]}
