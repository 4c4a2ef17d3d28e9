"""What an autograd function hands to its plain twin: gradients of gradients, forward mode, `torch.func.vmap`.

A twin takes what the function takes and returns as many tensors, by operators that PyTorch differentiates itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from torch_impl.residual import without_autocast

Twin = Callable[..., tuple[Tensor, ...]]
Result = TypeVar("Result")


def called(function: type[Function], traced: type[Function], *inputs: Any) -> Any:
    """The function of these inputs; ``traced`` is its base, without forward mode and ``vmap``.

    Under `torch.compile` the base is called, since Dynamo takes no function with forward mode of its own. Where nothing
    is differentiated the forward pass is enough: an autograd function costs a tenth of a site of 64 tokens.
    """
    if torch.compiler.is_compiling():
        return traced.apply(*inputs)
    return function.apply(*inputs) if transformed(inputs) else traced.forward(*inputs)


# Neither has a public name. Without one of them every call goes through the autograd function.
_in_functorch = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def _in_forward_mode() -> bool:
    return getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0


def transformed(inputs: Sequence[Any]) -> bool:
    """Whether a derivative of any kind may be asked for, or a function transformation is under way."""
    if _in_functorch() or _in_forward_mode():
        return True
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs)


def forward(function: Callable[..., Result]) -> Callable[..., Result]:
    """A ``forward`` that knows its signature; its caller turns autocast off.

    `Function.apply` asks for the signature at every call, and working it out takes as long as thirty operators.
    """
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function


def backward(function: Callable[..., Result]) -> Callable[..., Result]:
    """A ``backward`` whose products aren't rounded: it runs under its caller's autocast."""

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Result:
        with without_autocast(next(value.device for value in arguments if isinstance(value, Tensor))):
            return function(*arguments)

    return wrapped


def pulled_back(
    twin: Twin, inputs: Sequence[Any], cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients of the wanted inputs, which can be differentiated again.

    Args:
        cotangents: None for an output that nothing depends on.
    """
    kept = [index for index, cotangent in enumerate(cotangents) if cotangent is not None]
    chosen = [index for index, want in enumerate(wanted) if want]
    pull = torch.func.vjp(_of(twin, inputs, chosen, kept), *(inputs[index] for index in chosen))[1]
    gradients = iter(pull(tuple(cotangents[index] for index in kept)))
    return tuple(next(gradients) if want else None for want in wanted)


def pushed_forward(twin: Twin, inputs: Sequence[Any], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The tangents of all outputs, by the transpose of the transpose: it needs no forward mode inside forward mode."""
    chosen = [index for index, tangent in enumerate(tangents) if tangent is not None]
    outputs, pull = torch.func.vjp(_of(twin, inputs, chosen), *(inputs[index] for index in chosen))[:2]
    zeros = tuple(torch.zeros_like(value) for value in outputs)
    push = torch.func.vjp(lambda *cotangents: pull(cotangents), *zeros)[1]
    return push(tuple(tangents[index] for index in chosen))


def _of(twin: Twin, inputs: Sequence[Any], chosen: Sequence[int], kept: Sequence[int] | None = None) -> Twin:
    """The twin as a function of the chosen inputs, with the outputs that are kept."""

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        whole = list(inputs)
        for index, value in zip(chosen, values, strict=True):
            whole[index] = value
        outputs = twin(*whole)
        return outputs if kept is None else tuple(outputs[index] for index in kept)

    return function


def batched(twin: Twin, in_dims: tuple[int | None, ...], inputs: Sequence[Any], outputs: int) -> tuple[Any, Any]:
    """What the ``vmap`` of an autograd function returns: the outputs, each with the batch first."""
    return torch.func.vmap(twin, in_dims=in_dims)(*inputs), (0,) * outputs
