"""PyTorch for the tests that both implementations must pass; `jax_backend` has the same names in the same order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import torch_impl as package
from torch_impl import functional, metadata, weights

NO_VALUES = r"must have parameters with values, got .* meta: call to_empty\(device"
NO_VALUE = "must have values, got a tensor on the device meta"
NO_PREFIX = "a prefix must be a string, got 0"
HOLDS = "got Sequential: it holds 0, 1, each of which takes a prefix"
CASTS = "MixedPrecisionPolicy has cast_forward_inputs=False and output_dtype=None"


def float64() -> Any:
    """A context in which arrays may be float64."""
    return contextlib.nullcontext()


def array(value: Any, dtype: str = "float32") -> torch.Tensor:
    return torch.tensor(np.asarray(value, np.float64)).to(getattr(torch, dtype))


def numpy(value: torch.Tensor) -> np.ndarray:
    """The values in float64, which holds all of them."""
    return value.detach().double().numpy()


def dtype(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def layer(config: Any, dtype: str = "float32") -> Any:
    """A layer with its initial values, always the same."""
    torch.manual_seed(0)
    return package.ManifoldConstrainedHyperConnections(config, dtype=getattr(torch, dtype))


def head(config: Any, dtype: str = "float32") -> Any:
    torch.manual_seed(0)
    return package.HyperHead(config, dtype=getattr(torch, dtype))


def without_values(config: Any) -> Any:
    """A layer whose parameters have shapes alone."""
    return package.ManifoldConstrainedHyperConnections(config, device="meta")


def shapes_alone(module: Any) -> dict[str, Any]:
    """The parameters of `without_values`."""
    return module.weights()


def fill(module: Any, values: dict[str, np.ndarray]) -> Any:
    """The module, with these values in its parameters."""
    with torch.no_grad():
        for name, value in values.items():
            module.weights()[name].copy_(torch.as_tensor(value))
    return module


def foreign() -> Any:
    """A module that is neither a layer nor a head."""
    return torch.nn.Linear(2, 2)


def container(layer: Any, head: Any) -> Any:
    """A module that holds two sites."""
    return torch.nn.Sequential(layer, head)


def gradients(function: Callable[..., Any], *arguments: torch.Tensor) -> list[np.ndarray]:
    """The gradient of a number with respect to each argument."""
    leaves = [argument.detach().requires_grad_() for argument in arguments]
    slopes = torch.autograd.grad(function(*leaves), leaves)
    return [g.float().numpy() if g.dtype == torch.bfloat16 else g.numpy() for g in slopes]  # NumPy has no bfloat16


def parameter_gradients(function: Callable[..., Any], modules: Sequence[Any]) -> list[dict[str, np.ndarray]]:
    """The gradient of a number with respect to every parameter of every module, by canonical name."""
    for module in modules:
        module.zero_grad()
    function(list(modules)).backward()
    return [
        {
            name: (torch.zeros_like(value) if value.grad is None else value.grad).numpy()
            for name, value in module.weights().items()
        }
        for module in modules
    ]


__all__ = ["functional", "metadata", "package", "weights"]
