"""The Triton kernels beside plain operators: on a GPU, or in Triton's interpreter (tests/conftest.py chooses)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import torch_impl
from tests.torch_impl.kernels import BASE, DEVICE, ROUNDING, assert_close, gates, run, site, values_and_gradients
from torch_impl import MHCConfig, functional
from torch_impl.crossing import post_pre
from torch_impl.fused import BackendError

pytest.importorskip("triton", reason="triton isn't installed: no kernel can be defined")

from torch_impl.kernels import launching, plans

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # forward mode imports it
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),  # the interpreter's NumPy
]
SITES: dict[str, dict[str, Any]] = {
    "paper": {},
    "guard add": {"guard": "add", "eps": 1e-6, "pre_eps": 1e-3, "post_eps": 1e-3},
    "guard denominator, rows first": {"guard": "denominator", "eps": 1e-3, "order": "rows-first"},
    "guard clip": {"guard": "clip", "eps": 0.3, "softmax": "none"},
    "softmax over the other axis": {"softmax": "rows", "order": "columns-first", "iterations": 3},
    "one iteration": {"iterations": 1},
    "logits limited": {"logit_limit": 1.0, "mix": "in-out"},
    "norm weight, eps at the root": {"norm_weight": True, "norm_eps_position": "root"},
    "rounded terms": {"mixing": "activation"},
    "single pass": {"pre_from": "previous"},
    "permutations": {"residual": "permutations"},
    "permutations, 3 streams": {"residual": "permutations", "streams": 3},
    "identity": {"residual": "identity"},
    **{f"{n} streams": {"streams": n, "guard": "add", "eps": 1e-6} for n in (1, 2, 3, 5, 6, 7, 8)},
    "a width of no power of two": {"dim": 131},
    "several chunks": {"dim": 2100},
}


@pytest.mark.parametrize("name", SITES)
def test_values_and_gradients_are_those_of_plain_operators(name: str):
    given = site(SITES[name])
    assert_close(values_and_gradients(*given, "triton"), values_and_gradients(*given, "plain"), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_streams_are_rounded_once(dtype: torch.dtype):
    given = site({"guard": "add", "eps": 1e-6}, dtype=dtype)
    actual, plain = (run(*given, backend) for backend in ("triton", "plain"))
    for name in ("u", "out"):
        spacing = torch.finfo(dtype).eps * plain[name].abs().float().clamp(min=1e-3)
        assert ((actual[name].float() - plain[name].float()).abs() <= spacing).all(), name


ROUNDED: dict[str, dict[str, Any]] = {
    "norm weight": {"norm_weight": True},
    "norm over the root, eps added": {"norm_eps_position": "root", "guard": "add", "eps": 1e-3},
    "permutations": {"residual": "permutations", "norm_weight": True},
    "identity, 5 streams": {"residual": "identity", "streams": 5},
    "several chunks": {"dim": 2100, "norm_weight": True},
}
"""Rows whose coefficients are rounded to a narrow x's dtype, and the normed streams before them."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ROUNDED)
def test_coefficients_are_rounded_where_plain_operators_round_them(name: str, dtype: torch.dtype):
    given = site({**ROUNDING, **ROUNDED[name]}, dtype=dtype)
    actual, plain = (values_and_gradients(*given, backend) for backend in ("triton", "plain"))
    for key, expected in plain.items():
        assert actual[key].dtype == expected.dtype
        largest = max(1.0, expected.abs().max().item())
        error = (actual[key].double() - expected.double()).abs().max().item()
        assert error <= 4 * torch.finfo(dtype).eps * largest, key


def test_from_a_site_to_one_with_a_rounded_norm():
    config, weights, x, _ = site({**ROUNDING, "norm_weight": True}, dtype=torch.bfloat16)
    results = []
    for backend in ("triton", "plain"):
        u, context, _ = torch_impl.pre(x, weights, config, backend=backend)
        results.append(post_pre(u, context, weights, config, backend=backend)[0].detach())
    torch.testing.assert_close(results[0], results[1], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("large", [False, True])
def test_blocks_of_a_gpu_and_of_the_interpreter_agree(monkeypatch: pytest.MonkeyPatch, large: bool):
    monkeypatch.setattr(launching, "blocks", lambda dim, columns, _: plans.blocks(dim, columns, large))
    given = site({"dim": 131, "guard": "add", "eps": 1e-6}, lead=(37,))
    assert_close(values_and_gradients(*given, "triton"), values_and_gradients(*given, "plain"), 1e-5)
    config, weights, x, _ = given
    results = []
    for backend in ("triton", "plain"):
        u, context, _ = torch_impl.pre(x, weights, config, backend=backend)
        results.append(post_pre(u, context, weights, config, backend=backend)[0].detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_a_tokens_bits_do_not_depend_on_how_many_there_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plans, "FEW", 20)  # so that the whole is split another way than its part
    config, weights, x, carried = site({"dim": 2100, "guard": "add", "eps": 1e-6}, lead=(40,))
    assert plans.split(2100, 40, 64).parts == 1 and plans.split(2100, 3, 64).parts > 1
    assert (plans.split(2100, 40, 64).size, plans.split(2100, 3, 64).size) == (1088, 1088)
    whole = run(config, weights, x, carried, "triton")
    few = run(config, weights, x[:3], carried, "triton")
    for name, value in few.items():
        assert torch.equal(value, whole[name][:3]), name
    given = torch.autograd.grad(whole["out"].sum(), x)[0][:3]
    part = x[:3].detach().requires_grad_()
    assert torch.equal(torch.autograd.grad(run(config, weights, part, carried, "triton")["out"].sum(), part)[0], given)


def test_sums_over_segments_of_tokens_are_added(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plans, "SEGMENT", 64)
    assert plans.segments_of(150) == (3, 64)
    assert plans.segments_of(1 << 20) == (32, 32768)
    given = site({"guard": "add", "eps": 1e-6}, lead=(150,))
    assert_close(values_and_gradients(*given, "triton"), values_and_gradients(*given, "plain"), 1e-5)


def test_head_and_residual_matrix():
    config = MHCConfig(**{**BASE, "guard": "add", "eps": 1e-6, "pre_eps": 1e-3})
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(shape, generator=generator).to(DEVICE).requires_grad_()
        for name, shape in functional.head_shapes(config).items()
    }
    x = torch.randn(3, 5, 4, 24, generator=generator).to(DEVICE).requires_grad_()
    logits = (4 * torch.randn(3, 5, 4, 4, generator=generator)).to(DEVICE).requires_grad_()
    for call, inputs in (
        (lambda backend: torch_impl.head(x, weights, config, backend=backend), (x, *weights.values())),
        (lambda backend: torch_impl.residual_matrix(logits, config, backend=backend), (logits,)),
    ):
        actual, plain = call("triton"), call("plain")
        torch.testing.assert_close(actual, plain, rtol=1e-5, atol=1e-6)
        cotangent = torch.randn(plain.shape, generator=generator).to(DEVICE)
        for one, other in zip(
            torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(plain, inputs, cotangent), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (1,), (2, 3, 5)])
def test_any_leading_shape(lead: tuple[int, ...]):
    given = site({}, lead=lead)
    assert_close(values_and_gradients(*given, "triton"), values_and_gradients(*given, "plain"), 1e-5)


@pytest.mark.parametrize("name", ["paper", "single pass", "identity", "rounded terms", "several chunks", "8 streams"])
def test_from_one_site_to_the_next(name: str):
    config, weights, x, carried = site(SITES[name])
    following = site(SITES[name])[1]
    results: dict[str, list[torch.Tensor]] = {}
    for backend in ("triton", "plain"):
        u, context, handed = torch_impl.pre(x, weights, config, carried, backend=backend)
        read, context, handed = post_pre((2 * u).sin(), context, following, config, handed, backend=backend)
        out = torch_impl.post(read.cos(), context)
        outputs = [read, context.x, context.post, out, *(() if handed is None else (handed,))]
        generator = torch.Generator().manual_seed(1)
        loss = torch.stack([(v * torch.randn(v.shape, generator=generator).to(DEVICE)).sum() for v in outputs]).sum()
        inputs = (x, *weights.values(), *following.values(), *(() if carried is None else (carried,)))
        results[backend] = [*(v.detach() for v in outputs), *torch.autograd.grad(loss, inputs)]
    for index, (actual, plain) in enumerate(zip(results["triton"], results["plain"], strict=True)):
        largest = max(1.0, plain.abs().max().item())
        assert (actual - plain).abs().max().item() <= 1e-4 * largest, index


@pytest.mark.parametrize("backend", ["triton", "lean"])
def test_what_is_mixed_broadcasts_to_x_or_is_refused(unchecked: None, backend: str):
    config, weights, x, _ = site({})
    one = x[0, 0].detach()
    for change in ({"y": one[0]}, {"post": torch.ones(9, 4, device=DEVICE)}, {"H": torch.ones(4, 4, device=DEVICE)}):
        given = {"y": x[..., 0, :], **dict(zip(("post", "H"), gates(4), strict=True)), **change}
        actual, plain = (
            torch_impl.post_mix(given["y"], x, given["post"], given["H"], config, backend=name)
            for name in (backend, "plain")
        )
        torch.testing.assert_close(actual, plain)
    for change in ({"y": x[:1, :3, 0]}, {"post": gates(3)[0]}, {"H": gates(3)[1]}):
        given = {"y": x[..., 0, :], **dict(zip(("post", "H"), gates(4), strict=True)), **change}
        with pytest.raises(RuntimeError, match="expanded size"):
            torch_impl.post_mix(given["y"], x, given["post"], given["H"], config, backend=backend)
    u, context, _ = torch_impl.pre(x, weights, config, backend="triton")
    actual, plain = (post_pre(u[0, 0], context, weights, config, backend=name)[0] for name in ("triton", "plain"))
    torch.testing.assert_close(actual, plain, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="expanded size"):
        post_pre(u[:1, :3], context, weights, config, backend="triton")


@pytest.mark.parametrize("n", [1, 3, 4, 7])
def test_infinite_and_missing_logits_come_out_where_the_formula_has_them(n: int):
    rows: list[dict[str, Any]] = [
        {},
        {"softmax": "none", "guard": "denominator", "eps": 1e-3},
        {"logit_limit": 2.0},
    ]
    for changes in rows:
        config = MHCConfig(streams=n, dim=4, **changes)
        logits = torch.randn(5, n, n, generator=torch.Generator().manual_seed(0))
        logits[0, 0, :] = -torch.inf
        logits[1, 0, 0], logits[2, 0, 0], logits[3, :, 0] = torch.nan, torch.inf, -torch.inf
        logits = logits.to(DEVICE).requires_grad_()
        results = []
        for backend in ("triton", "lean", "plain"):
            H = torch_impl.residual_matrix(logits, config, backend=backend)
            results.append([H.detach(), *torch.autograd.grad(H.square().sum(), logits)])
        for actual in results[:2]:
            for one, other in zip(actual, results[2], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_an_address_that_is_no_multiple_of_16_changes_no_bit():
    config, weights, x, carried = site({"guard": "add", "eps": 1e-6}, lead=(7,))
    shifted = torch.cat([x.new_zeros(1), x.detach().flatten()])[1:].view(x.shape)
    assert shifted.data_ptr() % 16
    for name, value in run(config, weights, shifted, carried, "triton").items():
        assert torch.equal(value, run(config, weights, x, carried, "triton")[name]), name


def test_kernels_are_launched_where_their_tensors_are(monkeypatch: pytest.MonkeyPatch):
    entered: list[torch.device] = []
    own = torch.cuda.device_of

    def device_of(value: torch.Tensor) -> Any:
        entered.append(value.device)
        return own(value)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    config, weights, x, carried = site({})
    run(config, weights, x, carried, "triton")
    assert entered == 3 * [x.device]  # the sums, the coefficients and u, the mixing


def test_gradients_of_some_inputs_alone():
    config, weights, x, carried = site({})
    for wanted in ([x], [weights["res_alpha"]], [weights["pre_beta"]]):
        actual, plain = (
            torch.autograd.grad(run(config, weights, x, carried, backend)["out"].square().sum(), wanted)
            for backend in ("triton", "plain")
        )
        torch.testing.assert_close(actual, plain, rtol=1e-4, atol=1e-4)


def test_second_derivatives_and_transforms():
    config, weights, x, carried = site({"iterations": 3}, lead=(3,))

    def loss(x: torch.Tensor, backend: str) -> torch.Tensor:
        return run(config, weights, x, carried, backend)["out"].square().sum()

    results = {}
    for backend in ("triton", "plain"):
        slope = torch.autograd.grad(loss(x, backend), x, create_graph=True)[0]
        results[backend] = [
            *torch.autograd.grad(slope.square().sum(), x),
            torch.func.grad(loss)(x, backend),
            torch.func.vmap(lambda one, backend=backend: loss(one, backend))(x),
            torch.func.jvp(lambda one, backend=backend: loss(one, backend), (x,), (torch.ones_like(x),))[1],
        ]
    for actual, plain in zip(results["triton"], results["plain"], strict=True):
        torch.testing.assert_close(actual, plain, rtol=1e-3, atol=1e-3 * plain.detach().abs().max().item())


def test_checkpoints_and_meta():
    config, weights, x, carried = site({"guard": "add", "eps": 1e-6})
    loss = lambda x: run(config, weights, x, carried, "triton")["out"].square().sum()  # noqa: E731
    again = checkpoint(loss, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again, x)[0], torch.autograd.grad(loss(x), x)[0])
    there = torch.empty(2, 3, 4, 24, device="meta", requires_grad=True)
    empty = {name: torch.empty_like(value, device="meta", requires_grad=True) for name, value in weights.items()}
    out = run(config, empty, there, None, "triton")["out"]
    assert out.is_meta and torch.autograd.grad(out.sum(), there)[0].shape == there.shape


def test_what_kernels_do_not_serve_is_refused_by_name():
    config, weights, x, _ = site({})
    wide = {name: value.double() for name, value in weights.items()}
    with pytest.raises(BackendError, match="float64: kernels take float32, bfloat16 and float16"):
        torch_impl.pre(x.double(), wide, config, backend="triton")
    narrow = MHCConfig(**{**BASE, **ROUNDING, "matrix": "activation"})
    with pytest.raises(BackendError, match="passes of Sinkhorn that are rounded to x's dtype"):
        torch_impl.pre(x.bfloat16(), weights, narrow, backend="triton")
    many = MHCConfig(streams=9, dim=4)
    with pytest.raises(BackendError, match="9 streams: kernels have at most 8"):
        torch_impl.residual_matrix(torch.zeros(1, 9, 9), many, backend="triton")
    permuted = MHCConfig(streams=5, dim=24, residual="permutations")
    with pytest.raises(BackendError, match="120 permutations: kernels have at most 64"):
        torch_impl.post_mix(x[..., 0, :], x.repeat(1, 1, 2, 1)[..., :5, :], *gates(5), permuted, backend="triton")
    away = {name: value.to("meta") for name, value in weights.items()}
    with pytest.raises(BackendError, match="tensors on meta beside x on"):
        torch_impl.pre(x, away, config, backend="triton")
    long = MHCConfig(streams=4, dim=4, iterations=513)
    with pytest.raises(BackendError, match="513 iterations: kernels have at most 512"):
        torch_impl.residual_matrix(torch.zeros(1, 4, 4), long, backend="triton")
