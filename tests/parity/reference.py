"""The layer of examples/naive.py, in float64 NumPy, on the weights of a module."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]


def _module() -> Any:
    spec = importlib.util.spec_from_file_location("naive", Path(__file__).parents[2] / "examples" / "naive.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


naive = _module()


def flat(weights: Weights, config: Any) -> Weights:
    """Weights as files have them, which is how the page takes them: streams and dim as one axis."""
    rows = (config.streams, config.dim)
    return {
        k: v.reshape(-1, *v.shape[2:]) if v.shape[:2] == rows and "beta" not in k else v for k, v in weights.items()
    }


def residual_matrix(logits: np.ndarray, config: Any) -> np.ndarray:
    return naive.residual_matrix(logits, config.parameters())


def site(
    x: np.ndarray, weights: Weights, config: Any, branch: Callable[[Any], Any], carried: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The streams after one site, and its own pre, which a single-pass site hands on."""
    u, context = naive.pre(x, flat(weights, config), config.parameters(), carried)
    return naive.post(branch(u), x, context, config.parameters()), context[0]


def head(x: np.ndarray, weights: Weights, config: Any) -> np.ndarray:
    return naive.head(x, flat(weights, config), config.parameters())


def one_hot(x: np.ndarray) -> np.ndarray:
    """The gates that the first site of a single-pass stack reads with."""
    return np.broadcast_to(np.eye(x.shape[-2])[0], x.shape[:-1])


def chain(x: np.ndarray, sites: Sequence[Weights], config: Any, branches: Sequence[Callable[[Any], Any]]) -> np.ndarray:
    """A single-pass stack, reduced with the last pre."""
    carried = one_hot(x)
    for index, weights in enumerate(sites):
        x, carried = site(x, weights, config, branches[index % len(branches)], carried)
    return naive.reduce(x, "carried", carried)
