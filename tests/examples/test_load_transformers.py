"""A ported site of a transformers model computes in both packages what the model computed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.examples.scripts import script

pytest.importorskip("transformers", reason="needs the package transformers")
pytest.importorskip("torch", reason="needs the package torch")


def test_a_ported_site_returns_what_the_model_returned(tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch):
    example = script("load_transformers", "examples/porting")
    assert example.main(tmp_path) == 0
    said = capfd.readouterr().out
    assert "verdict  exact" in said and "torch_impl  layers.1.attention. differs" in said
    assert "jax_impl    layers.1.attention. differs" in said or not importlib.util.find_spec("flax")
    monkeypatch.setattr(example, "SITE", "layers.1.ffn.")  # the mistake: another site of the same model
    seen = example.watched(tmp_path / "model")
    u, out = example.in_torch(tmp_path / "sites.safetensors", seen["x"], seen["y"])
    assert min(np.abs(u - seen["u"]).max(), np.abs(out - seen["out"]).max()) > 0.1
