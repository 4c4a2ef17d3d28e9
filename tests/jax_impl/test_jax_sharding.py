"""The layer on eight virtual devices against one, in float64: layouts, axis types, layers in a scan, files, errors."""

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
    load_model,
    one_hot,
    reduce,
    save_model,
    sharding,
)
from jax_impl.functional import head_shapes, weight_shapes

STREAMS, DIM, LAYERS = 4, 16, 3
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


def example(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((8, 8, STREAMS, DIM))


def randomised(module: Any) -> Any:
    """Values of order 1, so that no gradient is small; the same however the module is laid out."""
    state = nnx.state(module, nnx.Param)
    generator = np.random.default_rng(7)
    for _, leaf in sorted(nnx.to_flat_state(state), key=lambda item: str(item[0])):
        value = leaf.get_value()
        fresh = generator.standard_normal(value.shape).astype(value.dtype)
        leaf.set_value(sharding.place(fresh, value.sharding) if hasattr(value.sharding, "mesh") else jnp.asarray(fresh))
    nnx.update(module, state)
    return module


def layer(config: MHCConfig) -> ManifoldConstrainedHyperConnections:
    return ManifoldConstrainedHyperConnections(config, rngs=nnx.Rngs(0), param_dtype=jnp.float64)


def loss(module: Any, x: Any, weight: Any) -> Any:
    if isinstance(module, HyperHead):
        return jnp.sum(jnp.sin(module(x)) * weight[..., 0, :])
    carried = module.one_hot(x) if module.config.pre_from == "previous" else None
    out, _ = module(jnp.tanh, lambda inputs: jnp.sin(inputs), x, HyperConnectionType.MLP_DENSE, carried=carried)
    return jnp.sum(out * weight)


def difference(actual: Any, expected: Any) -> float:
    """The largest error over all leaves, as a fraction of each leaf's largest value."""

    def one(a: Any, b: Any) -> float:
        b = np.asarray(b)
        return float(np.abs(np.asarray(a) - b).max() / max(np.abs(b).max(), 1e-3)) if b.size else 0.0

    return max(jax.tree.leaves(jax.tree.map(one, actual, expected)))


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


class Block(nnx.Module):
    """Two sites around branches without parameters."""

    def __init__(self, rngs: nnx.Rngs):
        config = MHCConfig.from_dialect("maxtext", streams=STREAMS, dim=DIM)
        self.attention = ManifoldConstrainedHyperConnections(config, rngs=rngs, param_dtype=jnp.float64)
        self.mlp = ManifoldConstrainedHyperConnections(config, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x: Any) -> Any:
        both = lambda inputs_q, inputs_kv: (jnp.tanh(inputs_q + inputs_kv), None)  # noqa: E731
        x, _ = self.attention(lambda u: u, both, x, HyperConnectionType.ATTENTION)
        x, _ = self.mlp(lambda u: u, lambda inputs: jnp.sin(inputs), x, HyperConnectionType.MLP_DENSE)
        return x


class Stack(nnx.Module):
    """Blocks in a scan, recomputed from their coefficients on the way back."""

    def __init__(self, rngs: nnx.Rngs, policy: Any = sharding.keep_coefficients):
        split = nnx.split_rngs(splits=LAYERS)
        self.policy = policy
        self.blocks = split(nnx.vmap(Block, transform_metadata={nnx.PARTITION_NAME: "layers"}))(rngs)

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, transform_metadata={nnx.PARTITION_NAME: "layers"})
        @nnx.remat(policy=self.policy)
        def layers(x: Any, block: Block) -> Any:
            return block(x)

        return layers(x, self.blocks)


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


def test_files_are_read_into_shards_and_written_from_them(tmp_path):
    config = MHCConfig.from_dialect("maxtext", streams=STREAMS, dim=DIM)
    plain, path = randomised(layer(config)), tmp_path / "site.safetensors"
    plain.save_weights(path)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    module = sharding.create(lambda: layer(config), mesh)
    module.load_weights(path)
    for key, value in plain.weights().items():
        loaded = module.weights()[key]
        np.testing.assert_array_equal(loaded, value)
        expected = sharding.weight_shardings({key: value.shape}, mesh)[key]
        assert loaded.sharding.is_equivalent_to(expected, value.ndim), key
    module.save_weights(tmp_path / "again.safetensors")
    again = layer(config)
    again.load_weights(tmp_path / "again.safetensors")
    assert all(np.array_equal(again.weights()[k], v) for k, v in plain.weights().items())


def test_layers_of_a_scan_are_read_from_a_prefix_each(tmp_path):
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    stack = sharding.create(lambda: Stack(nnx.Rngs(0)), mesh)
    sites = [randomised(layer(stack.blocks.mlp.config)) for _ in range(LAYERS)]
    flat: dict[str, np.ndarray] = {}
    for index, site in enumerate(sites):
        for key, value in site.weights().items():
            array = np.asarray(value) * (index + 1)
            flat[f"layers.{index}.mlp.{key}"] = array.reshape(-1, *array.shape[2:]) if DIM in array.shape else array
    from safetensors.numpy import save_file

    save_file(flat, tmp_path / "stack.safetensors")
    stack.blocks.mlp.load_weights(tmp_path / "stack.safetensors", [f"layers.{i}.mlp." for i in range(LAYERS)])
    for key, value in sites[0].weights().items():
        expected = np.stack([np.asarray(value) * (index + 1) for index in range(LAYERS)])
        np.testing.assert_array_equal(stack.blocks.mlp.weights()[key], expected)


def test_a_stack_is_written_layer_by_layer_and_wants_a_prefix_for_each(tmp_path):
    stack = sharding.create(lambda: Stack(nnx.Rngs(0)), sharding.make_mesh(fsdp=4, tensor=2))
    site, path = stack.blocks.mlp, tmp_path / "stack.safetensors"
    prefixes = [f"layers.{i}.mlp." for i in range(LAYERS)]
    for wrong in ("layers.0.mlp.", prefixes[:1], [*prefixes, "more."]):
        for call in (site.save_weights, site.load_weights):
            with pytest.raises(ValueError, match="prefix must be a prefix for each of 3 stacked layers, got"):
                call(path, wrong)
    site.save_weights(path, prefixes)
    for index, prefix in enumerate(prefixes):
        one = layer(site.config)
        one.load_weights(path, prefix)
        assert all(np.array_equal(v, site.weights()[k][index]) for k, v in one.weights().items())
    with pytest.raises(ValueError, match="prefix must be one prefix, a string, got"):
        layer(site.config).load_weights(path, prefixes)


def test_a_model_is_read_into_shards_and_written_from_them(tmp_path):
    """A stack of a scan, a site of its own and a head: the file is that of whole modules."""
    prefixes = tuple(f"layers.{i}.mlp." for i in range(LAYERS))

    def model(seed: int) -> dict[Any, Any]:
        stack = Stack(nnx.Rngs(seed)).blocks.mlp
        head = HyperHead(stack.config, rngs=nnx.Rngs(seed), param_dtype=jnp.float64)
        return {prefixes: stack, "layers.0.attention.": layer(stack.config), "head.": head}

    whole = {prefix: randomised(site) for prefix, site in model(0).items()}
    save_model(tmp_path / "whole.safetensors", whole)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    made = sharding.create(lambda: nnx.List(model(1).values()), mesh)
    sites = dict(zip(whole, made, strict=True))
    laid = {prefix: {k: v.sharding for k, v in site.weights().items()} for prefix, site in sites.items()}
    load_model(tmp_path / "whole.safetensors", sites)
    for prefix, site in sites.items():
        for name, value in site.weights().items():
            np.testing.assert_array_equal(value, whole[prefix].weights()[name])
            assert value.sharding.is_equivalent_to(laid[prefix][name], value.ndim), (prefix, name)
    save_model(tmp_path / "again.safetensors", sites)
    from safetensors.numpy import load_file

    first, second = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


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


def test_only_the_parts_of_a_process_are_read(tmp_path, monkeypatch):
    config = MHCConfig.from_dialect("deepseek-v4", streams=STREAMS, dim=DIM)
    from jax_impl import weights

    path = tmp_path / "site.safetensors"
    randomised(layer(config)).save_weights(path)
    read: list[int] = []
    part = weights._part

    def counted(*args: Any) -> Any:
        found = part(*args)
        read.append(found.size)
        return found

    monkeypatch.setattr(weights, "_part", counted)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    shapes = weight_shapes(config)
    weights.load_weights(path, config, shardings=sharding.weight_shardings(shapes, mesh))
    assert len(read) > len(shapes) and max(read) == STREAMS * STREAMS**2 * DIM // 8


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
