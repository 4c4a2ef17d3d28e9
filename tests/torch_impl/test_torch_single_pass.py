"""Single-pass sites (mathematics.md, "Single pass"): what crosses from one site to the next, and its gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import torch_impl
from tests.torch_impl import torch_expected
from torch_impl import HyperConnectionType, ManifoldConstrainedHyperConnections, MHCConfig

KINDS = (HyperConnectionType.ATTENTION, HyperConnectionType.MLP_DENSE, HyperConnectionType.MLP_MOE)
CONFIG = MHCConfig.from_dialect("deepseek-v4.1", streams=3, dim=5)


def values(shape, seed, scale=1.0):
    return scale * np.random.default_rng(seed).standard_normal(shape)


def sites(count=4, config=CONFIG, dtype=torch.float64):
    """Sites whose weights are all of order 1."""
    made = []
    for index in range(count):
        module = ManifoldConstrainedHyperConnections(config, dtype=dtype)
        with torch.no_grad():
            for number, value in enumerate(module.weights().values()):
                value.copy_(torch.as_tensor(values(value.shape, 10 * index + number, 0.5)))
        made.append(module)
    return made


def attention(inputs_q, inputs_kv):
    return torch.tanh(inputs_q) + inputs_kv.mean(1, keepdim=True), "cache"


def dense(inputs):
    return torch.sin(inputs)


def experts(inputs):
    return inputs * inputs, 0.5, "updates"


def chain(x, modules, carried=None):
    """Attention, dense MLP and mixture of experts in turn, collapsed with the last pre."""
    carried = torch_impl.one_hot(x) if carried is None else carried
    for index, module in enumerate(modules):
        branch = (attention, dense, experts)[index % 3]
        x, metadata = module(lambda u: u, branch, x, KINDS[index % 3], carried=carried)
        carried = metadata["carried"]
    return torch_impl.reduce(x, "carried", carried)


def in_numpy(modules):
    return [{k: v.detach().numpy().astype(np.float64) for k, v in m.weights().items()} for m in modules]


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_a_chain_of_mixed_kinds_is_the_loop_of_mathematics_md(count):
    x, modules = values((2, 4, 3, 5), 1), sites(count)
    expected = torch_expected.chain(x, in_numpy(modules), CONFIG)
    np.testing.assert_allclose(chain(torch.tensor(x), modules).detach().numpy(), expected, rtol=1e-11, atol=1e-12)


def test_gradients_of_every_weight_are_those_of_the_loop():
    """Central differences of the NumPy loop, along a random direction in each weight of each site and in x."""
    x, modules = values((2, 3, 3, 5), 1), sites(3)
    weight, step = values((2, 3, 5), 2), 1e-6
    given = torch.tensor(x, requires_grad=True)
    (chain(given, modules) * torch.tensor(weight)).sum().backward()
    plain = in_numpy(modules)

    def loss(x, weights):
        return (torch_expected.chain(x, weights, CONFIG) * weight).sum()

    def check(name, gradient, moved):
        direction = values(gradient.shape, 3)
        ahead, behind = (loss(*moved(sign * step * direction)) for sign in (1, -1))
        slope = (gradient.numpy() * direction).sum()
        np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=1e-5, atol=1e-7, err_msg=name)

    check("x", given.grad, lambda change: (x + change, plain))
    for index, module in enumerate(modules):
        for name, value in module.weights().items():

            def moved(change, index=index, name=name):
                return x, [{**w, name: w[name] + change} if i == index else w for i, w in enumerate(plain)]

            check(f"{name} of site {index}", value.grad, moved)


def test_the_first_site_learns_through_the_pre_that_it_hands_on():
    """Its projection of pre reaches the result by way of the next site alone."""
    x, (first, second) = torch.tensor(values((1, 2, 3, 5), 1)), sites(2)
    chain(x, (first, second)).sum().backward()
    assert first.get_parameter("pre_alpha").grad.abs().max() > 1e-4
    first.zero_grad()
    first(lambda u: u, dense, x, KINDS[1], carried=torch_impl.one_hot(x))[0].sum().backward()
    assert first.get_parameter("pre_alpha").grad is None or not first.get_parameter("pre_alpha").grad.any()


def test_gradients_of_x_and_of_the_carried_pre_are_those_of_finite_differences():
    x = torch.tensor(values((1, 2, 3, 5), 1), requires_grad=True)
    carried = torch.tensor(values((1, 2, 3), 2), requires_grad=True)
    modules = sites(2)
    assert torch.autograd.gradcheck(lambda x, carried: chain(x, modules, carried), (x, carried))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_carried_pre_stays_wide_whatever_x_is(dtype):
    x, (module,) = torch.tensor(values((2, 4, 3, 5), 1)).to(dtype), sites(1, dtype=torch.float32)
    carried = torch_impl.one_hot(x).requires_grad_()
    out, metadata = module(lambda u: u, experts, x, KINDS[2], carried=carried)
    assert set(metadata) == {"carried", "load_balance_loss", "moe_bias_updates"}
    assert out.dtype == dtype and metadata["carried"].dtype == torch.float32
    torch_impl.reduce(out, "carried", metadata["carried"]).float().sum().backward()
    gradient = carried.grad
    assert gradient is not None and gradient.dtype == torch.float32
    assert gradient.isfinite().all() and gradient.any()


def test_halves_equal_the_whole():
    x, (module,) = torch.tensor(values((2, 4, 3, 5), 1)), sites(1)
    carried = torch.tensor(values((2, 4, 3), 2))
    u, context, handed = module.pre(x, carried)
    out, metadata = module(lambda u: u, dense, x, KINDS[1], carried=carried)
    assert torch.equal(module.post(dense(u), context), out) and torch.equal(handed, metadata["carried"])
    assert torch.equal(handed, torch_impl.coefficients(x, module.weights(), CONFIG)[0])
    assert torch.equal(u, torch_impl.pre_mix(x, carried))


@pytest.mark.parametrize("lead", [(), (3,), (0, 4), (2, 1, 3)])
def test_one_hot_is_stream_0_in_the_dtype_that_is_carried(lead):
    for dtype, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        found = torch_impl.one_hot(torch.zeros(*lead, 3, 5, dtype=dtype))
        assert found.dtype == kept and found.shape == (*lead, 3)
        assert torch.equal(found, torch.tensor([1.0, 0.0, 0.0], dtype=kept).expand(*lead, 3))


def test_the_reduction_with_the_carried_pre_is_a_gated_sum_rounded_once():
    x, carried = values((2, 4, 3, 5), 1).astype(np.float32), values((2, 4, 3), 2).astype(np.float32)
    narrow = torch.tensor(x).bfloat16()
    found = torch_impl.reduce(narrow, "carried", torch.tensor(carried))
    exact = (carried[..., None].astype(np.float64) * narrow.double().numpy()).sum(-2)
    assert found.dtype == torch.bfloat16
    np.testing.assert_allclose(found.double().numpy(), exact, rtol=2**-8, atol=1e-6)
    assert torch.equal(torch_impl.reduce(narrow, "carried", torch_impl.one_hot(narrow)), narrow[..., 0, :])


X = torch.zeros(2, 4, 3, 5)
OWN = MHCConfig.from_dialect("deepseek-v4", streams=3, dim=5)


@pytest.mark.parametrize(
    "carried, said",
    [
        (None, r"carried must be the pre of the site before: one_hot\(x\) for the first site, got None"),
        (torch.zeros(2, 4, 4), r"carried must be \[2, 4, 3\], got \[2, 4, 4\]"),
        (torch.zeros(4, 3), r"carried must be \[2, 4, 3\], got \[4, 3\]"),
        (torch.zeros(2, 1, 3), r"carried must be \[2, 4, 3\], got \[2, 1, 3\]"),
        (torch.zeros(2, 4, 3).bfloat16(), "carried must be torch.float32 for x in torch.float32, got torch.bfloat16"),
        (torch.zeros(2, 4, 3).double(), "carried must be torch.float32 for x in torch.float32, got torch.float64"),
    ],
)
def test_a_carried_pre_that_cannot_be_is_refused(carried, said):
    (module,) = sites(1, dtype=torch.float32)
    for call in (
        lambda: module(lambda u: u, dense, X, KINDS[1], carried=carried),
        lambda: module.pre(X, carried),
        lambda: torch_impl.reduce(X, "carried", carried),
    ):
        with pytest.raises(ValueError, match=said):
            call()


def test_the_refusal_of_a_narrow_one_says_what_has_cast_it():
    (module,) = sites(1, dtype=torch.float32)
    with pytest.raises(ValueError) as raised:
        module.pre(X.bfloat16(), torch_impl.one_hot(X).bfloat16())
    said = str(raised.value)
    assert "MixedPrecisionPolicy has cast_forward_inputs=False and output_dtype=None" in said and "autocast" in said


def test_a_surplus_one_is_refused():
    own = ManifoldConstrainedHyperConnections(OWN)
    with pytest.raises(ValueError, match="carried goes with pre_from='previous' alone: this configuration reads with"):
        own(lambda u: u, dense, X, KINDS[1], carried=torch_impl.one_hot(X))
    with pytest.raises(ValueError, match="carried goes with how='carried' alone, got it with 'sum'"):
        torch_impl.reduce(X, "sum", torch_impl.one_hot(X))
    assert own.pre(X)[2] is None and "carried" not in own(lambda u: u, dense, X, KINDS[1])[1]
