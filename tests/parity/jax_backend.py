"""JAX for the tests that both implementations must pass; `torch_backend` has the same names in the same order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_impl as package
from jax_impl import functional, metadata, weights

NO_VALUES = r"must have parameters with values, got shapes alone, .* make the mod"
NO_VALUE = "must have values, got a ShapeDtypeStruct"
NO_PREFIX = "a prefix must be a string, or a tuple of them for stacked layers, got 0"
HOLDS = "got Dict: it holds a, b, each of which takes a prefix"
CASTS = "outside of what casts a layer's inputs or outputs to a narrow dtype"


def float64() -> Any:
    """A context in which arrays may be float64."""
    return jax.enable_x64(True)


def array(value: Any, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.asarray(value), dtype)


def numpy(value: jax.Array) -> np.ndarray:
    """The values in float64, which holds all of them."""
    return np.asarray(value, np.float64)


def dtype(value: jax.Array) -> str:
    return value.dtype.name


def layer(config: Any, dtype: str = "float32") -> Any:
    """A layer with its initial values, always the same."""
    return package.ManifoldConstrainedHyperConnections(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype))


def head(config: Any, dtype: str = "float32") -> Any:
    return package.HyperHead(config, rngs=nnx.Rngs(0), param_dtype=jnp.dtype(dtype))


def without_values(config: Any) -> Any:
    """A layer whose parameters have shapes alone."""
    return nnx.eval_shape(lambda: layer(config))


def shapes_alone(module: Any) -> dict[str, Any]:
    """The parameters of `without_values`."""
    return {name: parameter.get_value() for name, parameter in module.parameters().items()}


def fill(module: Any, values: dict[str, np.ndarray]) -> Any:
    """The module, with these values in its parameters."""
    module.assign({name: jnp.asarray(value) for name, value in values.items()})
    return module


def foreign() -> Any:
    """A module that is neither a layer nor a head."""
    return nnx.Linear(2, 2, rngs=nnx.Rngs(0))


def container(layer: Any, head: Any) -> Any:
    """A module that holds two sites."""
    return nnx.Dict(a=layer, b=head)


def gradients(function: Callable[..., Any], *arguments: jax.Array) -> list[np.ndarray]:
    """The gradient of a number with respect to each argument."""
    return [np.asarray(g) for g in jax.grad(function, argnums=tuple(range(len(arguments))))(*arguments)]


def parameter_gradients(function: Callable[..., Any], modules: Sequence[Any]) -> list[dict[str, np.ndarray]]:
    """The gradient of a number with respect to every parameter of every module, by canonical name."""
    slopes = nnx.jit(nnx.grad(lambda modules: function(list(modules))))(nnx.List(modules))
    return [
        {name: np.asarray(slopes[i][name.replace(".", "_")].get_value()) for name in module.weights()}
        for i, module in enumerate(modules)
    ]


__all__ = ["functional", "metadata", "package", "weights"]
