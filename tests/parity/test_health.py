"""The health of sites: against NumPy, one program without a look at a value, and what each figure says."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

CONFIGS = {
    "in-out": ("deepseek-v4", {}),
    "out-in": ("liger", {}),
    "permutations": ("mhc-lite", {}),
    "identity": ("hunyuan-v4", {"post_scale": 1.5}),
}
N, DIM = 3, 5


@pytest.fixture(params=CONFIGS)
def config(request, backend):
    name, overrides = CONFIGS[request.param]
    return backend.package.MHCConfig.from_dialect(name, streams=N, dim=DIM, **overrides)


def made(config, seed=0, lead=(2, 4)):
    """Numbers that coefficients could be, and are not doubly stochastic: every axis then has figures of its own."""
    generator = np.random.default_rng(seed)
    sigmoids = generator.uniform(size=(2, *lead, N)) ** 4
    sigmoids[0, ..., 0], sigmoids[1, ..., 1] = 1e-4, 1 - 1e-4
    H = generator.uniform(0, 1, (*lead, N, N)) ** 2
    if config.residual == "identity":
        H = np.broadcast_to(np.eye(N), H.shape)
    x = generator.standard_normal((*lead, N, DIM)) * [[1.0], [3.0], [0.1]]
    return sigmoids[0] + config.pre_eps, config.post_scale * sigmoids[1] + config.post_eps, H, x


def given(backend, config, dtype="float64", **options):
    pre, post, H, x = (backend.array(value, dtype) for value in made(config, **options))
    return pre, post, H, x


def scalars(config):
    return {f"{kind}_alpha_scale": [value] for kind, value in (("pre", 0.5), ("post", 2.0), ("res", -1.0))
            if kind != "res" or config.residual != "identity"}  # fmt: skip


def mixing(H, config):
    return H.swapaxes(-1, -2) if config.mix == "out-in" else H


def naive_gains(M):
    """A token at a time, by the definitions of docs/health.md."""
    rows = []
    for m in M.reshape(-1, N, N):
        into = [sum(m[i, j] for i in range(N)) for j in range(N)]
        outof = [sum(m[i, j] for j in range(N)) for i in range(N)]
        off = max(abs(value - 1) for value in (*into, *outof))
        rows.append((into, outof, max(map(abs, into)), max(map(abs, outof)), off))
    return [np.mean([row[k] for row in rows], 0) for k in range(5)]


def naive_matrix(M):
    rows = []
    for m in M.reshape(-1, N, N):
        entries = list(itertools.product(range(N), repeat=2))
        entropy = -sum(m[e] * math.log(m[e]) for e in entries if m[e]) / (N * math.log(N))
        permutation = 1 - sum(max(m[i, j] for i in range(N)) for j in range(N)) / N
        uniform = sum(abs(m[e] - 1 / N) for e in entries) / N / 2
        identity = sum(abs(m[e] - (e[0] == e[1])) for e in entries) / N / 2
        rows.append((entropy, permutation, uniform, identity))
    return [np.mean([row[k] for row in rows]) for k in range(4)]


def naive_gates(gate, scale, eps):
    s = ((gate - eps) / scale).reshape(-1, N)
    return [s.mean(0), (s < 1e-3).mean(0), (s > 1 - 1e-3).mean(0), np.sqrt(s.var(0).mean())]


def close(backend, actual, expected):
    assert len(actual) == len(expected)
    for value, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(backend.numpy(value), wanted, rtol=1e-12, atol=1e-12)


def test_every_figure_is_the_definitions(backend, float64, config):
    pre, post, H, x = made(config)
    weights = {name: backend.array(value, "float64") for name, value in scalars(config).items()}
    arrays = given(backend, config)
    health = backend.package.site_health(*arrays[:3], config, arrays[3], weights)
    M = mixing(H, config)
    close(backend, health.gains, naive_gains(M))
    close(backend, [health.entropy, health.from_permutation, health.from_uniform, health.from_identity],
          naive_matrix(M))  # fmt: skip
    close(backend, [health.spread], [np.sqrt(H.reshape(-1, N, N).var(0).mean())])
    close(backend, health.pre, naive_gates(pre, 1, config.pre_eps))
    close(backend, health.post, naive_gates(post, config.post_scale, config.post_eps))
    squares = (x**2).sum(-1).reshape(-1, N)
    close(backend, [health.share], [(squares / squares.sum(-1, keepdims=True)).mean(0)])
    close(backend, [health.alpha], [[value for (value,) in scalars(config).values()]])


def test_the_composite_multiplies_in_the_order_of_the_sites(backend, float64, config):
    stacks = [made(config, seed) for seed in range(3)]
    sites = [given(backend, config, seed=seed)[:3] for seed in range(3)]
    health = backend.package.stack_health(sites, config, xs=[given(backend, config, seed=s)[3] for s in range(3)])
    product = np.eye(N)
    for index, (pre, _, H, _) in enumerate(stacks):
        product = product @ mixing(H, config)
        close(backend, [field[index] for field in health.composite], naive_gains(product))
        alone = backend.package.site_health(*sites[index], config)
        close(backend, [health.sites.entropy[index]], [backend.numpy(alone.entropy)])
        close(backend, [health.sites.pre.mean[index]], [(pre - config.pre_eps).reshape(-1, N).mean(0)])
    assert health.sites.share.shape == (3, N) and health.sites.alpha is None


@pytest.mark.parametrize("lead", [(), (1,), (2, 1, 3)])
def test_tokens_may_lie_on_any_axes(backend, float64, config, lead):
    health = backend.package.site_health(*given(backend, config, lead=lead)[:3], config)
    close(backend, health.gains, naive_gains(mixing(made(config, lead=lead)[2], config)))


def test_without_tokens_a_mean_is_not_a_number(backend, config):
    health = backend.package.site_health(*given(backend, config, "float32", lead=(0,))[:3], config)
    assert np.isnan(backend.numpy(health.gains.forward)) and np.isnan(backend.numpy(health.entropy))


def test_what_is_not_finite_shows(backend, float64, config):
    if config.residual == "identity":
        pytest.skip("an identity has no entry that could be anything else")
    pre, post, H, _ = made(config)
    H, pre = H.copy(), pre.copy()
    H[0, 0, 1, 2] = pre[0, 0, 1] = np.nan
    health = backend.package.site_health(*(backend.array(v, "float64") for v in (pre, post, H)), config)
    for value in (health.gains.forward, health.gains.off, health.entropy, health.from_permutation, health.spread):
        assert np.isnan(backend.numpy(value))
    assert np.isnan(backend.numpy(health.pre.mean)).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_figures_of_narrow_coefficients_are_float32(backend, config, dtype):
    arrays = given(backend, config, dtype)
    health = backend.package.site_health(*arrays[:3], config, arrays[3])
    values = [*health.gains, health.entropy, health.spread, *health.pre, *health.post, health.share]
    assert {backend.dtype(value) for value in values} == {"float32"}


CORNERS = [
    ("permutation", np.eye(N)[[1, 2, 0]], (0, 0, 2 / 3, 1)),
    ("uniform", np.full((N, N), 1 / N), (1, 2 / 3, 0, 2 / 3)),
    ("identity", np.eye(N), (0, 0, 2 / 3, 0)),
]


@pytest.mark.parametrize(("name", "H", "expected"), CORNERS, ids=[name for name, *_ in CORNERS])
def test_corners_of_the_doubly_stochastic_matrices(backend, float64, name, H, expected):
    config = backend.package.MHCConfig(streams=N, dim=DIM)
    gates = backend.array(np.full((4, N), 0.5), "float64")
    health = backend.package.site_health(gates, gates, backend.array(np.tile(H, (4, 1, 1)), "float64"), config)
    close(backend, [health.entropy, health.from_permutation, health.from_uniform, health.from_identity], expected)
    close(backend, [health.gains.forward, health.gains.backward, health.gains.off, health.spread], [1, 1, 0, 0])


def test_one_stream_has_no_entropy(backend):
    config = backend.package.MHCConfig(streams=1, dim=DIM)
    ones = backend.array(np.ones((4, 1)))
    health = backend.package.site_health(ones, ones, backend.array(np.ones((4, 1, 1))), config)
    assert backend.numpy(health.entropy) == 0 and backend.numpy(health.from_permutation) == 0


SIDES = {
    "paper": "backward", "deepseek-v4": "backward", "maxtext-v1": "backward", "transformer-engine": "backward",
    "liger": "forward", "megatron": "forward", "xing-4": "forward", "mhc-lite": "neither", "hunyuan-v4": "neither",
}  # fmt: skip


@pytest.mark.parametrize("name", SIDES)
def test_the_side_that_drifts_is_the_one_that_does(backend, float64, name):
    """Sharp logits, which no dialect's iterations balance: one side stays at 1, the named one doesn't."""
    config = backend.package.MHCConfig.from_dialect(name, streams=4, dim=DIM)
    assert backend.package.drifting(config) == SIDES[name]
    if config.residual != "sinkhorn":
        return
    logits = 6 * np.random.default_rng(1).standard_normal((50, 4, 4))
    from importlib import import_module

    matrix = import_module(f"{backend.package.__name__}.residual").residual_matrix
    gains = backend.package.gains(backend.package.composite(matrix(backend.array(logits, "float64"), config), config))
    off = {side: np.abs(backend.numpy(getattr(gains, f"{side}_sums")) - 1).max() for side in ("forward", "backward")}
    other = {"forward": "backward", "backward": "forward"}[SIDES[name]]
    assert off[SIDES[name]] > 1e-3 and off[other] < 1e-4


def test_the_layers_own_coefficients_are_healthy(backend, float64):
    """The initial values: H is uniform, pre is a half and post is 1, for every token alike."""
    config = backend.package.MHCConfig(streams=4, dim=8)
    layer = backend.layer(config, "float64")
    x = backend.array(np.random.default_rng(0).standard_normal((2, 3, 4, 8)), "float64")
    weights = layer.weights()
    health = backend.package.site_health(*backend.package.coefficients(x, weights, config), config, x, weights)
    close(backend, [health.gains.forward, health.gains.backward], [1, 1])
    np.testing.assert_allclose(backend.numpy(health.pre.mean), 0.5, atol=0.02)
    np.testing.assert_allclose(backend.numpy(health.post.mean), 0.5, atol=0.02)
    assert backend.numpy(health.from_uniform) < 0.02 and (backend.numpy(health.alpha) == 0.01).all()


def test_arguments_of_another_shape_are_told(backend, unchecked, config):
    pre, post, H, x = given(backend, config, "float32")
    health = backend.package.site_health
    with pytest.raises(ValueError, match=r"pre must end in \[3\], got \[2, 4, 2\]"):
        health(pre[..., :2], post, H, config)
    with pytest.raises(ValueError, match=r"post must end in \[3\]"):
        health(pre, post[..., :2], H, config)
    with pytest.raises(ValueError, match=r"H must end in \[3, 3\]"):
        health(pre, post, H[..., :2], config)
    with pytest.raises(ValueError, match=r"x must end in \[3, 5\]"):
        health(pre, post, H, config, x[..., :2])
    with pytest.raises(ValueError, match="sites must be at least one, got none"):
        backend.package.stack_health([], config)
    with pytest.raises(ValueError, match="xs must be one for each of 1 sites, got 2"):
        backend.package.stack_health([(pre, post, H)], config, xs=[x, x])


def test_it_is_one_program_that_waits_for_nothing(backend, unchecked, config):
    """Values can't be looked at while a program is made, nor where tensors have none; no gradient comes back."""
    pre, post, H, x = given(backend, config, "float32")

    def logged(scale):
        return backend.package.stack_health([(pre, post, scale * H)] * 2, config, xs=[x, x])

    name = backend.package.__name__
    one = backend.array(1.0)
    if name == "jax_impl":
        import jax

        compiled = jax.jit(logged)(one)
        slope = jax.grad(lambda scale: logged(scale).composite.backward.sum())(one)
        assert float(slope) == 0
    else:
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        compiled = torch.compile(logged, fullgraph=True, backend="eager")(one)
        assert not logged(one.requires_grad_()).composite.backward.requires_grad
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert logged(torch.ones(())).composite.forward.shape == (2,)
    plain = logged(one)
    for got, wanted in (
        (compiled.composite.backward, plain.composite.backward),
        (compiled.sites.share, plain.sites.share),
    ):
        np.testing.assert_allclose(backend.numpy(got), backend.numpy(wanted), rtol=1e-6)
