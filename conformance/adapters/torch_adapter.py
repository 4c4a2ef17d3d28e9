"""`torch_impl` for the suite: eager, captured by torch.compile, and compiled by its default backend.

``torch-compile`` captures every stage and its gradient as graphs (``fullgraph=True``, AOTAutograd) and runs them
by ATen: half a second a graph (`torch_graphs`), against some seconds with the default backend.
``torch-inductor`` is that default backend; it claims the same and is run on request. So is ``torch-triton``, eager by
the Triton kernels: on a GPU, or in Triton's interpreter, which has to be chosen before Triton is imported.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch

import torch_impl
import torch_impl.config
from conformance.adapters import branch
from conformance.adapters.sources import Sources
from conformance.adapters.torch_gradients import settings, vector_jacobian
from conformance.cases.case import DTYPES
from conformance.cases.trajectories.model import STEP
from conformance.interface import Arrays, Capabilities, Result
from conformance.stages import STAGES, relevant
from torch_impl.fused import BackendError

SOURCES = Sources(("torch_impl", "conformance.adapters"))
"""All that a graph is captured from, as it has just been imported."""
INTERPRETED = 600
"""Tokens that Triton's interpreter computes within a minute or so."""


def configuration(config: dict[str, Any]) -> torch_impl.MHCConfig:
    """The parameters of what a stage is told; a stack's own ``reduce`` isn't the dialect's."""
    known = torch_impl.MHCConfig(streams=1, dim=1).parameters()
    parameters = {k: v for k, v in config.items() if k in known}
    reduce = "carried" if parameters["pre_from"] == "previous" else "sum"
    return torch_impl.MHCConfig.from_parameters({**parameters, "reduce": reduce})


class TorchImplementation:
    """Every stage of `torch_impl`; ``backend`` is that of its functions.

    Args:
        compiler: makes a compiled function of one and of a key that tells it from others; None runs eagerly.
    """

    def __init__(
        self,
        name: str,
        compiler: Callable[[FunctionType, str], Callable[..., Any]] | None,
        how: str,
        backend: str = "auto",
        dtypes: Iterable[str] = DTYPES,
        stages: Iterable[str] = STAGES,
        device: str = "cpu",
        tokens: int | None = None,
    ):
        torch.set_num_threads(1)
        if compiler is not None:  # Dynamo takes seconds to import, and eager code has no use for it
            torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1 << 20
            torch._dynamo.config.run_gc_after_compile = False  # the suite looks for garbage itself
        self.name = name
        self.compiler = compiler
        self.backend = backend
        self.device = device
        self._compiled: tuple[str, Callable[..., Any]] = ("", dict)
        self.capabilities = Capabilities(
            stages=frozenset(stages),
            dialects=frozenset(torch_impl.config.dialects()),
            dtypes=frozenset(dtypes),
            overrides=None,
            description=f"torch_impl, torch {torch.__version__}, {how}",
            settings=settings(),
            compiled=compiler is not None,
            device=device,
            tokens=tokens,
        )

    def _run(self, key: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, compiled once per key; Dynamo itself tells shapes and dtypes apart.

        Dynamo keeps its graphs with the code that they come from, and tries one after the other. So each key has a code
        of its own, and that of another key is let go: items of one graph come together.
        """
        if self.compiler is None:
            return function
        if self._compiled[0] != key:
            own = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
            self._compiled = key, self.compiler(own, key)
        return self._compiled[1]

    def _stage(self, name: str, function: Callable[..., Any], inputs: Any, config: Any, cotangents: Any) -> Result:
        c = configuration(config)
        key = f"{name}/{self.backend}/{relevant(name, config)}"
        told = {**config, "backend": self.backend}
        if name == "layer":
            told["module"] = _module(c, self.backend)
            c = told["module"].config  # as in `stack`
        body = self._run(key, lambda values: function(values, c, told))
        return self._answer(name, body, inputs, cotangents)

    def _answer(self, name: str, body: Callable[..., Any], inputs: Any, cotangents: Any) -> Result:
        """Outputs and gradients, computed where the implementation runs."""

        def there(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return body({key: value.to(self.device) for key, value in values.items()})

        try:
            return vector_jacobian(name, body if self.device == "cpu" else there, inputs, cotangents)
        except BackendError as error:
            raise NotImplementedError(str(error)) from error

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
        module = _module(configuration(config), self.backend)
        c = module.config  # the very object: a kept graph says whether it is, and modules are shared by equal ones
        told = {**config, "branch": "mlp_dense", "module": module}
        run_site = self._run(
            f"stack/{self.backend}/{relevant('stack', config)}", lambda values: _layer(values, c, told)
        )

        def body(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            constants, weights = branch.split(values)
            x = torch_impl.expand(constants["embedding"], c.streams)
            carried = torch_impl.one_hot(x) if c.pre_from == "previous" else None
            for index in range(config["layers"]):
                handed = {} if carried is None else {"carried": carried}
                site_outputs = run_site({**{k: constants[k] for k in ("norm_scale", "branch_scale")}, "x": x, **handed,
                             **{k: v[index] for k, v in weights.items()}})  # fmt: skip
                x, carried = site_outputs["out"], site_outputs.get("pre")
            return _reduced(x, carried, c, config["reduce"])

        return self._answer("stack", body, inputs, cotangents)

    def step(self, inputs: Arrays, config: dict[str, Any], cotangents: Arrays | None) -> Result:
        from conformance.adapters import torch_training  # here, since it needs torch.distributed

        return torch_training.step(inputs, config, cotangents)


def _weights(values: dict[str, torch.Tensor], c: torch_impl.MHCConfig) -> dict[str, torch.Tensor]:
    return branch.in_memory(branch.split(values)[1], c.streams, c.dim)


def _expand(values: Any, c: torch_impl.MHCConfig, options: Any) -> dict[str, torch.Tensor]:
    return {"out": torch_impl.expand(values["embedding"], c.streams)}


def _reduce(values: Any, c: torch_impl.MHCConfig, options: Any) -> dict[str, torch.Tensor]:
    return _reduced(values["x"], values.get("carried"), c, options["how"])


def _reduced(
    x: torch.Tensor, carried: torch.Tensor | None, c: torch_impl.MHCConfig, how: str
) -> dict[str, torch.Tensor]:
    return {"out": x if how == "none" else torch_impl.reduce(x, how, carried, reduction=c.reduction)}


def _head(values: Any, c: torch_impl.MHCConfig, options: Any) -> dict[str, torch.Tensor]:
    return {"out": torch_impl.head(values["x"], _weights(values, c), c, backend=options["backend"])}


def _residual_matrix(values: Any, c: torch_impl.MHCConfig, options: Any) -> dict[str, torch.Tensor]:
    return {"H": torch_impl.residual_matrix(values["logits"], c, backend=options["backend"])}


def _coefficients(values: Any, c: torch_impl.MHCConfig, options: Any) -> dict[str, torch.Tensor]:
    pre, post, H = torch_impl.coefficients(values["x"], _weights(values, c), c, backend=options["backend"])
    return {"pre": pre, "post": post, "H": H}


def _pre(values: Any, c: torch_impl.MHCConfig, options: Any) -> dict[str, torch.Tensor]:
    u, _, handed = torch_impl.pre(
        values["x"], _weights(values, c), c, values.get("carried"), backend=options["backend"]
    )
    return {"u": u} if handed is None else {"u": u, "pre": handed}


def _post(values: Any, c: torch_impl.MHCConfig, options: Any) -> dict[str, torch.Tensor]:
    mixing = (values["y"], values["x"], values["post"], values["H"])
    return {"out": torch_impl.post_mix(*mixing, c, backend=options["backend"])}


def _layer(values: Any, c: torch_impl.MHCConfig, options: Any) -> dict[str, torch.Tensor]:
    named = {k.replace(".", "_"): v for k, v in _weights(values, c).items()}
    kind = torch_impl.HyperConnectionType(options["branch"])
    call = (branch.norm_fn(values), branch.branch_fn(options["branch"], values), values["x"], kind)
    out, metadata = torch.func.functional_call(options["module"], named, call, {"carried": values.get("carried")})
    return {"out": out, **{"pre" if k == "carried" else k: v for k, v in metadata.items()}}


@functools.cache
def _module(c: torch_impl.MHCConfig, backend: str) -> torch_impl.ManifoldConstrainedHyperConnections:
    """A module without memory: its parameters are handed over at each call."""
    return torch_impl.ManifoldConstrainedHyperConnections(c, device="meta", backend=backend)


def eager() -> TorchImplementation:
    return TorchImplementation("torch", None, "eager", stages=(*STAGES, STEP))


def compiled() -> TorchImplementation:
    from conformance.adapters.torch_graphs import Graphs  # here, since Dynamo takes seconds to import

    _can_compile()
    return TorchImplementation("torch-compile", Graphs(SOURCES), "captured by Dynamo and AOTAutograd")


def inductor() -> TorchImplementation:
    def by_inductor(function: FunctionType, key: str) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=False)

    _can_compile()
    return TorchImplementation("torch-inductor", by_inductor, "inductor")


def _can_compile() -> None:
    if torch._dynamo.config.disable or torch.compile(_can_compile, backend="eager") is _can_compile:
        how = "TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE"
        raise ImportError(f"torch.compile is switched off, by {how}: unset it, or run torch, which is eager")


def triton() -> TorchImplementation:
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, triton's own too
    from triton import language
    from triton.runtime.jit import JITFunction

    from torch_impl import kernels

    if not gpu and isinstance(language.sum, JITFunction):
        raise ImportError("without a GPU triton must be imported with TRITON_INTERPRET=1, and was without it before")
    return TorchImplementation(
        "torch-triton",
        None,
        "Triton kernels on a GPU" if gpu else "Triton kernels, interpreted",
        backend="triton",
        dtypes=[str(dtype).removeprefix("torch.") for dtype in kernels.DTYPES],
        stages=("residual_matrix", "coefficients", "pre", "post", "head", "layer", "stack"),
        device="cuda" if gpu else "cpu",
        tokens=None if gpu else INTERPRETED,
    )
