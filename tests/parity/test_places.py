"""Where both implementations write and read: links are followed, and what isn't a file is neither replaced nor read."""

from __future__ import annotations

import importlib
import os
import stat
from typing import Any

import pytest

PACKAGES = {"jax_impl": "flax", "torch_impl": "torch"}
"""Each package, and a module that it needs."""


@pytest.fixture(params=PACKAGES)
def weights(request) -> Any:
    needed = PACKAGES[request.param]
    pytest.importorskip(needed, reason=f"{needed} isn't installed")
    return importlib.import_module(f"{request.param}.weights")


def written(weights: Any, path: Any) -> None:
    config = importlib.import_module(f"{weights.__package__}.config").MHCConfig.from_dialect("paper", streams=2, dim=4)
    weights.write(path, {}, config)


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path, weights):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    written(weights, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes()[8:9] == b"{"


def test_a_pipe_is_neither_replaced_nor_waited_for(tmp_path, weights):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe"):
        written(weights, tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with pytest.raises(ValueError, match="pipe: expected a whole safetensors file"), weights.opened(tmp_path / "pipe"):
        pass
