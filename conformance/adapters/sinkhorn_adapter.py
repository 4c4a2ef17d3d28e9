"""Peers whose mHC layer is another function, for what they have in common with it: the Sinkhorn iterations.

``hyper-connections`` (PyTorch) learns its weights another way, ``mlx-mhc`` and ``mhc-mlx`` have coefficients that
don't depend on x. Each is handed the logits of residual_matrix as they are.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from conformance.adapters.versions import version_of
from conformance.interface import Arrays, Capabilities, Result


def _capabilities(packages: tuple[str, ...], dialect: str) -> Capabilities:
    """The claims of a Sinkhorn without a guard: ``paper`` has it columns first, ``transformer-engine`` rows first."""
    return Capabilities(
        stages=frozenset({"residual_matrix"}),
        dialects=frozenset({dialect}),
        dtypes=frozenset({"float32"}),
        overrides=frozenset({"iterations"}),
        description=", ".join(f"{p} {version_of(p)}" for p in packages),
    )


class HyperConnections:
    """Its direct form and its logarithms; both normalise columns first and end on rows, as the paper's Eq. 9 does."""

    def __init__(self, name: str, function: str):
        self.name = name
        module = importlib.import_module("hyper_connections.manifold_constrained_hyper_connections")
        self._function = getattr(module, function)
        self.capabilities = _capabilities(("hyper-connections", "torch"), "paper")

    def residual_matrix(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        from conformance.adapters.torch_gradients import vector_jacobian

        return vector_jacobian(
            "residual_matrix", lambda v: {"H": self._function(v["logits"], config["iterations"])}, inputs, cotangents
        )


class Mlx:
    """A function of one matrix on mlx's CPU backend, called token by token; it normalises rows first.

    Args:
        function: maps (logits ``[n, n]``, iterations) to H.
    """

    def __init__(self, name: str, packages: tuple[str, ...], function: Callable[[Any, int], Any]):
        self.name, self._function = name, function
        self.capabilities = replace(_capabilities(packages, "transformer-engine"), copies=True)

    def residual_matrix(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        import mlx.core as mx  # pyright: ignore[reportMissingImports]

        from conformance.adapters.mlx_gradients import vector_jacobian

        def every(values: dict[str, Any]) -> dict[str, Any]:
            logits = values["logits"]
            tokens = logits.reshape(-1, *logits.shape[-2:])  # [T, n, n]
            matrices = [self._function(tokens[k], config["iterations"]) for k in range(len(tokens))]
            return {"H": mx.stack(matrices).reshape(logits.shape)}

        return vector_jacobian("residual_matrix", every, inputs, cotangents)


def hyper_connections() -> HyperConnections:
    return HyperConnections("hyper-connections", "sinkhorn_knopps")


def hyper_connections_log() -> HyperConnections:
    return HyperConnections("hyper-connections-log", "log_domain_sinkhorn_knopps")


def mlx_mhc() -> Mlx:
    sinkhorn = importlib.import_module("mlx_mhc.sinkhorn")
    return Mlx("mlx-mhc", ("mlx-mhc", "mlx"), lambda logits, n: sinkhorn.sinkhorn_knopp(logits, max_iterations=n))


def mhc_mlx() -> Mlx:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this isn't macOS
        reference = importlib.import_module("mhc_mlx.reference")
    return Mlx("mhc-mlx", ("mhc-mlx", "mlx"), lambda logits, n: reference.mixing_matrix_from_logits(logits, iters=n))
