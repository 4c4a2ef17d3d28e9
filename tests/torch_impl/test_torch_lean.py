"""The lean path is the plain one to rounding, under every transformation."""

from __future__ import annotations

import itertools

import pytest
import torch

import torch_impl
from torch_impl import MHCConfig, functional
from torch_impl.lean import mixing
from torch_impl.residual import permutations

LAYERS = {
    "columns first, no guard": {},
    "rows first, eps added": {"order": "rows-first", "guard": "add", "eps": 1e-3, "norm_weight": True},
    "softmax over the other axis": {"order": "rows-first", "softmax": "columns", "guard": "denominator", "eps": 1e-2},
    "from exp, clipped": {"softmax": "none", "guard": "clip", "eps": 0.3, "iterations": 3},
    "from exp, eps in the sums": {"softmax": "none", "guard": "denominator", "eps": 0.1, "mix": "in-out"},
    "limited": {"logit_limit": 0.5, "order": "rows-first", "iterations": 1},
    "norm over the root": {"norm_eps_position": "root", "norm_eps": 1e-2, "norm_weight": True},
    "permutations": {"residual": "permutations"},
    "identity": {"residual": "identity"},
    "single pass": {"pre_from": "previous", "pre_eps": 1e-3, "post_eps": 1e-3},
    "rounded mixing": {"mixing": "activation"},
}
N, DIM = 3, 5
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode imports it


def site(options, dtype=torch.float64):
    """Weights that are sharp enough for every limit and guard to be met, and x."""
    config = MHCConfig(streams=N, dim=DIM, **options)
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in functional.weight_shapes(config).items()
    }
    x = torch.randn(2, 3, N, DIM, generator=generator, dtype=torch.float64).to(dtype)
    carried = torch.rand(2, 3, N, generator=generator, dtype=torch.float64) if "pre_from" in options else None
    return config, weights, x, carried


def whole(config, backend):
    """A function of all tensors to everything that a site returns."""

    def function(x, carried, *weights):
        named = dict(zip(functional.weight_shapes(config), weights, strict=True))
        u, context, handed = torch_impl.pre(x, named, config, carried, backend=backend)
        out = torch_impl.post(u.tanh(), context)
        return (u, context.post, context.H, out) if handed is None else (u, context.post, context.H, out, handed)

    return function


def leaves(*tensors):
    return tuple(None if t is None else t.clone().requires_grad_() for t in tensors)


def total(outputs) -> torch.Tensor:
    """One number with another weight for each element."""
    parts = [o.double() * torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view(o.shape) for o in outputs]
    return torch.stack([part.sum() for part in parts]).sum()


def gradients(function, tensors, **options):
    kept = [t for t in tensors if t is not None]
    return torch.autograd.grad(total(function(*tensors)), kept, allow_unused=True, materialize_grads=True, **options)


def blocked(monkeypatch, tokens, dtype):
    """Blocks of so many tokens, however small x is."""
    monkeypatch.setattr(mixing, "BLOCK_BYTES", tokens * N * DIM * dtype.itemsize)
    monkeypatch.setattr(mixing, "WHOLE_BYTES", 0)
    monkeypatch.setattr("torch_impl.lean.balancing.BLOCK", tokens)


def assert_close(one, other, tolerance=1e-11):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_the_plain_path(name):
    config, weights, x, carried = site(LAYERS[name])
    lean, plain = whole(config, "lean"), whole(config, "plain")
    tensors = (x, carried, *weights.values())
    assert_close(lean(*tensors), plain(*tensors))
    assert_close(gradients(lean, leaves(*tensors)), gradients(plain, leaves(*tensors)))


ROUNDED = {
    "norm weight": {"norm_weight": True},
    "norm over the root, eps added": {"norm_eps_position": "root", "guard": "add", "eps": 1e-3},
    "permutations": {"residual": "permutations", "norm_weight": True},
    "identity": {"residual": "identity"},
    "passes too": {"matrix": "activation"},
}
"""Rows whose coefficients are rounded to a narrow x's dtype, and the normed streams before them."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("blocks", [1, 7])
@pytest.mark.parametrize("name", ROUNDED)
def test_coefficients_are_rounded_where_the_plain_path_rounds_them(name, blocks, dtype, monkeypatch):
    if blocks > 1:
        blocked(monkeypatch, 1, torch.float32)
    config, weights, x, _ = site({"coefficients": "activation", "mixing": "activation", **ROUNDED[name]}, torch.float32)
    tensors = (x.to(dtype), None, *weights.values())
    (one, first), (other, second) = (
        (function(*tensors), gradients(function, leaves(*tensors)))
        for function in (whole(config, "lean"), whole(config, "plain"))
    )
    spacing = torch.finfo(dtype).eps
    for actual, expected in zip((*one, *first), (*other, *second), strict=True):
        assert actual.dtype == expected.dtype
        largest = max(1.0, expected.abs().max().item())
        assert (actual.double() - expected.double()).abs().max() <= 4 * spacing * largest


@pytest.mark.parametrize("name", ["norm weight", "permutations"])
def test_rounded_coefficients_have_transformations_too(name):
    config, weights, x, _ = site({"coefficients": "activation", "mixing": "activation", **ROUNDED[name]}, torch.float32)
    lean, plain = (
        lambda x, backend=backend: whole(config, backend)(x, None, *weights.values()) for backend in ("lean", "plain")
    )
    x = x.bfloat16()
    assert_close(torch.func.vmap(lean)(x), plain(x), 0)
    assert_close(torch.func.jvp(lean, (x,), (x.cos(),))[1], torch.func.jvp(plain, (x,), (x.cos(),))[1], 2e-2)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_gradients_forward_mode_and_batches_are_those_of_the_plain_path(name):
    config, weights, x, carried = site(LAYERS[name])
    lean, plain = whole(config, "lean"), whole(config, "plain")
    tensors = (x, carried, *weights.values())

    def twice(function):
        given = leaves(*tensors)
        first = gradients(function, given, create_graph=True)
        again = [t for t in given if t is not None]
        return torch.autograd.grad(total(g.sin() for g in first), again, allow_unused=True, materialize_grads=True)

    assert_close(twice(lean), twice(plain), 1e-10)
    other = tuple(torch.linspace(-1, 1, w.numel(), dtype=w.dtype).view(w.shape) for w in weights.values())

    def pushed(function):
        return torch.func.jvp(lambda x, *w: function(x, carried, *w), (x, *weights.values()), (x.cos(), *other))[1]

    assert_close(pushed(lean), pushed(plain), 1e-10)
    one = lambda function: lambda x, carried: function(x, carried, *weights.values())  # noqa: E731
    dims = (0, None if carried is None else 0)
    assert_close(torch.func.vmap(one(lean), dims)(x, carried), lean(*tensors))

    def of_each(function):
        """The gradient of every row of a batch by itself."""
        summed = lambda x, carried: total(one(function)(x, carried))  # noqa: E731
        return (torch.func.vmap(torch.func.grad(summed), dims)(x, carried),)

    assert_close(of_each(lean), of_each(plain))


@pytest.mark.parametrize("name", [name for name in LAYERS if "residual" not in LAYERS[name]])
def test_a_matrix_alone_and_a_head_are_those_of_the_plain_path(name):
    config, _, x, _ = site(LAYERS[name])
    logits = torch.randn(2, 3, N, N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    matrix = lambda backend: lambda z: (torch_impl.residual_matrix(z, config, backend=backend),)  # noqa: E731
    assert_close(matrix("lean")(logits), matrix("plain")(logits))
    assert_close(gradients(matrix("lean"), leaves(logits)), gradients(matrix("plain"), leaves(logits)))
    assert torch.autograd.gradgradcheck(lambda z: matrix("lean")(z)[0], (logits[:1, :1].clone().requires_grad_(),))
    pushed = [torch.func.jvp(matrix(b), (logits,), (logits.cos(),))[1] for b in ("lean", "plain")]
    assert_close(pushed[0], pushed[1])
    head = {k: torch.randn(s, dtype=torch.float64) for k, s in functional.head_shapes(config).items()}
    reduced = [
        gradients(
            lambda x, *w, b=backend: (torch_impl.head(x, dict(zip(head, w, strict=True)), config, backend=b),),
            leaves(x, *head.values()),
        )
        for backend in ("lean", "plain")
    ]
    assert_close(reduced[0], reduced[1])


@pytest.mark.parametrize("stage", ["coefficients", "head"])
def test_a_site_without_u_and_a_head_under_transformations(stage):
    config, weights, x, _ = site({"guard": "add", "eps": 1e-3, "order": "rows-first"})
    if stage == "head":
        generator = torch.Generator().manual_seed(5)
        shapes = functional.head_shapes(config)
        weights = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}

    def of(backend):
        def function(x, *values):
            named = dict(zip(weights, values, strict=True))
            if stage == "head":
                return (torch_impl.head(x, named, config, backend=backend),)
            return torch_impl.coefficients(x, named, config, backend=backend)

        return function

    lean, plain = of("lean"), of("plain")
    tensors = (x, *weights.values())
    dims = (0, *(None for _ in weights))
    assert_close(torch.func.vmap(lean, dims)(*tensors), plain(*tensors))
    several = [torch.stack([w, w.cos()]) for w in weights.values()]
    each = [torch.func.vmap(f, (None, *(0 for _ in weights)))(x, *several) for f in (lean, plain)]
    assert_close(each[0], each[1])
    pushed = [torch.func.jvp(f, tensors, tuple(t.cos() for t in tensors))[1] for f in (lean, plain)]
    assert_close(pushed[0], pushed[1], 1e-10)
    twice = []
    for function in (lean, plain):
        given = tuple(t.clone().requires_grad_() for t in tensors)
        first = gradients(function, given, create_graph=True)
        twice.append(
            torch.autograd.grad(total(g.sin() for g in first), given, allow_unused=True, materialize_grads=True)
        )
    assert_close(twice[0], twice[1], 1e-10)


def test_forward_mode_of_autograd_and_hessians_agree():
    config, weights, x, _ = site({})
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x.cos())
        tangents = [
            torch.autograd.forward_ad.unpack_dual(whole(config, b)(dual, None, *weights.values())[3]).tangent
            for b in ("lean", "plain")
        ]
    assert_close(tangents[:1], tangents[1:], 1e-10)
    x = x[:1, :1]
    hessians = [
        torch.func.hessian(lambda x, b=b: total(whole(config, b)(x, None, *weights.values())))(x)
        for b in ("lean", "plain")
    ]
    assert_close(hessians[:1], hessians[1:], 1e-9)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0, 3), (2, 3, 2)])
def test_any_leading_shape(lead):
    config, weights, _, _ = site({})
    x = torch.randn(*lead, N, DIM, dtype=torch.float64)
    tensors = (x, None, *weights.values())
    assert_close(whole(config, "lean")(*tensors), whole(config, "plain")(*tensors))
    lean, plain = (gradients(whole(config, b), leaves(*tensors)) for b in ("lean", "plain"))
    assert_close(lean, plain)


def test_some_gradients_alone():
    config, weights, x, _ = site({"norm_weight": True})
    for asked in itertools.product((True, False), repeat=3):
        given = [
            t.clone().requires_grad_(a) for t, a in zip((x, *weights.values()), itertools.cycle(asked), strict=False)
        ]
        kept = [t for t in given if t.requires_grad]
        if kept:
            both = [
                torch.autograd.grad(total(whole(config, b)(given[0], None, *given[1:])), kept, allow_unused=True)
                for b in ("lean", "plain")
            ]
            assert_close(both[0], both[1])


def test_blocks_do_not_matter(monkeypatch):
    config, weights, x, _ = site({"guard": "clip", "eps": 0.3})
    tensors = (x, None, *weights.values())
    once = gradients(whole(config, "lean"), leaves(*tensors))
    alone = whole(config, "lean")(*tensors)
    blocked(monkeypatch, 4, torch.float64)
    assert_close(gradients(whole(config, "lean"), leaves(*tensors)), once)
    assert_close(whole(config, "lean")(*tensors), alone)
    assert_close(alone, whole(config, "plain")(*tensors))


def test_a_backend_that_cannot_be_had_is_refused():
    config, weights, x, _ = site({})
    with pytest.raises(ValueError, match=r"backend must be one of auto, plain, lean, triton, got 'fast'"):
        torch_impl.pre(x, weights, config, backend="fast")
    with pytest.raises(ValueError, match="doesn't go with this residual matrix"):
        torch_impl.residual_matrix(
            torch.zeros(1, 6), MHCConfig(streams=3, dim=1, residual="permutations"), backend="lean"
        )


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_the_matrices_of_permutations_are_those_of_itertools(n):
    config = MHCConfig(streams=n, dim=1, residual="permutations")
    orders = list(itertools.permutations(range(n)))
    for index, order in enumerate(orders):
        logits = torch.full((len(orders),), -torch.inf)
        logits[index] = 0.0
        expected = torch.zeros(n, n)
        expected[range(n), order] = 1.0
        assert torch.equal(permutations(logits, config), expected)
