"""The stages of a layer, from what a package computes of one site: the same for PyTorch and mlx.

A package opens a site (gates, H and u from x), collapses, mixes and expands in functions of its own. `Site` makes the
suite's stages of them::

    opened = open_site(values, config)                            # pre, post, H, u
    y, _   = branch(norm(opened["u"]))
    out    = mix(values | {"y": y} | opened, config)

It is public (docs/contract.md), and imports no implementation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from conformance.adapters import branch
from conformance.cases.dialects import dialect_rows
from conformance.interface import Arrays, Capabilities, Result

Values = Mapping[str, Any]
Body = Callable[[dict[str, Any]], dict[str, Any]]


class Site:
    """One method per stage; a subclass supplies what its package computes.

    Args:
        vector_jacobian: that of ``torch_gradients`` or ``mlx_gradients``.
    """

    def __init__(self, name: str, capabilities: Capabilities, vector_jacobian: Callable[..., Result]):
        self.name, self.capabilities, self._vector_jacobian = name, capabilities, vector_jacobian

    def open_site(self, values: Values, config: Mapping[str, Any]) -> dict[str, Any]:
        """Gates, H and u of one site.

        Args:
            values: x ``[batch, seq, n, C]``, canonical flat weights, and, where a site reads with the pre of the site
                before it, ``carried`` ``[batch, seq, n]``: absent from coefficients, and None in the first site of a
                stack if `first_carried` gives None.

        Returns:
            ``post``, ``H`` and, where the package gives them, ``pre`` and ``u``.
        """
        raise NotImplementedError(f"{self.name} computes no coefficients")

    def mix(self, values: Values, config: Mapping[str, Any]) -> Any:
        """``out`` from y, x, post and H."""
        raise NotImplementedError(f"{self.name} doesn't mix")

    def expand_streams(self, embedding: Any, config: Mapping[str, Any]) -> Any:
        raise NotImplementedError(f"{self.name} doesn't expand")

    def reduce_streams(self, x: Any, how: str, carried: Any) -> Any:
        """``[batch, seq, C]``; where a package claims no reduction, a stack's sum is the suite's, as its branch is."""
        if how == "sum" and "reduce" not in self.capabilities.stages:
            return x.sum(2)
        raise NotImplementedError(f"{self.name} doesn't reduce by {how}")

    def first_carried(self, x: Any) -> Any:
        """The one-hot of stream 0 that the first site reads with, None where the package's own code stands for it."""
        return None

    def expand(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._run("expand", lambda v: {"out": self.expand_streams(v["embedding"], config)}, inputs, cotangents)

    def reduce(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: dict[str, Any]) -> dict[str, Any]:
            return {"out": self.reduce_streams(values["x"], config["how"], values.get("carried"))}

        return self._run("reduce", body, inputs, cotangents)

    def coefficients(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: dict[str, Any]) -> dict[str, Any]:
            opened = self.open_site(values, config)
            return {k: opened[k] for k in self.capabilities.outputs.get("coefficients", ("pre", "post", "H"))}

        return self._run("coefficients", body, inputs, cotangents)

    def pre(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        def body(values: dict[str, Any]) -> dict[str, Any]:
            opened = self.open_site(values, config)
            return {"u": opened["u"]} | handed_on(values, opened)

        return self._run("pre", body, inputs, cotangents)

    def post(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._run("post", lambda values: {"out": self.mix(values, config)}, inputs, cotangents)

    def layer(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._run("layer", lambda values: self._layer(values, config, config["branch"]), inputs, cotangents)

    def _layer(self, values: Values, config: Mapping[str, Any], kind: str) -> dict[str, Any]:
        opened = self.open_site(values, config)
        y, metadata = branch.call(kind, values, branch.norm_fn(values)(opened["u"]))
        out = self.mix({**values, **opened, "y": y}, config)
        return {"out": out, **metadata} | handed_on(values, opened)

    def stack(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        return self._run("stack", lambda values: {"out": self._stack(values, config)}, inputs, cotangents)

    def _stack(self, values: Values, config: Mapping[str, Any]) -> Any:
        constants, weights = branch.split(values)
        x = self.expand_streams(constants["embedding"], config)
        chain = {"carried": self.first_carried(x)} if config.get("pre_from") == "previous" else {}
        for index in range(config["layers"]):
            site = {**constants, **chain, "x": x, **{k: v[index] for k, v in weights.items()}}
            result = self._layer(site, config, "mlp_dense")
            x, chain = result["out"], {"carried": result["pre"]} if chain else {}
        return x if config["reduce"] == "none" else self.reduce_streams(x, config["reduce"], chain.get("carried"))

    def _run(self, stage: str, body: Body, inputs: Arrays, cotangents: Arrays | None) -> Result:
        return self._vector_jacobian(stage, body, inputs, cotangents)


def handed_on(values: Values, opened: Values) -> dict[str, Any]:
    """The site's own pre, where the next site reads with it."""
    return {"pre": opened["pre"]} if "carried" in values else {}


@functools.cache
def _row(dialect: str) -> dict[str, Any]:
    return dialect_rows().get(dialect, {})


def settings_of(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """What of a package's own configuration must be set: where the case departs from its dialect, and there alone.

    All else stays at the package's default, so that a row that disagrees with it fails.

    Args:
        config: what a stage is handed.
        names: of parameters, and what the package calls them; several may have one name there.

    Raises:
        NotImplementedError: the parameters of one name have different values.
    """
    row, settings = _row(config["dialect"]), {}
    for name in dict.fromkeys(names.values()):
        values = {k: config[k] for k, v in names.items() if v == name}
        if all(k in row and row[k] == v for k, v in values.items()):
            continue
        if len(set(values.values())) > 1:
            raise NotImplementedError(f"{name} is one value for {' and '.join(values)}, got {values}")
        settings[name] = next(iter(values.values()))
    return settings
