"""`jax_impl` for the suite: eager, and under `jax.jit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

import jax_impl
import jax_impl.config
from conformance.adapters import branch
from conformance.adapters.jax_gradients import StageCalls
from conformance.cases import DTYPES
from conformance.interface import Arrays, Capabilities, Result
from conformance.stages import STAGES


def configuration(config: dict[str, Any]) -> jax_impl.MHCConfig:
    known = jax_impl.MHCConfig(streams=1, dim=1).parameters()
    return jax_impl.MHCConfig.from_parameters({k: v for k, v in config.items() if k in known})


def _set(name: str) -> Any:
    """What jax.config has; its attributes are made at run time."""
    return getattr(jax.config, name)


class JaxImplementation:
    """Every stage of `jax_impl`; with ``jit``, outputs and gradients come from one compiled function."""

    def __init__(self, name: str, jit: bool):
        self.name = name
        self.jit = jit
        self._calls = StageCalls(jit)
        self.capabilities = Capabilities(
            stages=frozenset(STAGES),
            dialects=frozenset(jax_impl.config.dialects()),
            dtypes=frozenset(DTYPES),
            overrides=None,
            device=jax.default_backend(),
            description=f"jax_impl, jax {jax.__version__}, {'jit' if jit else 'eager'}",
            settings={
                "x64": f"{_set('jax_enable_x64')}, True for float64 items",
                "matmul_precision": str(_set("jax_default_matmul_precision")),
            },
        )

    def _stage(
        self, name: str, function: Callable[..., Any], inputs: Arrays, config: dict[str, Any], cotangents: Any
    ) -> Result:
        def body(values: Any) -> dict[str, jax.Array]:
            return function(values, configuration({**config, "reduce": "sum"} if name == "stack" else config), config)

        return self._calls(name, config, body, inputs, cotangents)

    def expand(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._stage("expand", _expand, inputs, config, cotangents)

    def reduce(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._stage("reduce", _reduce, inputs, config, cotangents)

    def head(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._stage("head", _head, inputs, config, cotangents)

    def residual_matrix(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._stage("residual_matrix", _residual_matrix, inputs, config, cotangents)

    def coefficients(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._stage("coefficients", _coefficients, inputs, config, cotangents)

    def pre(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._stage("pre", _pre, inputs, config, cotangents)

    def post(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._stage("post", _post, inputs, config, cotangents)

    def layer(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._stage("layer", _layer, inputs, config, cotangents)

    def stack(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._stage("stack", _scanned_stack if self.jit else _stack, inputs, config, cotangents)


def _weights(values: dict[str, jax.Array], c: jax_impl.MHCConfig) -> dict[str, jax.Array]:
    return branch.in_memory(branch.split(values)[1], c.streams, c.dim)


def _expand(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    return {"out": jax_impl.expand(values["embedding"], c.streams)}


def _reduce(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    return {"out": jax_impl.reduce(values["x"], options["how"])}


def _head(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    return {"out": jax_impl.head(values["x"], _weights(values, c), c)}


def _residual_matrix(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    return {"H": jax_impl.residual_matrix(values["logits"], c)}


def _coefficients(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    pre, post, H = jax_impl.coefficients(values["x"], _weights(values, c), c)
    return {"pre": pre, "post": post, "H": H}


def _pre(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    return {"u": jax_impl.pre(values["x"], _weights(values, c), c)[0]}


def _post(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    return {"out": jax_impl.post_mix(values["y"], values["x"], values["post"], values["H"], c)}


def _layer(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    module = nnx.eval_shape(lambda: jax_impl.ManifoldConstrainedHyperConnections(c, rngs=nnx.Rngs(0)))
    for name, value in _weights(values, c).items():
        setattr(module, name.replace(".", "_"), nnx.Param(value))
    kind = jax_impl.HyperConnectionType(options["branch"])
    out, metadata = module(branch.norm_fn(values), branch.branch_fn(options["branch"], values), values["x"], kind)
    return {"out": out, **metadata}


def _one_layer(values: Any, c: jax_impl.MHCConfig) -> Callable[[jax.Array, dict[str, jax.Array]], jax.Array]:
    given = {k: values[k] for k in ("norm_scale", "branch_scale")}
    return lambda x, weights: _layer({**given, "x": x, **weights}, c, {"branch": "mlp_dense"})["out"]


def _reduced(x: jax.Array, how: str) -> dict[str, jax.Array]:
    return {"out": x if how == "none" else jax_impl.reduce(x, how)}


def _stack(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    weights, layer = branch.split(values)[1], _one_layer(values, c)
    x = jax_impl.expand(values["embedding"], c.streams)
    for index in range(options["layers"]):
        x = layer(x, {k: v[index] for k, v in weights.items()})
    return _reduced(x, options["reduce"])


def _scanned_stack(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    weights, layer = branch.split(values)[1], _one_layer(values, c)
    x = jax_impl.expand(values["embedding"], c.streams)
    x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)
    return _reduced(x, options["reduce"])


SHARDABLE = {"pre": _pre, "head": _head, "layer": _layer, "stack": _scanned_stack}
"""The stages that x can be sharded in (`jax_mesh`)."""


def eager() -> JaxImplementation:
    return JaxImplementation("jax", False)


def jitted() -> JaxImplementation:
    return JaxImplementation("jax-jit", True)
