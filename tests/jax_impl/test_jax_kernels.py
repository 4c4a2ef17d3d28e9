"""The Pallas kernels, interpreted, against the plain path: values, all gradients, transformations, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

import jax_impl
from jax_impl import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections, MHCConfig, sharding
from jax_impl.kernels import blocks, hindrance
from jax_impl.kernels.reading import Small, pulled_operands
from tests.jax_impl.kernels import furthest, normal, pulled, site, weights

NEAR = {jnp.float32: 5e-5, jnp.bfloat16: 2e-2}
CASES = {
    "released": ("deepseek-v4", 4, 40, (2, 5), {}),
    "more tokens than a block": ("deepseek-v4", 4, 24, (131,), {}),
    "several chunks and a rest": ("deepseek-v4", 3, 1100, (2, 3), {}),
    "no leading axis": ("deepseek-v4", 4, 16, (), {}),
    "norm weight, out of the root": ("maxtext", 2, 16, (7,), {"norm_eps_position": "root", "norm_eps": 0.3}),
    "guard none, columns first, out-in": ("paper", 4, 130, (2, 3), {}),
    "guard clip": ("maxtext-v1", 4, 16, (5,), {}),
    "guard denominator, logits clipped": ("xing-4", 5, 16, (2, 2), {"coefficients": "float32"}),
    "terms rounded": ("glm-5", 4, 16, (3, 3), {}),
    "permutations": ("mhc-lite", 4, 16, (2, 3), {"coefficients": "float32", "mixing": "float32"}),
    "five streams permuted": ("mhc-lite", 5, 16, (2,), {"coefficients": "float32", "mixing": "float32"}),
    "identity": ("hunyuan-v4", 4, 16, (2, 3), {}),
    "single pass": ("deepseek-v4.1", 4, 16, (2, 3), {}),
    "single pass, more tokens than a block": ("deepseek-v4.1", 2, 16, (2, 67), {}),
    "one stream": ("deepseek-v4", 1, 16, (3,), {}),
    "six streams": ("deepseek-v4", 6, 16, (3,), {}),
    "seven streams": ("liger", 7, 16, (3,), {}),
    "eight streams": ("deepseek-v4", 8, 16, (3,), {}),
    "dim 1": ("deepseek-v4", 3, 1, (4,), {}),
}


def example(dialect, n, dim, lead, overrides, dtype=jnp.float32):
    config = MHCConfig.from_dialect(dialect, streams=n, dim=dim, **overrides)
    carried = jnp.abs(normal((*lead, n), 2)) if config.pre_from == "previous" else None
    return config, (normal((*lead, n, dim), 1, dtype), weights(config), carried)


@pytest.mark.parametrize("case", CASES)
def test_a_site_and_all_gradients_are_those_of_the_plain_path(case):
    config, arguments = example(*CASES[case])
    actual, expected = (pulled(jax.jit(site(config, backend)), arguments) for backend in ("pallas", "plain"))
    assert furthest(actual, expected) < NEAR[jnp.float32]


@pytest.mark.parametrize("case", ["released", "terms rounded", "identity", "single pass"])
def test_so_they_are_in_bfloat16(case):
    config, arguments = example(*CASES[case], dtype=jnp.bfloat16)
    actual, expected = (pulled(jax.jit(site(config, backend)), arguments) for backend in ("pallas", "plain"))
    assert furthest(actual, expected) < NEAR[jnp.bfloat16]


NARROW = {"coefficients": "activation", "mixing": "activation"}
ROUNDED = {
    "norm weight": ("maxtext", 4, 40, (2, 5), {}),
    "passes too, eps out of the root": ("megatron", 4, 40, (3,), {}),
    "permutations": ("mhc-lite", 4, 16, (2, 3), {}),
    "more tokens than a block, several chunks and a rest": ("maxtext", 2, 1100, (131,), {}),
    "five streams, logits clipped": ("xing-4", 5, 40, (2, 3), {}),
    "identity": ("hunyuan-v4", 5, 16, (7,), NARROW),
}
"""Rows whose coefficients are rounded to a narrow x's dtype, and the normed streams before them."""


@pytest.mark.parametrize("case", ROUNDED)
def test_coefficients_are_rounded_where_the_plain_path_rounds_them(case):
    config, arguments = example(*ROUNDED[case], dtype=jnp.bfloat16)
    actual, expected = (pulled(jax.jit(site(config, backend)), arguments) for backend in ("pallas", "plain"))
    if len(arguments[0]) > 100:  # so many roundings stay in a sum over tokens that cancels but for a hundredth
        for _, (_, of_weights, _) in (actual, expected):
            del of_weights["pre_alpha_scale"]
    # One rounding that flips is carried on by Sinkhorn where its passes are rounded too.
    assert furthest(actual, expected) < NEAR[jnp.bfloat16] * (3 if config.matrix == "activation" else 1)
    for backend in ("pallas", "plain"):
        pre, post, H = jax_impl.coefficients(*arguments[:2], config, backend=backend)
        assert pre.dtype == post.dtype == H.dtype == jnp.bfloat16


def test_rounded_coefficients_of_streams_that_are_not_finite_are_those_of_the_plain_path():
    config, (x, held, _) = example(*ROUNDED["norm weight"], dtype=jnp.bfloat16)
    x = x.at[0, 1, 2, 3].set(jnp.inf).at[1, 2, 0, 0].set(jnp.nan)
    actual, expected = (pulled(jax.jit(site(config, backend)), (x, held))[1][0] for backend in ("pallas", "plain"))
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    assert furthest(jnp.nan_to_num(actual), jnp.nan_to_num(expected)) < NEAR[jnp.bfloat16]


@pytest.mark.parametrize("case", ["released", "permutations", "identity"])
def test_coefficients_and_the_mixing_alone_are_those_of_the_plain_path(case):
    config, (x, held, _) = example(*CASES[case])
    y = normal((*x.shape[:-2], config.dim), 4)

    def both(backend):
        def run(x, y, held):
            pre, post, H = jax_impl.coefficients(x, held, config, backend=backend)
            return pre, post, H, jax_impl.post_mix(y, x, post, H, config, backend=backend)

        return pulled(jax.jit(run), (x, y, held))

    assert furthest(both("pallas"), both("plain")) < NEAR[jnp.float32]


def test_float32_is_served_where_float64_is_switched_on():
    with jax.enable_x64(True):
        config, arguments = example(*CASES["more tokens than a block"])
        actual, expected = (pulled(jax.jit(site(config, backend)), arguments) for backend in ("pallas", "plain"))
        assert furthest(actual, expected) < NEAR[jnp.float32]


def test_a_head_is_that_of_the_plain_path():
    config, (x, *_) = example("deepseek-v4", 4, 40, (3, 2), {"head_norm_eps": 0.2})
    held = weights(config, of_head=True)
    run = lambda backend: pulled(lambda x, w: jax_impl.head(x, w, config, backend=backend), (x, held))  # noqa: E731
    assert furthest(run("pallas"), run("plain")) < NEAR[jnp.float32]


def test_no_tokens_have_no_gradient():
    config, arguments = example("deepseek-v4", 4, 16, (0, 3), {})
    (out, u, _), (dx, of_weights, _) = pulled(site(config, "pallas"), arguments)
    assert out.shape == dx.shape == (0, 3, 4, 16) and u.shape == (0, 3, 16)
    assert all((value == 0).all() for value in of_weights.values())


def test_a_context_may_be_used_twice_and_its_x_elsewhere():
    config, (x, held, _) = example(*CASES["released"])

    def both(backend):
        def run(x, held):
            u, context, _ = jax_impl.pre(x, held, config, backend=backend)
            return jax_impl.post(u, context) + 2 * jax_impl.post(jnp.sin(u), context) + jnp.square(context.x)

        return pulled(run, (x, held))

    assert furthest(both("pallas"), both("plain")) < NEAR[jnp.float32]


def test_the_streams_gradient_alone_or_that_of_u_alone_is_whole():
    config, (x, held, _) = example(*CASES["released"])
    for pick in (0, 1):
        gradient = lambda backend, pick=pick: jax.grad(  # noqa: E731
            lambda x, held: jnp.sum(jnp.sin(site(config, backend)(x, held)[pick])), (0, 1)
        )(x, held)
        assert furthest(gradient("pallas"), gradient("plain")) < NEAR[jnp.float32]


@pytest.mark.parametrize("case", ["released", "identity", "single pass"])
def test_gradients_of_gradients_are_those_of_the_plain_path(case):
    config, (x, held, carried) = example(*CASES[case])
    direction = normal(x.shape, 9)

    def both(backend):
        run = site(config, backend)
        gradient = jax.grad(lambda x, held: jnp.sum(jnp.sin(run(x, held, carried)[0])), (0, 1))
        twice = jax.grad(lambda x: jnp.sum(gradient(x, held)[0] * direction))(x)
        forward = jax.jvp(lambda x: gradient(x, held), (x,), (direction,))[1]
        return twice, forward

    assert furthest(both("pallas"), both("plain")) < 1e-4


def test_forward_mode_is_refused_as_it_is_on_the_plain_path():
    config, (x, held, _) = example(*CASES["released"])
    for backend in ("plain", "pallas"):
        run = site(config, backend)
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(lambda x, run=run: run(x, held)[0], (x,), (x,))


def test_vmap_and_checkpoint_agree_with_plain_calls():
    config, (x, held, _) = example(*CASES["released"])
    run, of_weights = site(config, "pallas"), lambda run: jax.grad(lambda held: jnp.sum(jnp.sin(run(held))))
    whole = lambda held: run(x, held)[0]  # noqa: E731
    mapped = lambda held: jax.vmap(lambda x: run(x, held)[0])(x)  # noqa: E731
    kept = lambda held: jax.checkpoint(whole, policy=sharding.keep_coefficients)(held)  # noqa: E731
    for other in (mapped, kept):
        assert furthest(other(held), whole(held)) < 1e-6
        assert furthest(of_weights(other)(held), of_weights(whole)(held)) < NEAR[jnp.float32]


def test_a_checkpoint_keeps_what_the_policy_names_and_nothing_as_large_as_x(capsys):
    """Sums, post and H of 10 tokens; on the way back u is made again of x, and pre of the sums."""
    config, (x, held, _) = example(*CASES["released"])
    loss = jax.checkpoint(lambda x: jnp.sum(site(config, "pallas")(x, held)[0]), policy=sharding.keep_coefficients)
    print_saved_residuals(loss, x)
    made = [line for line in capsys.readouterr().out.splitlines() if "argument" not in line and "constant" not in line]
    assert sorted(line.split()[0] for line in made) == ["f32[25,2,5]", "f32[4,2,5]", "f32[4,4,2,5]"]


ALL_AXES = {"fsdp": 2, "sequence": 2, "tensor": 2}
MESHES = [
    *((ALL_AXES, explicit, case) for explicit in (False, True) for case in ("released", "identity", "single pass")),
    *((sizes, False, "norm weight") for sizes in ({"data": 2, "tensor": 4}, {"fsdp": 8}, ALL_AXES)),
    ({"data": 2, "tensor": 4}, False, "single pass"),
    ({"fsdp": 8}, True, "released"),
    (ALL_AXES, False, "rounded"),
    ({"data": 2, "tensor": 4}, True, "rounded"),
]


@pytest.mark.parametrize(("sizes", "explicit", "case"), MESHES, ids=str)
def test_on_a_mesh_it_computes_what_it_does_on_one_device(sizes, explicit, case):
    dialect = {"released": "deepseek-v4", "identity": "hunyuan-v4", "single pass": "deepseek-v4.1"}.get(case, "maxtext")
    config = MHCConfig.from_dialect(dialect, streams=4, dim=16)
    dtype = jnp.bfloat16 if case == "rounded" else jnp.float32
    x, cotangent = (np.asarray(normal((8, 4, 4, 16), seed, dtype)) for seed in (1, 2))

    def loss(module, x, cotangent):
        carried = module.one_hot(x) if config.pre_from == "previous" else None
        out, _ = module(jnp.tanh, lambda inputs: inputs, x, HyperConnectionType.MLP_DENSE, carried=carried)
        return jnp.sum(out * cotangent)

    def layer(backend):
        module = ManifoldConstrainedHyperConnections(config, rngs=nnx.Rngs(0), backend=backend)
        module.assign({name: 30 * value for name, value in module.weights().items() if name.endswith("_scale")})
        return module

    gradient = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1)))
    expected = gradient(layer("plain"), jnp.asarray(x), jnp.asarray(cotangent))
    mesh = sharding.make_mesh(**sizes, explicit=explicit)
    module = sharding.create(lambda: layer("pallas"), mesh)
    with sharding.use(mesh):
        actual = gradient(module, sharding.shard(x, mesh), sharding.shard(cotangent, mesh))
    assert furthest(jax.tree.leaves(actual), jax.tree.leaves(expected)) < NEAR[dtype]


@pytest.mark.parametrize("mix", ["in-out", "out-in"])
def test_on_a_mesh_coefficients_and_the_mixing_alone_are_those_of_one_device(mix):
    config = MHCConfig.from_dialect("deepseek-v4", streams=4, dim=16, mix=mix)
    x, y, held = normal((4, 2, 4, 16), 1), normal((4, 2, 16), 2), weights(config)

    def run(x, y, held):
        options = {"shards": sharding.current(), "backend": "pallas"}
        pre, post, H = jax_impl.coefficients(x, held, config, **options)
        return pre, jax_impl.post_mix(y, x, post, H, config, **options)

    expected = pulled(jax.jit(run), (x, y, held))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with sharding.use(mesh):
        actual = pulled(jax.jit(run), (sharding.shard(x, mesh), sharding.shard(y, mesh), held))
    assert furthest(actual, expected) < NEAR[jnp.float32]


def test_parameters_may_lie_on_an_axis_that_has_no_tokens():
    config = MHCConfig.from_dialect("deepseek-v4", streams=4, dim=16)
    rules = (("activation_batch", "data"), ("activation_embed", "tensor"), ("embed", ("tensor", "fsdp")))
    x = np.asarray(normal((4, 2, 4, 16), 1))
    make = lambda backend: HyperHead(config, rngs=nnx.Rngs(0), backend=backend)  # noqa: E731
    gradient = nnx.jit(nnx.value_and_grad(lambda head, x: jnp.sum(jnp.sin(head(x))), argnums=(0, 1)))
    expected = gradient(make("plain"), jnp.asarray(x))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    head = sharding.create(lambda: make("pallas"), mesh, rules)
    with sharding.use(mesh, rules):
        actual = gradient(head, sharding.shard(x, mesh, rules))
    assert furthest(jax.tree.leaves(actual), jax.tree.leaves(expected)) < NEAR[jnp.float32]


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_on_a_mesh_a_head_is_that_of_one_device(explicit):
    config = MHCConfig.from_dialect("deepseek-v4", streams=4, dim=16)
    x = np.asarray(normal((8, 4, 4, 16), 1))
    make = lambda backend: HyperHead(config, rngs=nnx.Rngs(0), backend=backend)  # noqa: E731
    gradient = nnx.jit(nnx.value_and_grad(lambda head, x: jnp.sum(jnp.sin(head(x))), argnums=(0, 1)))
    expected = gradient(make("plain"), jnp.asarray(x))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, explicit=explicit)
    head = sharding.create(lambda: make("pallas"), mesh)
    with sharding.use(mesh):
        actual = gradient(head, sharding.shard(x, mesh))
    assert furthest(jax.tree.leaves(actual), jax.tree.leaves(expected)) < NEAR[jnp.float32]


def test_what_the_kernels_do_not_serve_is_refused_with_the_reason(unchecked):
    config, (x, held, _) = example(*CASES["released"])
    run = lambda x=x, config=config, **kwargs: jax_impl.pre(x, held, config, backend="pallas", **kwargs)  # noqa: E731
    with pytest.raises(ValueError, match=r"backend must be one of auto, plain, pallas, got 'palas'"):
        jax_impl.pre(x, held, config, backend="palas")
    with pytest.raises(
        ValueError, match=r"backend='pallas' doesn't go with x in float16, only with bfloat16 and float32"
    ):
        run(x.astype(jnp.float16))
    with jax.enable_x64(True), pytest.raises(ValueError, match="x in float64"):
        run(x.astype(jnp.float64))
    wide = MHCConfig(streams=9, dim=2)
    with pytest.raises(ValueError, match="9 streams, only with up to 8"):
        jax_impl.coefficients(normal((2, 9, 2), 1), weights(wide), wide, backend="pallas")
    with pytest.raises(ValueError, match="precision=HIGH, only with HIGHEST and DEFAULT"):
        run(precision=jax.lax.Precision.HIGH)
    with (
        jax.set_mesh(jax.make_mesh((8,), ("data",))),
        pytest.raises(ValueError, match=r"a mesh \(data\) without shards"),
    ):
        run()
    u, context, _ = run()
    with pytest.raises(ValueError, match="y in float16"):
        jax_impl.post(u.astype(jnp.float16), context)


def test_streams_that_do_not_fit_are_refused_before_anything_is_computed():
    config = MHCConfig.from_dialect("deepseek-v4", streams=8, dim=8192)
    with pytest.raises(ValueError, match=r"8 tokens need \d+ MiB of the 40 MiB of vector memory .* share dim out"):
        jax.eval_shape(
            lambda x, w: jax_impl.pre(x, w, config, backend="pallas"), normal((2, 8, 8192), 1), weights(config)
        )


@pytest.mark.parametrize("dim", [1280, 2048, 4096, 7168])
def test_a_block_of_four_streams_has_tokens_at_every_width(dim):
    inputs, outputs = pulled_operands(
        blocks.Operand((16384, 4, dim), jnp.bfloat16), 24, Small(4, 24, True, True, True), True
    )
    assert blocks.block([*inputs.values(), *outputs.values()]) >= 32


def test_auto_is_the_plain_path_as_yet():
    config, (x, held, _) = example(*CASES["released"])
    programs = {backend: str(jax.make_jaxpr(site(config, backend))(x, held)) for backend in ("auto", "plain", "pallas")}
    assert "pallas_call" in programs["pallas"]
    assert "pallas_call" not in programs["auto"] and "pallas_call" not in programs["plain"]
    assert hindrance(config, None, x=x) == ""
