"""The layer against a float64 NumPy evaluation, under PyTorch's own transformations, and its checks of shapes."""

from __future__ import annotations

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import torch_impl
from tests.torch_impl import torch_expected
from torch_impl import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections, MHCConfig
from torch_impl.config import dialects

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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
    """A site around a doubling; a single-pass one reads stream 0."""
    carried = torch_impl.one_hot(x) if module.config.pre_from == "previous" else None
    return module(lambda u: u, lambda inputs: 2 * inputs, x, HyperConnectionType.MLP_DENSE, carried=carried)[0]


def in_numpy(module, x):
    """The same as `run`, in float64 NumPy."""
    weights = {k: v.detach().double().numpy() for k, v in module.weights().items()}
    x = x.detach().double().numpy()
    return torch_expected.site(x, weights, module.config, lambda u: 2 * u, torch_expected.one_hot(x))[0]


SINKHORN = [name for name, row in dialects().items() if row["residual"] == "sinkhorn"]


@pytest.mark.parametrize("name", dialects())
def test_the_layer_is_mathematics_md(name):
    module, x = layer(name, dtype=torch.float64), streams(dtype=torch.float64)
    np.testing.assert_allclose(run(module, x).detach().numpy(), in_numpy(module, x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", dialects())
def test_every_dialect_runs_in_every_dtype_with_finite_gradients(name, dtype):
    module, x = layer(name), streams(dtype=dtype).requires_grad_()
    out = run(module, x)
    assert out.dtype == dtype and out.shape == x.shape and out.isfinite().all()
    out.float().square().sum().backward()
    leaves = [x, *module.weights().values()]
    assert all(w.grad is not None and w.grad.isfinite().all() and w.grad.dtype == w.dtype for w in leaves)


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


@pytest.mark.parametrize("name", SINKHORN)
def test_logits_of_ten_thousand_stay_finite(name):
    """An offset cancels along the axis that the softmax runs over; without a softmax, the one normalised first."""
    config = MHCConfig.from_dialect(name, streams=3, dim=1)
    offsets = torch.tensor([1e4, -1e4, 0.0])
    over_columns = config.softmax == "columns"
    logits = (torch.randn(5, 3, 3) + (offsets if over_columns else offsets[:, None])).requires_grad_()
    H = torch_impl.residual_matrix(logits, config)
    (gradient,) = torch.autograd.grad((H * torch.randn(5, 3, 3)).sum(), logits)
    assert H.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("offset", [90.0, 1e4])
@pytest.mark.parametrize("softmax", ["rows", "columns", "none"])
@pytest.mark.parametrize("order", ["rows-first", "columns-first"])
def test_without_an_eps_offsets_along_either_axis_are_those_of_the_iterations_on_logarithms(order, softmax, offset):
    """A line far below the others comes back in the next pass, which divides by nothing but its sum."""
    config = MHCConfig(streams=3, dim=1, order=order, softmax=softmax, iterations=20)
    noise = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0)).mul(64).round().div(64)
    rows, columns = -1, -2
    axes = (rows, columns) if order == "rows-first" else (columns, rows)
    for axis in (rows, columns):
        logits = noise + torch.tensor([offset, -offset, 0.0]).unsqueeze(axis)
        level, start = logits.double(), {"rows": rows, "columns": columns, "none": axes[0]}[softmax]
        for pass_axis in [start, *(axes * 20)[start == axes[0] :]]:
            level = level - level.logsumexp(pass_axis, keepdim=True)
        found = torch_impl.residual_matrix(logits.requires_grad_(), config)
        torch.testing.assert_close(found.double(), level.exp(), atol=3e-6, rtol=0)
        (gradient,) = torch.autograd.grad((found * noise).sum(), logits)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("lead", [(), (3,), (0, 4), (2, 1, 3)])
def test_functions_take_any_leading_shape(lead):
    module, x = layer(), streams(lead=lead)
    u, context, _ = torch_impl.pre(x, module.weights(), module.config)
    assert u.shape == (*lead, 5) and torch_impl.post(u, context).shape == x.shape


def test_halves_equal_the_whole_and_strides_do_not_matter():
    module, x = layer(), streams()
    u, context, _ = module.pre(x)
    whole = run(module, x)
    assert torch.equal(module.post(2 * u, context), whole)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous() and torch.allclose(run(module, strided), whole, rtol=1e-5, atol=1e-6)


def test_branches_are_handed_what_maxtext_hands_them():
    module, x = layer(), streams()

    def attention(inputs_q, inputs_kv, deterministic):
        assert inputs_q is inputs_kv and deterministic
        return inputs_q, "cache"

    out, metadata = module(lambda u: u, attention, x, HyperConnectionType.ATTENTION, deterministic=True)
    assert metadata == {} and out.shape == x.shape
    moe = lambda inputs: (inputs, torch.tensor(0.5), "updates")  # noqa: E731
    _, metadata = module(lambda u: u, moe, x, HyperConnectionType.MLP_MOE)
    assert metadata == {"load_balance_loss": torch.tensor(0.5), "moe_bias_updates": "updates"}


@pytest.mark.parametrize("name", ["paper", "maxtext", "mhc-lite", "hunyuan-v4"])
def test_compiles_as_one_graph(name):
    module, x = layer(name), streams()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(module, x), run(module, x), rtol=1e-5, atol=1e-6)


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


def test_initial_projections_have_the_variance_of_their_fan_in():
    module = ManifoldConstrainedHyperConnections(MHCConfig(streams=4, dim=128))
    assert module.weights()["res_alpha"].var().item() == pytest.approx(1 / 512, rel=0.1)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda m: m.pre(torch.zeros(2, 4, 2, 5)), r"x must end in \[3, 5\], got \[2, 4, 2, 5\]"),
        (lambda m: run(m, torch.zeros(4, 3, 5)), r"x must be \[batch, seq, streams, dim\]"),
        (lambda m: m.post(torch.zeros(2, 4, 6), m.pre(streams())[1]), r"y must end in \[5\]"),
        (lambda m: torch_impl.pre(streams(), {}, m.config), "weights must have pre_alpha"),
        (lambda m: torch_impl.reduce(streams(), "max"), "how must be sum, mean or carried"),
        (lambda m: torch_impl.expand(streams(), 0), "streams must be at least 1"),
        (lambda m: torch_impl.residual_matrix(torch.zeros(2, 2), m.config), r"logits must end in \[3, 3\]"),
    ],
)
def test_a_wrong_shape_is_named(call, said):
    with pytest.raises(ValueError, match=said):
        call(layer())


def test_head_is_a_gated_sum():
    head = HyperHead(MHCConfig.from_dialect("deepseek-v4", streams=3, dim=5))
    with torch.no_grad():
        head.get_parameter("head_fn").zero_()
    x = streams()
    torch.testing.assert_close(head(x), (0.5 + 1e-6) * x.sum(-2))


def test_importing_needs_no_jax():
    code = "import sys, torch_impl; assert not {'jax', 'flax', 'conformance'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
