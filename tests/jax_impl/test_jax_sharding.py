"""The layer on eight virtual devices against one, in float64: layouts, axis types, layers in a scan, errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_impl import (
    HyperConnectionType,
    HyperHead,
    ManifoldConstrainedHyperConnections,
    MHCConfig,
    one_hot,
    reduce,
    sharding,
)
from jax_impl.functional import head_shapes, weight_shapes
from tests.jax_impl.sharded import DIM, LAYERS, STREAMS, Block, Stack, difference, example, layer, randomised

MESHES = [
    {"data": 8},
    {"sequence": 8},
    {"fsdp": 8},
    {"tensor": 8},
    {"data": 2, "tensor": 4},
    {"fsdp": 4, "tensor": 2},
    {"data": 2, "fsdp": 2, "sequence": 2},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
]
DIALECTS = ("deepseek-v4", "deepseek-v4.1", "paper", "maxtext", "megatron", "xing-4", "mhc-lite", "hunyuan-v4")


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def loss(module: Any, x: Any, weight: Any) -> Any:
    if isinstance(module, HyperHead):
        return jnp.sum(jnp.sin(module(x)) * weight[..., 0, :])
    carried = module.one_hot(x) if module.config.pre_from == "previous" else None
    out, _ = module(jnp.tanh, lambda inputs: jnp.sin(inputs), x, HyperConnectionType.MLP_DENSE, carried=carried)
    return jnp.sum(out * weight)


CASES = [
    *((sizes, False, ("maxtext",)) for sizes in MESHES),
    ({"data": 2, "tensor": 4}, False, DIALECTS),
    ({"fsdp": 2, "sequence": 2, "tensor": 2}, True, ("maxtext", "deepseek-v4", "deepseek-v4.1")),
]


@pytest.mark.parametrize(("sizes", "explicit", "dialects"), CASES, ids=str)
def test_outputs_and_gradients_are_those_of_one_device(sizes, explicit, dialects):
    mesh = sharding.make_mesh(**sizes, explicit=explicit)
    x, weight = example(), example(1)
    gradient = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1)))
    for dialect in dialects:
        config = MHCConfig.from_dialect(dialect, streams=STREAMS, dim=DIM)
        expected = gradient(randomised(layer(config)), jnp.asarray(x), jnp.asarray(weight))
        module = randomised(sharding.create(lambda config=config: layer(config), mesh))
        with sharding.use(mesh):
            actual = gradient(module, sharding.shard(x, mesh), sharding.shard(weight, mesh))
        assert difference(actual, expected) < 1e-11, dialect
        for (path, value), (_, held) in zip(
            nnx.to_flat_state(actual[1][0]), nnx.to_flat_state(nnx.state(module)), strict=True
        ):
            same = value.get_value().sharding.is_equivalent_to(held.get_value().sharding, value.get_value().ndim)
            assert same, f"the gradient of {path} lies elsewhere than it"


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_a_head_is_that_of_one_device(explicit):
    config = MHCConfig.from_dialect("deepseek-v4", streams=STREAMS, dim=DIM)
    make = lambda: HyperHead(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)  # noqa: E731
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, explicit=explicit)
    gradient = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1)))
    x, weight = example(), example(1)
    expected = gradient(randomised(make()), jnp.asarray(x), jnp.asarray(weight))
    module = randomised(sharding.create(make, mesh))
    with sharding.use(mesh):
        actual = gradient(module, sharding.shard(x, mesh), sharding.shard(weight, mesh))
    assert difference(actual, expected) < 1e-11


def stack_loss(module: Any, x: Any, weight: Any) -> Any:
    return jnp.sum(module(x) * weight)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_layers_in_a_scan_are_made_and_run_in_their_shards(explicit):
    gradient = nnx.jit(nnx.value_and_grad(stack_loss, argnums=(0, 1)))
    x, weight = example() / 8, example(1)
    whole = Stack(nnx.Rngs(0))
    expected = gradient(whole, jnp.asarray(x), jnp.asarray(weight))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, explicit=explicit)
    stack = sharding.create(lambda: Stack(nnx.Rngs(0)), mesh)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), nnx.state(whole), nnx.state(stack))
    assert all(jax.tree.leaves(same)), "initial values depend on the mesh"
    held = stack.blocks.attention.pre_alpha[...]
    assert held.sharding.spec[:3] == (None, None, ("tensor", "fsdp"))
    assert {shard.data.shape for shard in held.addressable_shards} == {(LAYERS, STREAMS, DIM // 4, STREAMS)}
    with sharding.use(mesh):
        actual = gradient(stack, sharding.shard(x, mesh), sharding.shard(weight, mesh))
    assert difference(actual, expected) < 1e-10


class SinglePass(nnx.Module):
    """Two single-pass sites: the second reads with the first one's pre, and hands its own on."""

    def __init__(self, rngs: nnx.Rngs):
        config = MHCConfig.from_dialect("deepseek-v4.1", streams=STREAMS, dim=DIM)
        self.attention = ManifoldConstrainedHyperConnections(config, rngs=rngs, param_dtype=jnp.float64)
        self.experts = ManifoldConstrainedHyperConnections(config, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x: Any, carried: Any) -> tuple[Any, Any]:
        both = lambda inputs_q, inputs_kv: (jnp.tanh(inputs_q + inputs_kv), None)  # noqa: E731
        moe = lambda inputs: (jnp.sin(inputs), None, None)  # noqa: E731
        x, metadata = self.attention(lambda u: u, both, x, HyperConnectionType.ATTENTION, carried=carried)
        x, metadata = self.experts(jnp.tanh, moe, x, HyperConnectionType.MLP_MOE, carried=metadata["carried"])
        return x, metadata["carried"]


def chain_loss(module: Any, x: Any, carried: Any, weight: Any) -> Any:
    x, carried = module(x, carried)
    return jnp.sum(jnp.sin(reduce(x, "carried", carried, shards=sharding.current())) * weight[..., 0, :])


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "sizes",
    [{"tensor": 8}, {"data": 2, "tensor": 4}, {"fsdp": 4, "tensor": 2}, {"fsdp": 2, "sequence": 2, "tensor": 2}],
)
def test_the_carried_pre_crosses_sites(sizes, explicit):
    """Each site's gradients are those of a chain on one device, and so is that of the carried it starts with."""
    gradient = nnx.jit(nnx.value_and_grad(chain_loss, argnums=(0, 1, 2)))
    x, weight, carried = example() / 4, example(1), example(2)[..., 0]
    expected = gradient(randomised(SinglePass(nnx.Rngs(0))), *(jnp.asarray(v) for v in (x, carried, weight)))
    mesh = sharding.make_mesh(**sizes, explicit=explicit)
    chain = randomised(sharding.create(lambda: SinglePass(nnx.Rngs(0)), mesh))
    with sharding.use(mesh):
        first = sharding.shard(carried, mesh, gates=True)
        actual = gradient(chain, sharding.shard(x, mesh), first, sharding.shard(weight, mesh))
    assert difference(actual, expected) < 1e-10
    assert float(jnp.abs(expected[1][2]).max()) > 1e-3
    held = actual[1][2].sharding
    assert held.is_equivalent_to(first.sharding, 3), f"the gradient of the carried pre lies on {held}"


class SinglePassStack(nnx.Module):
    """Single-pass blocks in a scan whose carry is the streams and the pre, recomputed on the way back."""

    def __init__(self, rngs: nnx.Rngs):
        split = nnx.split_rngs(splits=LAYERS)
        self.blocks = split(nnx.vmap(SinglePass, transform_metadata={nnx.PARTITION_NAME: "layers"}))(rngs)

    def __call__(self, x: Any, carried: Any) -> tuple[Any, Any]:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, transform_metadata={nnx.PARTITION_NAME: "layers"})
        @nnx.remat(policy=sharding.keep_coefficients)
        def layers(both: Any, block: SinglePass) -> Any:
            return block(*both)

        return layers((x, carried), self.blocks)


def whole_stack_loss(module: Any, x: Any, weight: Any) -> Any:
    return chain_loss(module, x, one_hot(x, shards=sharding.current()), weight)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_the_carried_pre_goes_through_a_scan(explicit):
    gradient = nnx.jit(nnx.value_and_grad(whole_stack_loss, argnums=(0, 1)))
    x, weight = example() / 8, example(1)
    whole = SinglePassStack(nnx.Rngs(0))
    expected = gradient(whole, jnp.asarray(x), jnp.asarray(weight))
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, explicit=explicit)
    stack = sharding.create(lambda: SinglePassStack(nnx.Rngs(0)), mesh)
    with sharding.use(mesh):
        actual = gradient(stack, sharding.shard(x, mesh), sharding.shard(weight, mesh))
    assert difference(actual, expected) < 1e-10


def test_what_is_recomputed_sends_nothing_again():
    """Kept coefficients leave the all-reduces of the plain program; recomputing everything adds one a site."""
    mesh = sharding.make_mesh(tensor=8)
    counts = {}
    nothing = jax.checkpoint_policies.nothing_saveable
    for kept, policy in (("coefficients", sharding.keep_coefficients), ("all", None), ("nothing", nothing)):
        one: Any = (lambda f: f) if policy is None else nnx.remat(policy=policy)
        block = sharding.create(lambda: Block(nnx.Rngs(0)), mesh)

        def run(block: Block, x: Any, one: Any = one) -> Any:
            return nnx.grad(lambda block, x: jnp.sum(one(lambda b, x: b(x))(block, x) ** 2))(block, x)

        with sharding.use(mesh):
            text = str(nnx.jit(run).lower(block, sharding.shard(example(), mesh)).compile().as_text())
        counts[kept] = text.count(" all-reduce(") + text.count(" all-reduce-start(")
    assert counts["coefficients"] == counts["all"] < counts["nothing"], counts


def test_hessian_vector_products_are_there_by_forward_over_reverse():
    config = MHCConfig.from_dialect("deepseek-v4", streams=STREAMS, dim=DIM)
    module, x, weight = randomised(layer(config)), jnp.asarray(example()[:1, :1]), jnp.asarray(example(1)[:1, :1])
    graph, state = nnx.split(module)
    gradient = jax.grad(lambda x: loss(nnx.merge(graph, state), x, weight))
    direction, step = jnp.asarray(example(2)[:1, :1]), 1e-5
    _, product = jax.jvp(gradient, (x,), (direction,))
    near = (gradient(x + step * direction) - gradient(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(product, near, rtol=1e-5, atol=1e-6)


def test_the_first_of_several_rules_for_a_name_counts():
    rules = (("embed", ["tensor", "fsdp"]), ("embed", None))
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    assert sharding.partition((None, "embed"), mesh, rules) == jax.P(None, ("tensor", "fsdp"))


def test_errors_name_the_axis_and_what_to_do():
    with pytest.raises(ValueError, match=r"data=3 x .* needs 3 devices, there are 8: change a size"):
        sharding.make_mesh(data=3)
    with pytest.raises(ValueError, match="tensor must be at least 1, got 0"):
        sharding.make_mesh(data=8, tensor=0)
    mesh = sharding.make_mesh(data=2, tensor=4)
    with pytest.raises(ValueError, match=r"x \[3, 8, 4, 16\]: axis 0 of size 3 must be a multiple of 2.*data=2"):
        sharding.shard(example()[:3], mesh)
    with pytest.raises(ValueError, match=r"axis 3 of size 6 must be a multiple of 4, since it lies on tensor=4"):
        sharding.shard(example()[..., :6], mesh)
    with pytest.raises(ValueError, match=r"x must be \[batch, seq, streams, dim\] or"):
        sharding.shard(np.zeros((8, 16)), mesh)
    with pytest.raises(ValueError, match=r"x \[8, 8, 6\]: axis 2 of size 6 must be a multiple of 4"):
        sharding.check_divisible(mesh, (8, 8, 6))
    sharding.check_divisible(mesh, (8, 8, STREAMS, DIM))
    config = MHCConfig.from_dialect("deepseek-v4", streams=STREAMS, dim=6)
    with pytest.raises(ValueError, match=r"pre_alpha \[4, 6, 4\]: axis 1 of size 6"):
        sharding.weight_shardings(weight_shapes(config), mesh)
    with pytest.raises(ValueError, match=r"axis 1 of size 6 must be a multiple of 4"):
        sharding.create(lambda: layer(config), mesh)
    with pytest.raises(ValueError, match=r"head_fn \[4, 6, 4\]"):
        sharding.weight_shardings(head_shapes(config), mesh)


def test_without_rules_a_mesh_changes_nothing():
    config = MHCConfig.from_dialect("deepseek-v4", streams=STREAMS, dim=DIM)
    module, x, weight = randomised(layer(config)), jnp.asarray(example()), jnp.asarray(example(1))
    expected = loss(module, x, weight)
    with jax.set_mesh(sharding.make_mesh(data=2, tensor=4)):
        assert difference(nnx.jit(loss)(module, x, weight), expected) < 1e-12
