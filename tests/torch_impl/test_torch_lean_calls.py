"""What a call of the lean path costs: operators, what is kept for the way back, and when it is taken."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from benchmarks.sites.contenders import Ours, Written, drawn
from torch_impl import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections, MHCConfig, residual_matrix
from torch_impl.fused import transforms
from torch_impl.fused.site import Site
from torch_impl.lean import mixing

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode imports it


def test_few_tokens_are_one_block_and_many_are_several():
    x = torch.empty(0)
    assert [len(mixing.parts(tokens, 4 * 4096, x)) for tokens in (0, 1, 64, 65, 1024)] == [0, 1, 1, 3, 32]
    assert [len(mixing.parts(tokens, 4 * 4096, x, back=True)) for tokens in (32, 64)] == [1, 2]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 128), (torch.bfloat16, 136)])
@pytest.mark.parametrize("dim", [1280, 4096])
def test_a_forward_pass_of_64_tokens_dispatches_fewer_operators_than_the_layer_written_plainly(dim, dtype, most):
    """Such a call takes as long as its operators are many: a slice of all tokens counts like a sum."""
    weights = drawn(dim, "cpu")
    x = torch.randn(1, 64, 4, dim).to(dtype)
    ours, plainly = (dispatched(layer, x) for layer in (Ours(dim, weights, "auto"), Written(dim, weights)))
    assert ours <= most < plainly


def dispatched(module, x) -> int:
    """The operators of a call that aren't inside of another's, those that do nothing too."""
    with torch.no_grad():
        module(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            module(x)
    events = [event for event in profiler.events() or [] if event.name.startswith("aten::")]
    return sum(event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::") for event in events)


def layer(name="deepseek-v4", dtype=torch.float32, n=4, dim=64, backend="auto"):
    torch.manual_seed(0)
    config = MHCConfig.from_dialect(name, streams=n, dim=dim)
    return ManifoldConstrainedHyperConnections(config, dtype=dtype, backend=backend)


def run(module, x):
    return module(lambda u: u, lambda inputs: inputs.tanh(), x, HyperConnectionType.MLP_DENSE)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_beside_x_and_y_is_a_few_numbers_a_token(dtype):
    module, tokens, n, dim = layer(), 32, 4, 64
    x = torch.randn(tokens, 1, n, dim).to(dtype).requires_grad_()
    kept: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return value

    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        run(module, x)
    of_weights = (n * dim * (2 * n + n * n) + 2 * (2 * n + n * n)) * 4
    streams = x.numel() * x.element_size()
    numbers = 2 * n * n + 4 * n + 4
    allowed = streams + 2 * tokens * dim * x.element_size() + 4 * numbers * tokens + of_weights  # y and its tanh
    assert sum(size for pointer, size in kept.items() if pointer not in own) <= allowed
    assert all(size <= max(streams, of_weights) for size in kept.values()), "a wide copy of a narrow x is kept"


def test_autocast_checkpoints_and_meta():
    module = layer()
    x = torch.randn(2, 3, 4, 64, requires_grad=True)
    whole = run(module, x)
    plain = torch.autograd.grad(whole.square().sum(), x)[0]
    for reentrant in (True, False):
        x.grad = None  # the reentrant kind goes with backward alone
        checkpoint(run, module, x, use_reentrant=reentrant).square().sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(run(module, x), whole) and run(module, x).dtype == torch.float32
        assert torch.equal(torch.autograd.grad(run(module, x).square().sum(), x)[0], plain)
    empty = ManifoldConstrainedHyperConnections(module.config, device="meta")
    there = torch.empty(2, 3, 4, 64, device="meta", requires_grad=True)
    assert torch.autograd.grad(run(empty, there).sum(), there)[0].shape == there.shape
    mode = FakeTensorMode()
    fake = mode.from_tensor(x.detach())
    with mode:
        assert run(layer(), fake).shape == x.shape


@pytest.mark.parametrize("name", ["deepseek-v4", "mhc-lite"])
def test_autocast_rounds_no_matrix_and_no_tangent(name):
    config = MHCConfig.from_dialect(name, streams=3, dim=5)
    module, x, logits = layer(name, n=3, dim=5), torch.randn(2, 4, 3, 5), torch.randn(2, config.residual_columns)
    logits = logits.unflatten(-1, (3, 3)) if config.residual == "sinkhorn" else logits

    def results():
        pushed = torch.func.jvp(lambda x: run(module, x), (x,), (x,))
        curved = torch.func.hessian(lambda x: run(module, x).sum())(x)
        return residual_matrix(logits, config), *pushed, curved

    plain = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = results()
    for one, other in zip(plain, cast, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_default_is_lean_in_eager_calls_alone(monkeypatch):
    seen = []
    original = Site.apply
    monkeypatch.setattr(Site, "apply", lambda *a: (seen.append(1), original(*a))[1])
    module, x = layer(), torch.randn(2, 3, 4, 64)
    run(module, x)
    assert len(seen) == 1
    run(layer(backend="plain"), x)
    assert len(seen) == 1
    HyperHead(module.config)(x)
    assert len(seen) == 2


def test_without_derivatives_no_autograd_function_is_around_it(monkeypatch):
    module, x = layer(), torch.randn(2, 3, 4, 64)
    expected = run(module, x)
    seen = []
    original = Site.apply
    monkeypatch.setattr(Site, "apply", lambda *a: (seen.append(1), original(*a))[1])
    with torch.no_grad():
        assert torch.equal(run(module, x), expected) and not seen
        torch.testing.assert_close(torch.func.vmap(lambda one: run(module, one[None])[0])(x), expected)
        assert len(seen) == 1, "a transformation is under way"
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            pushed = torch.autograd.forward_ad.unpack_dual(run(module, dual)).tangent
        assert len(seen) == 2 and pushed is not None and pushed.abs().max() > 0
        # The private names that tell of it: without them every call goes through the function.
        assert transforms._in_functorch is torch._C._are_functorch_transforms_active
        monkeypatch.setattr(torch.autograd.forward_ad, "_current_level", 0)
        run(module, x)
        assert len(seen) == 3
        monkeypatch.delattr(torch.autograd.forward_ad, "_current_level")
        run(module, x)
        assert len(seen) == 4
