"""What is timed: modules that compute one and the same site, `deepseek-v4-transformers`, with y = u.

Each is handed the same weights. What can't run here says what is missing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sites.numbers import STREAMS
from conformance.witnesses.fetch import WitnessError, folder
from torch_impl import MHCConfig, functional

ROW = "deepseek-v4-transformers"
Weights = Mapping[str, Tensor]


def configuration(dim: int) -> MHCConfig:
    return MHCConfig.from_dialect(ROW, streams=STREAMS, dim=dim)


def drawn(dim: int, device: str) -> dict[str, Tensor]:
    """Weights of a site under their canonical names, in float32, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for name, shape in functional.weight_shapes(configuration(dim)).items():
        value = torch.randn(shape, generator=generator)
        if name.endswith("_alpha"):
            value *= (STREAMS * dim) ** -0.5
        weights[name] = value.to(device)
    return weights


class Ours(nn.Module):
    """`torch_impl`'s site by one of its backends."""

    def __init__(self, dim: int, weights: Weights, backend: str):
        super().__init__()
        self.config, self.backend = configuration(dim), backend
        self.weights = {name: nn.Parameter(value) for name, value in weights.items()}
        for name, value in self.weights.items():
            self.register_parameter(name.replace(".", "_"), value)

    def forward(self, x: Tensor) -> Tensor:
        u, context, _ = functional.pre(x, self.weights, self.config, backend=self.backend)
        return functional.post(u, context)


class Written(nn.Module):
    """The layer as a page of its mathematics writes it: what one has before reading any kernel's source."""

    def __init__(self, dim: int, weights: Weights):
        super().__init__()
        self.config = configuration(dim)
        kinds = ("pre", "post", "res")
        self.phi = nn.Parameter(torch.cat([weights[f"{k}_alpha"].flatten(0, 1) for k in kinds], -1))  # [n * dim, m]
        self.scales = nn.ParameterList([nn.Parameter(weights[f"{k}_alpha_scale"]) for k in kinds])
        self.shifts = nn.ParameterList([nn.Parameter(weights[f"{k}_beta"].reshape(-1)) for k in kinds])

    def forward(self, x: Tensor) -> Tensor:
        c, n = self.config, STREAMS
        flat = x.flatten(-2).float()
        normed = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + c.norm_eps)
        parts = (normed @ self.phi).split([n, n, n * n], -1)
        z = [scale * part + shift for scale, part, shift in zip(self.scales, parts, self.shifts, strict=True)]
        pre, post = z[0].sigmoid() + c.pre_eps, c.post_scale * z[1].sigmoid() + c.post_eps
        H, eps = z[2].unflatten(-1, (n, n)).softmax(-1) + float(c.eps or 0), float(c.eps or 0)
        H = H / (H.sum(-2, keepdim=True) + eps)
        for _ in range(int(c.iterations or 0) - 1):
            H = H / (H.sum(-1, keepdim=True) + eps)
            H = H / (H.sum(-2, keepdim=True) + eps)
        u = (pre.unsqueeze(-1) * x.float()).sum(-2).to(x.dtype)
        return post.to(x.dtype).unsqueeze(-1) * u.unsqueeze(-2) + H.to(x.dtype).transpose(-1, -2) @ x


class Transformers(nn.Module):
    """The class of the installed ``transformers``, and the mixing as its decoder layer writes it."""

    def __init__(self, dim: int, weights: Weights):
        super().__init__()
        from transformers.models.deepseek_v4 import configuration_deepseek_v4, modeling_deepseek_v4

        from conformance.adapters import branch
        from conformance.stages import PROJECTIONS

        settings = configuration_deepseek_v4.DeepseekV4Config(hidden_size=dim, hc_mult=STREAMS)
        self.connection = modeling_deepseek_v4.DeepseekV4HyperConnection(settings)
        flat = {k: v.flatten(0, 1) if v.ndim > 1 else v for k, v in weights.items()}  # as the suite hands them over
        joined = branch.joined(flat, torch.cat, PROJECTIONS)
        with torch.no_grad():
            for name, value in joined.items():
                self.connection.get_parameter(name).copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        post, H, u = self.connection(x)
        own = post.to(x.dtype).unsqueeze(-1) * u.unsqueeze(-2)
        return own + torch.matmul(H.to(x.dtype).transpose(-1, -2), x)


class Liger(nn.Module):
    """The autograd functions of the installed ``liger-kernel``, whose mixing takes the transpose of H."""

    def __init__(self, dim: int, weights: Weights):
        super().__init__()
        self.config = configuration(dim)
        kinds = ("pre", "post", "res")
        self.phi = nn.Parameter(torch.cat([weights[f"{k}_alpha"].flatten(0, 1) for k in kinds], -1))  # [n * dim, m]
        self.shift = nn.Parameter(torch.cat([weights[f"{k}_beta"].reshape(-1) for k in kinds]))
        self.scales = nn.ParameterList([nn.Parameter(weights[f"{k}_alpha_scale"].reshape(())) for k in kinds])

    def forward(self, x: Tensor) -> Tensor:
        from liger_kernel.ops.mhc import (  # pyright: ignore[reportMissingImports]
            LigerMHCCoeffsFunction,
            LigerMHCPostResFunction,
            LigerMHCPreFunction,
        )

        c = self.config
        numbers = (True, c.iterations, c.norm_eps, c.pre_eps, c.eps, c.post_scale)
        pre, post, H = LigerMHCCoeffsFunction.apply(x, self.phi, self.shift, *self.scales, *numbers)
        u = LigerMHCPreFunction.apply(x, pre)
        return LigerMHCPostResFunction.apply(x, u, post, H.transpose(-1, -2).contiguous())


class TileReferences(nn.Module):
    """The references in PyTorch that ``tile-kernels`` tests its kernels with; they mix in bfloat16 alone."""

    def __init__(self, dim: int, weights: Weights):
        super().__init__()
        from conformance.adapters import branch
        from conformance.adapters.tile_kernels_adapter import MODULE, PACKAGE
        from conformance.stages import PROJECTIONS
        from conformance.witnesses.loading import load

        self.config, self.functions = configuration(dim), load(PACKAGE, MODULE)
        flat = {k: v.flatten(0, 1) if v.ndim > 1 else v for k, v in weights.items()}
        for name, value in branch.joined(flat, torch.cat, PROJECTIONS).items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:
            raise NotImplementedError("its references mix in bfloat16 alone")
        c, functions = self.config, self.functions
        own = dict(self.named_parameters())
        mixes = functions.mhc_pre_norm_fn_ref(x, own["fn"], None, c.norm_eps)
        split = (mixes, own["scale"], own["base"], STREAMS, c.post_scale, c.pre_eps)
        pre, post, logits = functions.mhc_pre_split_mixes_ref(*split)
        H = functions.sinkhorn_normalize_ref(logits, c.iterations, c.eps)
        u = functions.mhc_pre_apply_mix_ref(x, pre)
        return functions.mhc_post_ref(u, x, post, H)


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        make: a module of a width and weights; None for one whose layer is another function.
        packages: what has to be installed.
        devices: where it runs.
        fetched: the package of `witnesses.fetch` that it runs.
    """

    name: str
    make: Callable[[int, Weights], nn.Module] | None
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    fetched: str = ""

    def missing(self, device: str) -> str:
        """Why it can't be measured here; empty where it can."""
        if self.make is None:
            return "its layer is another function"
        if device not in self.devices:
            return f"doesn't run on {device}"
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} not installed"
        try:
            if self.fetched:
                folder(self.fetched)
        except WitnessError:
            return f"{self.fetched} not fetched (python -m conformance.witnesses.fetch)"
        return ""


def _compiled(dim: int, weights: Weights) -> nn.Module:
    module: Any = torch.compile(Written(dim, weights), fullgraph=True, dynamic=False)
    return module


OURS = "torch_impl"
CONTENDERS = (
    Contender(OURS, lambda dim, weights: Ours(dim, weights, "auto")),
    Contender("torch_impl, plain", lambda dim, weights: Ours(dim, weights, "plain")),
    Contender("torch_impl, triton", lambda dim, weights: Ours(dim, weights, "triton"), ("triton",), ("cuda",)),
    Contender("written plainly", Written),
    Contender("written plainly, torch.compile", _compiled),
    Contender("transformers", Transformers, ("transformers",)),
    Contender("liger-kernel", Liger, ("triton", "liger_kernel"), ("cuda",)),
    Contender("tile-kernels' references", TileReferences, fetched="tile-kernels==2.1.0"),
    Contender("hyper-connections", None),
)
