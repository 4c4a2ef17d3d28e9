"""MaxText's released mHC layer: its class called whole under `jax.jit`, with its own norm, gates, Sinkhorn and head.

What MaxText reads from its configuration, the norm's eps and the iterations, has the package's default unless a case
departs from its dialect; every other parameter is a constant of its code. float64 isn't claimed, since Sinkhorn runs in
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from conformance.adapters import branch, maxtext_layer
from conformance.adapters.jax_gradients import StageCalls, Values
from conformance.interface import Arrays, Capabilities, Result

STAGES = frozenset({"expand", "reduce", "residual_matrix", "coefficients", "pre", "post", "layer", "stack"})


class MaxTextImplementation:
    """The layer of one version of the package.

    Args:
        version: of the package maxtext.
        lite: with the configuration's ``enable_mhc_lite``.
        head: whether this version has ``DeepSeek4HyperHead``.
    """

    def __init__(self, name: str, version: str, dialect: str, lite: bool, head: bool, jit: bool = True):
        self.name, self._version, self._lite = name, version, lite
        self._mhc = maxtext_layer.load(version)
        self._calls = StageCalls(jit)
        self.capabilities = Capabilities(
            stages=STAGES | ({"head"} if head else set()),
            dialects=frozenset({dialect}),
            dtypes=frozenset({"float32", "bfloat16", "float16"}),
            overrides=frozenset({"norm_eps"} if lite else maxtext_layer.NAMES),
            device=jax.default_backend(),
            description=f"maxtext {version}, jax {jax.__version__}, {'jit' if jit else 'eager'}",
            settings={"matmul_precision": "highest"},
            copies=True,
            compiled=jit,
        )

    def expand(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> Values:
            return {"out": self._functions(config)[0](values["embedding"])}

        return self._call("expand", config, body, inputs, cotangents)

    def reduce(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        if config["how"] != "sum":
            raise NotImplementedError(f"MaxText reduces by the sum, not by {config['how']}")
        return self._call("reduce", config, lambda v: {"out": self._functions(config)[1](v["x"])}, inputs, cotangents)

    def _call(
        self, stage: str, config: dict[str, Any], body: Callable[[Values], Values], inputs: Arrays, cotangents: Any
    ) -> Result:
        if self._lite:
            # MaxText caches these without end: made first inside a trace, they would leak its tracers into the next.
            self._mhc.get_permutation_matrices(config["streams"])
        return self._calls(stage, config, body, inputs, cotangents)

    def _functions(self, config: dict[str, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return self._mhc.get_functions(config["streams"])

    def head(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> Values:
            return {"out": maxtext_layer.head(self._mhc, self._configuration(config, values["x"], values), values)}

        return self._call("head", config, body, inputs, cotangents)

    def residual_matrix(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> Values:
            logits = values["logits"]
            read = self._configuration(config, logits, values)
            if self._lite:
                return {"H": maxtext_layer.permutation_matrix(self._mhc, read, logits)}
            return {"H": self._mhc.sinkhorn(logits, read.sinkhorn_iterations)}

        return self._call("residual_matrix", config, body, inputs, cotangents)

    def coefficients(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> Values:
            _, _, coefficients = self._layer(values, config, lambda u: u, lambda inputs: inputs)
            return dict(zip(("pre", "post", "H"), coefficients, strict=True))

        return self._call("coefficients", config, body, inputs, cotangents)

    def pre(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> Values:
            kept: list[jax.Array] = []
            self._layer(values, config, lambda u: kept.append(u) or u, lambda inputs: inputs)
            return {"u": kept[0]}

        return self._call("pre", config, body, inputs, cotangents)

    def post(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> Values:
            return {"out": maxtext_layer.mixed(self._mhc, self._configuration(config, values["x"], values), values)}

        return self._call("post", config, body, inputs, cotangents)

    def layer(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: Values) -> Values:
            kind = config["branch"]
            out, metadata, _ = self._layer(values, config, branch.norm_fn(values), branch.branch_fn(kind, values), kind)
            return {"out": out, **metadata}

        return self._call("layer", config, body, inputs, cotangents)

    def stack(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        if config["reduce"] not in ("sum", "none"):
            raise NotImplementedError(f"MaxText reduces by the sum, not by {config['reduce']}")

        def body(values: Values) -> Values:
            fixed, weights = branch.split(values)
            norm_fn, branch_fn = branch.norm_fn(fixed), branch.branch_fn("mlp_dense", fixed)
            expand, reduce = self._functions(config)

            def one_layer(x: jax.Array, own: Values) -> tuple[jax.Array, None]:
                return self._layer({"x": x, **own}, config, norm_fn, branch_fn)[0], None

            x, _ = jax.lax.scan(one_layer, expand(fixed["embedding"]), weights)
            return {"out": x if config["reduce"] == "none" else reduce(x)}

        return self._call("stack", config, body, inputs, cotangents)

    def _layer(
        self, values: Values, config: dict[str, Any], norm_fn: Any, branch_fn: Any, kind: str = "mlp_dense"
    ) -> tuple[jax.Array, dict[str, Any], list[jax.Array]]:
        read = self._configuration(config, values["x"], values)
        return maxtext_layer.run(self._mhc, read, values, norm_fn, branch_fn, kind)

    def _configuration(self, config: dict[str, Any], x: jax.Array, values: Values) -> Any:
        weights = branch.split(values)[1]
        weight_dtype = next(iter(weights.values()), x).dtype
        return maxtext_layer.configuration(self._version, config, x.dtype, weight_dtype, self._lite)


def maxtext_v1() -> MaxTextImplementation:
    return MaxTextImplementation("maxtext-0.2.2", "0.2.2", "maxtext-v1", lite=False, head=False)


def maxtext() -> MaxTextImplementation:
    return MaxTextImplementation("maxtext-0.2.5", "0.2.5", "maxtext", lite=False, head=True)


def mhc_lite() -> MaxTextImplementation:
    return MaxTextImplementation("maxtext-0.2.5-mhc-lite", "0.2.5", "mhc-lite", lite=True, head=True)
