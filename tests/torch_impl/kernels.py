"""A site by the kernels and by plain operators, on the same values."""

from __future__ import annotations

from typing import Any

import torch

import torch_impl
from torch_impl import MHCConfig, functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASE: dict[str, Any] = {"streams": 4, "dim": 24, "norm_eps": 1e-6}


Given = tuple[MHCConfig, dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]
ROUNDING = {"coefficients": "activation", "mixing": "activation"}
"""What rounds coefficients to the dtype of x."""


def site(changes: dict[str, Any], lead: tuple[int, ...] = (2, 9), dtype: torch.dtype = torch.float32) -> Given:
    """A configuration, its weights, x, and the gates that are carried where it takes them."""
    config = MHCConfig(**{**BASE, **changes})
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    n, dim = config.streams, config.dim
    weights = {
        name: (draw(*shape) * (3 * (n * dim) ** -0.5 if len(shape) == 3 else 1.0)).requires_grad_()
        for name, shape in functional.weight_shapes(config).items()
    }
    x = draw(*lead, n, dim).to(dtype).requires_grad_()
    carried = draw(*lead, n).sigmoid().requires_grad_() if config.pre_from == "previous" else None
    return config, weights, x, carried


def run(config: MHCConfig, weights: Any, x: Any, carried: Any, backend: str) -> dict[str, torch.Tensor]:
    """All outputs of a site."""
    u, context, handed = torch_impl.pre(x, weights, config, carried, backend=backend)
    out = torch_impl.post((2 * u).sin(), context)
    results = {"u": u, "post": context.post, "H": context.H, "out": out}
    return results if handed is None else {**results, "handed": handed}


def values_and_gradients(config: MHCConfig, weights: Any, x: Any, carried: Any, backend: str) -> dict[str, Any]:
    results = run(config, weights, x, carried, backend)
    inputs = {"x": x, **({} if carried is None else {"carried": carried}), **weights}
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(value.shape, generator=generator).to(DEVICE) for value in results.values()]
    loss = sum((one.float() * other).sum() for one, other in zip(results.values(), cotangents, strict=True))
    assert isinstance(loss, torch.Tensor)
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    results = {name: value.detach() for name, value in results.items()}
    return results | {f"d{name}": value for name, value in zip(inputs, gradients, strict=True)}


def assert_close(actual: dict[str, Any], expected: dict[str, Any], relative: float) -> None:
    """To a share of the largest number of each tensor; scales' gradients are sums that nearly cancel."""
    for name, value in expected.items():
        largest, error = ((v.abs().max().item() if v.numel() else 0.0) for v in (value, actual[name] - value))
        bound = relative * max(1.0, largest) * (20 if name.endswith("scale") else 1)
        assert error <= bound, f"{name} is off by {error}, bound {bound}"
        assert actual[name].dtype == value.dtype and actual[name].shape == value.shape, name


def gates(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """post and H for x ``[2, 9, n, 24]``."""
    return torch.ones(2, 9, n, device=DEVICE), torch.ones(2, 9, n, n, device=DEVICE)
