"""The kernels as an engine of `torch_impl.fused`, by operators of PyTorch that compilers and graphs can hold.

An operator takes the configuration as text, since its arguments are tensors and numbers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from torch_impl.config import MHCConfig
from torch_impl.fused.site import Reading, made_of_head
from torch_impl.kernels import launching
from torch_impl.projections import coefficient_dtype, of_weights, side_by_side, times_norm


@functools.cache
def _written(config: MHCConfig) -> str:
    return json.dumps(config.parameters())


@torch.compiler.assume_constant_result
def _text(config: MHCConfig, head: bool = False) -> str:
    return _written(made_of_head(config) if head else config)


@functools.cache
def _config(text: str) -> MHCConfig:
    return MHCConfig.from_parameters(json.loads(text))


def _flat(value: Tensor, axes: int) -> Tensor:
    """All but the last axes as one, packed."""
    return value.reshape(-1, *value.shape[value.ndim - axes :]).contiguous()


def _wide(value: Tensor, axes: int) -> Tensor:
    return _flat(value, axes).to(torch.float32)


# From x to u and the coefficients.


@custom_op(
    "mhc::read",
    mutates_args=(),
    schema="(Tensor x, Tensor? carried, Tensor matrix, Tensor? norm, Tensor scale, Tensor shift, str config, bool u, "
    "bool head) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _read(
    x: Tensor, carried: Tensor | None, matrix: Tensor, norm: Tensor | None, scale: Tensor, shift: Tensor, config: str,
    u: bool, head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x ``[T, n, C]``, carried ``[T, n]``, matrix ``[n * C, m]``, norm ``[n * C]``, scale and shift ``[m]``."""
    results = _empty_of_read(x, matrix.shape[1], _config(config), u, head)
    if len(x):
        launching.read(x, carried, matrix, norm, scale, shift, _config(config), head, results)
    return results


@_read.register_fake
def _(x, carried, matrix, norm, scale, shift, config, u, head):  # type: ignore[no-untyped-def]
    return _empty_of_read(x, matrix.shape[1], _config(config), u, head)


def _empty_of_read(
    x: Tensor, m: int, config: MHCConfig, u: bool, head: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, n, dim = x.shape
    new = functools.partial(torch.empty, dtype=coefficient_dtype(x, config), device=x.device)
    read = torch.empty(T if u else 0, dim, dtype=x.dtype, device=x.device)
    post, H = (new(T, 0), new(T, 0)) if head else (new(T, n), new(T, n, n))
    return read, new(T, n), post, H, new(T, m + 1, dtype=torch.float32)


@custom_op(
    "mhc::read_back",
    mutates_args=(),
    schema="(Tensor x, Tensor? carried, Tensor matrix, Tensor scale, Tensor shift, Tensor sums, Tensor? du, "
    "Tensor? dpre, Tensor? dpost, Tensor? dH, Tensor? further, str config, bool head, bool of_x, bool of_matrix)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _read_back(
    x: Tensor, carried: Tensor | None, matrix: Tensor, scale: Tensor, shift: Tensor, sums: Tensor,
    du: Tensor | None, dpre: Tensor | None, dpost: Tensor | None, dH: Tensor | None, further: Tensor | None,
    config: str, head: bool, of_x: bool, of_matrix: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The cotangents of x, carried, matrix ``[m, n * C]``, scale and shift; empty where not wanted."""
    results = _empty_of_back(x, carried, matrix, of_x, of_matrix)
    if du is None:
        results[1].zero_()
    if not len(x):
        for value in results:
            value.zero_()
    else:
        cotangents = (du, dpre, dpost, dH, further)
        launching.read_back(x, carried, matrix, scale, shift, sums, cotangents, _config(config), head, results)
    return results


@_read_back.register_fake
def _(x, carried, matrix, scale, shift, sums, du, dpre, dpost, dH, further, config, head, of_x, of_matrix):  # type: ignore[no-untyped-def]
    return _empty_of_back(x, carried, matrix, of_x, of_matrix)


def _empty_of_back(
    x: Tensor, carried: Tensor | None, matrix: Tensor, of_x: bool, of_matrix: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    m = matrix.shape[1]
    new = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if of_x else x.new_empty(0)
    dcarried = new(0) if carried is None else new(carried.shape)
    return dx, dcarried, new(m, matrix.shape[0]) if of_matrix else new(0), new(m), new(m)


def read(
    x: Tensor, carried: Tensor | None, reading: Reading, scale: Tensor, shift: Tensor,
    norm: Tensor | None, phis: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """u, pre, post, H and the sums of all tokens, flattened."""
    given = None if carried is None else _wide(carried, 1)
    phi, norm = side_by_side(x, phis, norm, reading.config)
    apart = norm if reading.rounds(x) else None
    matrix = times_norm(phi, None if reading.rounds(x) else norm)
    apart = None if apart is None else apart.flatten().contiguous()
    text = _text(reading.layer, reading.head)
    return _read(_flat(x, 2), given, matrix, apart, scale, shift, text, reading.u, reading.head)


def read_back(
    x: Tensor, carried: Tensor | None, reading: Reading, weights: Sequence[Tensor | None], sums: Tensor,
    cotangents: Sequence[Tensor | None], wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The cotangents of all inputs."""
    scale, shift, *held = weights
    assert scale is not None and shift is not None
    phi, norm = side_by_side(x, [value for value in held[1:] if value is not None], held[0], reading.config)
    matrix = times_norm(phi, norm)
    axes = (1, 1, 1, 2, 2)  # of u, pre, post, H and x
    packed = [None if value is None else _flat(value, count) for value, count in zip(cotangents[:5], axes, strict=True)]
    given = None if carried is None else _wide(carried, 1)
    of_matrix = any(wanted[5:])
    dx, dcarried, dmatrix, dscale, dshift = _read_back(
        _flat(x, 2), given, matrix, scale, shift, _flat(sums, 1), *packed, _text(reading.layer, reading.head),
        reading.head, wanted[0], of_matrix,
    )  # fmt: skip
    return (
        dx.view(x.shape) if wanted[0] else None,
        None if carried is None else dcarried.to(carried.dtype).view(carried.shape),
        None,
        dscale,
        dshift,
        *of_weights(dmatrix if of_matrix else None, phi, norm, held, wanted[5:]),
    )


# From y and x to the streams.


@custom_op(
    "mhc::mix",
    mutates_args=(),
    schema="(Tensor y, Tensor x, Tensor post, Tensor? H, str mix, bool rounded) -> Tensor",
)
def _mix(y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mix: str, rounded: bool) -> Tensor:
    """y ``[T, C]``, x ``[T, n, C]``, post ``[T, n]``, H ``[T, n, n]``."""
    out = torch.empty_like(x)
    if len(x):
        launching.mix(y, x, post, H, mix, rounded, out)
    return out


@_mix.register_fake
def _(y, x, post, H, mix, rounded):  # type: ignore[no-untyped-def]
    return torch.empty_like(x)


@custom_op(
    "mhc::mix_back",
    mutates_args=(),
    schema="(Tensor y, Tensor x, Tensor post, Tensor? H, str mix, Tensor cotangent)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _mix_back(
    y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mix: str, cotangent: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cotangents of y, x, post and H; of H empty for the identity."""
    results = _empty_of_mix(y, x, post, H)
    if len(x):
        launching.mix_back(y, x, post, H, mix, cotangent, results)
    return results


@_mix_back.register_fake
def _(y, x, post, H, mix, cotangent):  # type: ignore[no-untyped-def]
    return _empty_of_mix(y, x, post, H)


def _empty_of_mix(y: Tensor, x: Tensor, post: Tensor, H: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    return torch.empty_like(y), torch.empty_like(x), new(post.shape), new(0) if H is None else new(H.shape)


def mix(y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mix: str, rounded: bool) -> Tensor:
    """The streams ``[..., n, dim]``."""
    matrix = None if H is None else _wide(H, 2)
    return _mix(_flat(y, 1), _flat(x, 2), _wide(post, 1), matrix, mix, rounded).view(x.shape)


def mix_back(
    y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mix: str, cotangent: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The cotangents of y, x, post and H."""
    matrix = None if H is None else _wide(H, 2)
    dy, dx, dpost, dH = _mix_back(_flat(y, 1), _flat(x, 2), _wide(post, 1), matrix, mix, _flat(cotangent, 2))
    of_H = None if H is None else dH.to(H.dtype).view(H.shape)
    return dy.view(y.shape), dx.view(x.shape), dpost.to(post.dtype).view(post.shape), of_H


@custom_op(
    "mhc::mix_read",
    mutates_args=(),
    schema="(Tensor y, Tensor x, Tensor post, Tensor? H, str mixer, Tensor? carried, Tensor matrix, Tensor scale, "
    "Tensor shift, str config) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _mix_read(
    y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mixer: str, carried: Tensor | None, matrix: Tensor,
    scale: Tensor, shift: Tensor, config: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The streams ``[T, n, C]`` that a site writes, and what `_read` returns of them."""
    out, results = torch.empty_like(x), _empty_of_read(x, matrix.shape[1], _config(config), True, False)
    if len(x):
        mixing = (y, x, post, H, _config(mixer))
        launching.mix_read(*mixing, carried, matrix, scale, shift, _config(config), out, results)
    return out, *results


@_mix_read.register_fake
def _(y, x, post, H, mixer, carried, matrix, scale, shift, config):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), *_empty_of_read(x, matrix.shape[1], _config(config), True, False)


def mix_read(
    y: Tensor, x: Tensor, post: Tensor, H: Tensor | None, mixer: MHCConfig, carried: Tensor | None,
    reading: Reading, scale: Tensor, shift: Tensor, norm: Tensor | None, phis: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The streams that a site writes, and u, pre, post, H and the sums of the next."""
    if reading.rounds(x):  # the root of what is written comes before its projections
        out = mix(y, x, post, H, str(mixer.mix), mixer.mixing == "activation")
        return out, *read(out, carried, reading, scale, shift, norm, phis)
    mixing = (_flat(y, 1), _flat(x, 2), _wide(post, 1), None if H is None else _wide(H, 2), _text(mixer))
    given = None if carried is None else _wide(carried, 1)
    matrix = times_norm(*side_by_side(x, phis, norm, reading.config))
    out, *found = _mix_read(*mixing, given, matrix, scale, shift, _text(reading.layer))
    return out.view(x.shape), *found


# From logits to H.


@custom_op("mhc::balance", mutates_args=(), schema="(Tensor logits, str config) -> Tensor")
def _balance(logits: Tensor, config: str) -> Tensor:
    """logits ``[T, n, n]``."""
    H = torch.empty_like(logits)
    if len(logits):
        launching.balance(logits, _config(config), H)
    return H


@_balance.register_fake
def _(logits, config):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits)


@custom_op("mhc::balance_back", mutates_args=(), schema="(Tensor logits, str config, Tensor cotangent) -> Tensor")
def _balance_back(logits: Tensor, config: str, cotangent: Tensor) -> Tensor:
    result = torch.empty_like(logits)
    if len(logits):
        launching.balance_back(logits, _config(config), cotangent, result)
    return result


@_balance_back.register_fake
def _(logits, config, cotangent):  # type: ignore[no-untyped-def]
    return torch.empty_like(logits)


def balance(logits: Tensor, config: MHCConfig) -> Tensor:
    """H ``[..., n, n]`` of logits in any dtype, which it has too."""
    return _balance(_flat(logits, 2), _text(config)).view(logits.shape)


def balance_back(logits: Tensor, config: MHCConfig, cotangent: Tensor) -> Tensor:
    """The cotangent of the logits ``[..., n, n]`` from that of H."""
    return _balance_back(_flat(logits, 2), _text(config), _flat(cotangent, 2)).view(logits.shape)
