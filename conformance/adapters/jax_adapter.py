"""`jax_impl` for the suite: eager, under `jax.jit`, and by its Pallas kernels, which off a TPU are interpreted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

import jax_impl
import jax_impl.config
from conformance.adapters import branch, jax_gradients
from conformance.adapters.jax_gradients import StageCalls
from conformance.cases.case import DTYPES
from conformance.cases.trajectories.model import STEP
from conformance.interface import Arrays, Capabilities, Result
from conformance.stages import STAGES
from jax_impl import kernels, sharding


def configuration(config: dict[str, Any]) -> jax_impl.MHCConfig:
    """The parameters of what a stage is told; a stack's own ``reduce`` isn't the dialect's."""
    known = jax_impl.MHCConfig(streams=1, dim=1).parameters()
    parameters = {k: v for k, v in config.items() if k in known}
    reduce = "carried" if parameters["pre_from"] == "previous" else "sum"
    return jax_impl.MHCConfig.from_parameters({**parameters, "reduce": reduce})


def _set(name: str) -> Any:
    """What jax.config has; its attributes are made at run time."""
    return getattr(jax.config, name)


class JaxImplementation:
    """Every stage of `jax_impl`; with ``jit``, outputs and gradients come from one compiled function."""

    backend = "auto"

    def __init__(self, name: str, jit: bool):
        self.name = name
        self.jit = jit
        self._calls = StageCalls(jit)
        self.capabilities = Capabilities(
            stages=frozenset(STAGES if jit else (*STAGES, STEP)),
            dialects=frozenset(jax_impl.config.dialects()),
            dtypes=frozenset(DTYPES),
            overrides=None,
            device=jax.default_backend(),
            description=f"jax_impl, jax {jax.__version__}, {'jit' if jit else 'eager'}",
            settings={
                "x64": f"{_set('jax_enable_x64')}, True for float64 items",
                "matmul_precision": str(_set("jax_default_matmul_precision")),
            },
            copies=True,
            compiled=jit,
        )

    def _stage(
        self, name: str, function: Callable[..., Any], inputs: Arrays, config: dict[str, Any], cotangents: Any
    ) -> Result:
        def body(values: Any) -> dict[str, jax.Array]:
            return function(values, configuration(config), {**config, "backend": self.backend})

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

    def step(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        """One compiled function, also where the other stages run eagerly: a gradient of all of it takes seconds."""
        from conformance.adapters import jax_training  # here, since it needs optax

        return jax_training.step(inputs, config, cotangents)


def _weights(values: dict[str, jax.Array], c: jax_impl.MHCConfig) -> dict[str, jax.Array]:
    return branch.in_memory(branch.split(values)[1], c.streams, c.dim)


def _kwargs(options: Any) -> dict[str, Any]:
    """How a stage is computed: on the mesh in use, by a backend that the suite doesn't know of."""
    return {"shards": sharding.current(), "backend": options.get("backend", "auto")}


def _expand(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    return {"out": jax_impl.expand(values["embedding"], c.streams)}


def _reduce(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    return _reduced(values["x"], values.get("carried"), c, options["how"])


def _head(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    return {"out": jax_impl.head(values["x"], _weights(values, c), c, **_kwargs(options))}


def _residual_matrix(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    return {"H": jax_impl.residual_matrix(values["logits"], c)}


def _coefficients(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    pre, post, H = jax_impl.coefficients(values["x"], _weights(values, c), c, **_kwargs(options))
    return {"pre": pre, "post": post, "H": H}


def _pre(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    weights = _weights(values, c)
    u, _, handed = jax_impl.pre(values["x"], weights, c, values.get("carried"), **_kwargs(options))
    return {"u": u} if handed is None else {"u": u, "pre": handed}


def _post(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    return {"out": jax_impl.post_mix(values["y"], values["x"], values["post"], values["H"], c, **_kwargs(options))}


def _layer(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    backend = _kwargs(options)["backend"]
    module = nnx.eval_shape(lambda: jax_impl.ManifoldConstrainedHyperConnections(c, rngs=nnx.Rngs(0), backend=backend))
    for name, value in _weights(values, c).items():
        setattr(module, name.replace(".", "_"), nnx.Param(value))
    kind = jax_impl.HyperConnectionType(options["branch"])
    call = (branch.norm_fn(values), branch.branch_fn(options["branch"], values), values["x"], kind)
    out, metadata = module(*call, carried=values.get("carried"))
    return {"out": out, **{"pre" if k == "carried" else k: v for k, v in metadata.items()}}


State = tuple[jax.Array, jax.Array | None]
"""The streams, and what the next site of a single-pass stack reads with."""


def _one_layer(values: Any, c: jax_impl.MHCConfig, options: Any) -> Callable[[State, dict[str, jax.Array]], State]:
    constants = {k: values[k] for k in ("norm_scale", "branch_scale")}

    def run(state: State, weights: dict[str, jax.Array]) -> State:
        x, carried = state
        handed = {} if carried is None else {"carried": carried}
        values_out = _layer({**constants, "x": x, **handed, **weights}, c, {**options, "branch": "mlp_dense"})
        return values_out["out"], values_out.get("pre")

    return run


def _begin(values: Any, c: jax_impl.MHCConfig) -> State:
    x = jax_impl.expand(values["embedding"], c.streams)
    return x, jax_impl.one_hot(x, shards=sharding.current()) if c.pre_from == "previous" else None


def _reduced(x: jax.Array, carried: jax.Array | None, c: jax_impl.MHCConfig, how: str) -> dict[str, jax.Array]:
    options = {"reduction": c.reduction, "shards": sharding.current()}
    return {"out": x if how == "none" else jax_impl.reduce(x, how, carried, **options)}


def _stack(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    weights, layer, state = branch.split(values)[1], _one_layer(values, c, options), _begin(values, c)
    for index in range(options["layers"]):
        state = layer(state, {k: v[index] for k, v in weights.items()})
    return _reduced(*state, c, options["reduce"])


def _scanned_stack(values: Any, c: jax_impl.MHCConfig, options: Any) -> dict[str, jax.Array]:
    weights, layer = branch.split(values)[1], _one_layer(values, c, options)
    state, _ = jax.lax.scan(lambda state, w: (layer(state, w), None), _begin(values, c), weights)
    return _reduced(*state, c, options["reduce"])


SHARDABLE = {"pre": _pre, "head": _head, "layer": _layer, "stack": _scanned_stack}
"""The stages that x can be sharded in (`jax_mesh`)."""


class PallasImplementation(JaxImplementation):
    """The stages that have kernels, in one compiled function each, and no others."""

    backend = "pallas"

    def __init__(self):
        super().__init__("jax-pallas", True)
        self.capabilities = dataclasses.replace(
            self.capabilities,
            stages=frozenset({"coefficients", "head", "layer", "post", "pre", "stack"}),
            dtypes=frozenset(kernels.DTYPES),
            streams=frozenset(range(1, kernels.MOST_STREAMS + 1)),
            description=f"jax_impl.kernels, jax {jax.__version__}, jit"
            + ("" if jax.default_backend() == "tpu" else ", interpreted"),
        )

    def _stage(
        self, name: str, function: Callable[..., Any], inputs: Arrays, config: dict[str, Any], cotangents: Any
    ) -> Result:
        x: Any = inputs["x" if "x" in inputs else "embedding"]
        reason = kernels.hindrance(configuration(config), None, x=x)
        if reason:
            raise NotImplementedError(f"the kernels don't go with {reason}")
        return super()._stage(name, function, inputs, config, cotangents)


def _prepare() -> None:
    """What makes a run of many small programs quick, for either: they run in one process, in any order."""
    jax_gradients.compile_all_cheaply()  # first: XLA reads its options once, and JAX knows a kept program by them
    jax_gradients.keep_programs()
    jax_gradients.leave_caches()


def eager() -> JaxImplementation:
    _prepare()
    return JaxImplementation("jax", False)


def jitted() -> JaxImplementation:
    jax.clear_caches()  # an eager implementation that this process has run leaves gigabytes of small programs
    _prepare()
    return JaxImplementation("jax-jit", True)
