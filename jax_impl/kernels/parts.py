"""A computation of arrays by name, on each device's part of them or on the whole.

What lies where is a matter of the name alone (`LAYOUTS`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

from jax import Array

from jax_impl.projections import Shards

Add = Callable[[Array], Array] | None
"""Sums a value over the parts of dim; None where dim is whole."""
Arrays = Mapping[str, Array]
Part = Callable[[Arrays, Add], dict[str, Array]]
LAYOUTS = {
    **dict.fromkeys(("x", "g", "dx", "out"), "streams"),
    **dict.fromkeys(("y", "u", "dy", "du"), "stream"),
    **dict.fromkeys(("carried", "pre", "post", "dcarried", "dpre", "dpost"), "gates"),
    **dict.fromkeys(("H", "dH"), "matrix"),
    "sums": "sums",
    **dict.fromkeys(("phi", "dphi", "norm", "dnorm"), "projection"),
    **dict.fromkeys(("scale", "shift", "dscale", "dshift"), "whole"),
}
"""By name, a layout of `Shards.by_layout`."""


def on_parts(
    shards: Shards | None, function: Part, arrays: Mapping[str, Array | None], results: Collection[str]
) -> dict[str, Array]:
    """Calls ``function`` with the arrays that aren't None, on each device's part of them.

    Args:
        function: takes arrays by name, and what sums a value over the parts of dim; returns ``results`` by name, those
            that are whole or a projection from its own tokens.
    """
    held = {name: value for name, value in arrays.items() if value is not None}
    if shards is None:
        return function(held, None)
    return shards.by_layout(function, held, {name: LAYOUTS[name] for name in (*held, *results)}, results)


def by_token(value: Array, axes: int) -> Array:
    """One axis of tokens before the last ``axes``."""
    lead, tail = value.shape[: value.ndim - axes], value.shape[value.ndim - axes :]
    return value.reshape(math.prod(lead), *tail)
