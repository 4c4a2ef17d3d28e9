"""A small language model whose residual connections are mHC learns a text, character by character (Flax NNX, optax).

    python examples/train_jax.py                                                        # about a minute on two cores
    python examples/train_jax.py --weights start.safetensors --losses jax.json          # as train_torch.py does
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/train_jax.py --shard data=2,fsdp=2,tensor=2

Every sub-layer has a site of its own, a `ManifoldConstrainedHyperConnections`: it reads one stream out of the n
streams, calls the sub-layer's norm, then the sub-layer itself by keywords, and spreads the result over the mixed
streams. docs/layer.md explains each step. task.py has the text, the batches and the options; --help lists them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import task
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_impl import (
    HyperConnectionType,
    HyperHead,
    ManifoldConstrainedHyperConnections,
    MHCConfig,
    expand,
    save_model,
    sharding,
)


class Layer(nnx.Module):
    """Attention and an MLP, each inside a site. With several experts the MLP is a mixture of them."""

    def __init__(self, config: MHCConfig, experts: int, rngs: nnx.Rngs):
        dim = config.dim
        self.attention = ManifoldConstrainedHyperConnections(config, rngs=rngs)
        self.attention_norm = nnx.RMSNorm(dim, epsilon=1e-6, rngs=rngs)
        self.query_key_value, self.output = nnx.Linear(dim, 3 * dim, rngs=rngs), nnx.Linear(dim, dim, rngs=rngs)
        self.ffn = ManifoldConstrainedHyperConnections(config, rngs=rngs)
        self.ffn_norm = nnx.RMSNorm(dim, epsilon=1e-6, rngs=rngs)
        self.router = nnx.Linear(dim, experts, rngs=rngs) if experts > 1 else None
        self.up = nnx.List(nnx.Linear(dim, 4 * dim, rngs=rngs) for _ in range(experts))
        self.down = nnx.List(nnx.Linear(4 * dim, dim, rngs=rngs) for _ in range(experts))

    def __call__(self, x: Array, carried: Array | None) -> tuple[Array, Array | None, Array]:
        # x is [batch, seq, streams, dim]. A site hands keywords that it doesn't know, here `causal`, to its sub-layer.
        # `carried` is for dialects of a single pass, whose sites read with the pre of the site before; else it is None.
        kind = HyperConnectionType.ATTENTION
        x, metadata = self.attention(self.attention_norm, self.attend, x, kind, carried=carried, causal=True)
        carried = metadata.get("carried")
        if self.router is None:
            x, metadata = self.ffn(self.ffn_norm, self.expert, x, HyperConnectionType.MLP_DENSE, carried=carried)
        else:
            x, metadata = self.ffn(self.ffn_norm, self.mixture, x, HyperConnectionType.MLP_MOE, carried=carried)
        return x, metadata.get("carried"), metadata.get("load_balance_loss", jnp.zeros(()))

    def attend(self, inputs_q: Array, inputs_kv: Array, causal: bool) -> tuple[Array, None]:
        del inputs_kv  # the same as inputs_q
        heads = self.query_key_value(inputs_q).reshape(*inputs_q.shape[:2], 3, task.HEADS, -1)
        query, key, value = (heads[:, :, part] for part in range(3))  # [batch, seq, heads, dim / heads]
        y = jax.nn.dot_product_attention(query, key, value, is_causal=causal)
        return self.output(y.reshape(inputs_q.shape)), None  # a pair, whose second part the site ignores

    def expert(self, inputs: Array, number: int = 0) -> Array:
        return self.down[number](nnx.gelu(self.up[number](inputs), approximate=True))

    def mixture(self, inputs: Array) -> tuple[Array, Array, None]:
        assert self.router is not None
        gates = nnx.softmax(self.router(inputs))  # [batch, seq, experts]
        y = sum(gates[..., k, None] * self.expert(inputs, k) for k in range(len(self.up)))
        balance = jnp.square(gates.mean(1)).sum(-1).mean()  # of each text, so that a batch can be split
        return y, balance, None  # y, load_balance_loss, moe_bias_updates


class Model(nnx.Module):
    def __init__(self, config: MHCConfig, length: int, rngs: nnx.Rngs):
        self.config = config
        self.characters = nnx.Embed(len(task.VOCABULARY), config.dim, rngs=rngs)
        self.positions = nnx.Embed(length, config.dim, rngs=rngs)
        self.layers = nnx.List(Layer(config, experts, rngs) for experts in task.EXPERTS)
        self.head = HyperHead(config, rngs=rngs) if config.reduce == "head" else None
        self.norm = nnx.RMSNorm(config.dim, epsilon=1e-6, rngs=rngs)
        self.readout = nnx.Linear(config.dim, len(task.VOCABULARY), rngs=rngs)

    def __call__(self, characters: Array) -> tuple[Array, Array]:
        embedded = self.characters(characters) + self.positions(jnp.arange(characters.shape[1]))  # [batch, seq, dim]
        x = expand(embedded, self.config.streams)  # [batch, seq, streams, dim]
        x = sharding.constrain(x, sharding.activation_axes(x.ndim))  # on a mesh; without one it does nothing
        first, last = self.layers[0].attention, self.layers[-1].ffn
        carried = first.one_hot(x) if self.config.pre_from == "previous" else None
        balance = jnp.zeros(())
        for layer in self.layers:
            x, carried, balance_of_layer = layer(x, carried)
            balance += balance_of_layer
        reduced = self.head(x) if self.head else last.reduce(x, carried)  # [batch, seq, dim]
        return self.readout(self.norm(reduced)), balance


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer, characters: Array) -> Array:
    def loss_fn(model: Model) -> tuple[Array, Array]:
        logits, balance = model(characters[:, :-1])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, characters[:, 1:]).mean()
        return loss + task.BALANCE * balance, loss

    (_, loss), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, gradients)
    return loss


def sites(model: Model) -> dict[str, ManifoldConstrainedHyperConnections | HyperHead]:
    """The sites and the head, under their prefixes in a weights file."""
    kinds = (ManifoldConstrainedHyperConnections, HyperHead)
    modules = ((".".join(map(str, path)), module) for path, module in nnx.iter_modules(model))
    return {f"{name}.": module for name, module in modules if isinstance(module, kinds)}


def others(model: Model) -> dict[str, tuple[nnx.Param, bool]]:
    """All other parameters under PyTorch's names, and whether a file has them transposed."""
    inside, found = tuple(sites(model)), {}
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path))
        if not name.startswith(inside):
            owner, _, kind = name.rpartition(".")
            found[name if kind == "bias" else f"{owner}.weight"] = (parameter, kind == "kernel")
    return found


def load(model: Model, path: Path) -> None:
    """Fills the model from a weights file, on a mesh each shard by its own part."""
    kept = others(model)
    shapes = {name: value.shape[::-1] if turned else value.shape for name, (value, turned) in kept.items()}
    held = task.read_tensors(path, shapes)
    for prefix, site in sites(model).items():
        site.load_weights(path, prefix)
    for name, (parameter, turned) in kept.items():
        value = held[name].T if turned else held[name]
        parameter.set_value(jax.device_put(value, parameter.get_value().sharding))


def save(model: Model, path: Path) -> None:
    """Writes the sites, with the dialect, and all other parameters into one file."""
    save_model(task.beside(path), sites(model), replace=True)
    values = {name: (np.asarray(parameter[...]), turned) for name, (parameter, turned) in others(model).items()}
    task.add_tensors(path, {name: value.T if turned else value for name, (value, turned) in values.items()})


def shard(model: Model, mesh: Mesh) -> float:
    """Shards what isn't a site over fsdp, along the first axis; the sites lie in their shards since they were made.

    Returns:
        The part of all weights that one device holds.
    """
    for parameter, _ in others(model).values():
        even = parameter.shape[0] % mesh.shape["fsdp"] == 0
        where = NamedSharding(mesh, PartitionSpec("fsdp" if even else None))
        parameter.set_value(jax.device_put(parameter.get_value(), where))
    values = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(value.addressable_shards[0].data.size for value in values) / sum(value.size for value in values)


def main() -> None:
    chosen = task.options(str(__doc__).partition("\n")[0], sharding.AXES)
    config = MHCConfig.from_dialect(chosen.dialect, streams=task.STREAMS, dim=chosen.dim)
    if config.reduce == "none":  # some software leaves it to the model
        config = dataclasses.replace(config, reduce="mean")

    def make() -> Model:
        return Model(config, chosen.length, nnx.Rngs(0))

    mesh = sharding.make_mesh(**chosen.shard) if chosen.shard else None
    with sharding.use(mesh) if mesh else contextlib.nullcontext():
        model = sharding.create(make, mesh) if mesh else make()
        if mesh:
            print(f"one of {mesh.size} devices holds {shard(model, mesh):.2f} of the weights")
        if chosen.weights:
            load(model, chosen.weights)
        adamw = optax.adamw(task.RATE, *task.BETAS, eps=task.EPS, weight_decay=task.DECAY)
        optimizer = nnx.Optimizer(model, adamw, wrt=nnx.Param)

        def train(characters: np.ndarray) -> float:
            if mesh:  # the batch over data and fsdp
                spec = sharding.partition(("activation_batch",), mesh, sharding.RULES)
                return float(step(model, optimizer, sharding.place(characters, NamedSharding(mesh, spec))))
            return float(step(model, optimizer, jnp.asarray(characters)))

        task.train(chosen, train, f"jax {jax.__version__}")
        if chosen.save:
            save(model, chosen.save)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        task.refuse(error)
