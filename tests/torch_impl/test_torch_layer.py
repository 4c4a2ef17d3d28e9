"""The layer under PyTorch's own transformations, autocast, and its construction without values."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import torch_impl
from torch_impl import HyperConnectionType, ManifoldConstrainedHyperConnections, MHCConfig


def layer(name="deepseek-v4", n=3, dim=5, dtype=torch.float32, **overrides):
    torch.manual_seed(0)
    config = MHCConfig.from_dialect(name, streams=n, dim=dim, **overrides)
    module = ManifoldConstrainedHyperConnections(config, dtype=dtype)
    with torch.no_grad():
        for key, value in module.weights().items():
            if key.endswith("_alpha_scale"):
                value.fill_(1.3)
            elif key.endswith("_beta"):
                value.normal_()
    return module


def streams(n=3, dim=5, dtype=torch.float32, lead=(2, 4)):
    return torch.randn(*lead, n, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def run(module, x):
    """Runs a site around a doubling."""
    return module(lambda u: u, lambda inputs: 2 * inputs, x, HyperConnectionType.MLP_DENSE)[0]


def test_gradients_are_those_of_the_iterations_as_written():
    module, x = layer(dtype=torch.float64), streams(dtype=torch.float64, lead=(1, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: run(module, x), (x,))


def test_the_norm_may_follow_the_projection():
    module, x = layer("paper", dtype=torch.float64), streams(dtype=torch.float64)
    scaled = x * torch.rand(2, 4, 1, 1, dtype=torch.float64).add(0.5)
    for one, other in zip(
        torch_impl.coefficients(x, module.weights(), module.config),
        torch_impl.coefficients(scaled, module.weights(), module.config),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_strides_do_not_matter():
    module, x = layer(), streams()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(run(module, strided), run(module, x), rtol=1e-5, atol=1e-6)


COMPILED = """
import sys
import torch
from torch_impl import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections, MHCConfig

def run(module, x):
    return module(lambda u: u, lambda inputs: 2 * inputs, x, HyperConnectionType.MLP_DENSE)[0]

for name in sys.argv[1:]:
    module = ManifoldConstrainedHyperConnections(MHCConfig.from_dialect(name, streams=3, dim=5))
    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(module, x), run(module, x), rtol=1e-5, atol=1e-6)
    head = HyperHead(module.config)
    for dynamic in (False, True):
        compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        torch.testing.assert_close(compiled(x), head(x), rtol=1e-5, atol=1e-6)
    print(name)
"""


def test_compiles_as_one_graph():
    """In a process without the checks of shapes, which Dynamo can't trace."""
    names = ["paper", "maxtext", "mhc-lite", "hunyuan-v4"]
    call = [sys.executable, "-c", COMPILED, *names]
    assert subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout.split() == names


def test_vmap_vjp_and_checkpoint_agree_with_plain_calls():
    module, x = layer(), streams()
    weights = {k: v.detach() for k, v in module.weights().items()}
    one = lambda x: torch_impl.pre(x, weights, module.config)[0]  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(one)(x), one(x), rtol=1e-5, atol=1e-6)
    pullback = torch.func.vjp(one, x)[1]
    assert pullback(torch.ones(2, 4, 5))[0].shape == x.shape
    x = x.requires_grad_()
    plain = torch.autograd.grad(run(module, x).square().sum(), x)[0]
    again = torch.autograd.grad(checkpoint(run, module, x, use_reentrant=False).square().sum(), x)[0]
    torch.testing.assert_close(again, plain)


def test_autocast_leaves_the_coefficients_alone():
    module, x = layer(), streams(dtype=torch.bfloat16)
    plain = torch_impl.coefficients(x, module.weights(), module.config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = torch_impl.coefficients(x, module.weights(), module.config)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(plain, cast, strict=True))


def test_projections_may_have_dtypes_that_have_none_in_common():
    config = MHCConfig.from_dialect("deepseek-v4", streams=3, dim=5)
    weights, x = layer().weights(), streams()
    mixed = {**weights, "pre_alpha": weights["pre_alpha"].detach().to(torch.float8_e4m3fn)}
    same = {**weights, "pre_alpha": mixed["pre_alpha"].float()}
    for backend in ("plain", "lean"):
        one, other = (torch_impl.coefficients(x, held, config, backend=backend)[0] for held in (mixed, same))
        assert torch.equal(one, other)


def test_state_dict_deepcopy_and_meta_construction():
    module, x = layer("maxtext"), streams()
    twin = ManifoldConstrainedHyperConnections(module.config)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(run(twin, x), run(module, x))
    assert torch.equal(run(copy.deepcopy(module), x), run(module, x))
    empty = ManifoldConstrainedHyperConnections(module.config, device="meta")
    assert all(w.is_meta for w in empty.weights().values())
    empty.to_empty(device="cpu").reset_parameters()
    assert float(empty.weights()["pre_alpha_scale"].detach()) == pytest.approx(0.01)
