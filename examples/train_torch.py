"""A small language model whose residual connections are mHC learns a text, character by character (PyTorch).

    python examples/train_torch.py                                                      # about a minute on two cores
    python examples/train_torch.py --weights start.safetensors --losses torch.json      # as train_jax.py does
    torchrun --standalone --nproc-per-node 2 examples/train_torch.py --shard fsdp=2     # FSDP2

Every sub-layer has a site of its own, a `ManifoldConstrainedHyperConnections`: it reads one stream out of the n
streams, calls the sub-layer's norm, then the sub-layer itself by keywords, and spreads the result over the mixed
streams. docs/layer.md explains each step. task.py has the text, the batches and the options; --help lists them.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import task
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from torch_impl import (
    HyperConnectionType,
    HyperHead,
    ManifoldConstrainedHyperConnections,
    MHCConfig,
    expand,
    save_model,
    sharding,
)


class Layer(nn.Module):
    """Attention and an MLP, each inside a site. With several experts the MLP is a mixture of them."""

    def __init__(self, config: MHCConfig, experts: int):
        super().__init__()
        dim = config.dim
        self.attention = ManifoldConstrainedHyperConnections(config)
        self.attention_norm = nn.RMSNorm(dim, eps=1e-6)
        self.query_key_value, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn = ManifoldConstrainedHyperConnections(config)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-6)
        self.router = nn.Linear(dim, experts) if experts > 1 else None
        self.up = nn.ModuleList(nn.Linear(dim, 4 * dim) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(4 * dim, dim) for _ in range(experts))

    def forward(self, x: Tensor, carried: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        # x is [batch, seq, streams, dim]. A site hands keywords that it doesn't know, here `causal`, to its sub-layer.
        # `carried` is for dialects of a single pass, whose sites read with the pre of the site before; else it is None.
        kind = HyperConnectionType.ATTENTION
        x, metadata = self.attention(self.attention_norm, self.attend, x, kind, carried=carried, causal=True)
        carried = metadata.get("carried")
        if self.router is None:
            x, metadata = self.ffn(self.ffn_norm, self.expert, x, HyperConnectionType.MLP_DENSE, carried=carried)
        else:
            x, metadata = self.ffn(self.ffn_norm, self.mixture, x, HyperConnectionType.MLP_MOE, carried=carried)
        return x, metadata.get("carried"), metadata.get("load_balance_loss", x.new_zeros(()))

    def attend(self, inputs_q: Tensor, inputs_kv: Tensor, causal: bool) -> tuple[Tensor, None]:
        del inputs_kv  # the same as inputs_q
        heads = self.query_key_value(inputs_q).unflatten(-1, (3, task.HEADS, -1)).transpose(1, 3)
        query, key, value = heads.unbind(2)  # [batch, heads, seq, dim / heads]
        y = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.output(y.transpose(1, 2).flatten(2)), None  # a pair, whose second part the site ignores

    def expert(self, inputs: Tensor, number: int = 0) -> Tensor:
        return self.down[number](functional.gelu(self.up[number](inputs), approximate="tanh"))

    def mixture(self, inputs: Tensor) -> tuple[Tensor, Tensor, None]:
        assert self.router is not None
        gates = self.router(inputs).softmax(-1)  # [batch, seq, experts]
        y = sum(gates[..., k, None] * self.expert(inputs, k) for k in range(len(self.up)))
        balance = gates.mean(1).square().sum(-1).mean()  # of each text, so that a batch can be split
        return y, balance, None  # y, load_balance_loss, moe_bias_updates


class Model(nn.Module):
    def __init__(self, config: MHCConfig, length: int):
        super().__init__()
        self.config = config
        self.characters = nn.Embedding(len(task.VOCABULARY), config.dim)
        self.positions = nn.Embedding(length, config.dim)
        for embedding in (
            self.characters,
            self.positions,
        ):  # as Flax draws them; from PyTorch's N(0, 1) it learns later
            nn.init.normal_(embedding.weight, std=config.dim**-0.5)
        self.layers = nn.ModuleList(Layer(config, experts) for experts in task.EXPERTS)
        self.head = HyperHead(config) if config.reduce == "head" else None
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.readout = nn.Linear(config.dim, len(task.VOCABULARY))

    def forward(self, characters: Tensor) -> tuple[Tensor, Tensor]:
        embedded = self.characters(characters) + self.positions(torch.arange(characters.shape[1]))  # [batch, seq, dim]
        x = expand(embedded, self.config.streams)  # [batch, seq, streams, dim]
        first, last = self.layers[0].attention, self.layers[-1].ffn
        carried = first.one_hot(x) if self.config.pre_from == "previous" else None
        balance = x.new_zeros(())
        for layer in self.layers:
            x, carried, balance_of_layer = layer(x, carried)
            balance = balance + balance_of_layer
        reduced = self.head(x) if self.head else last.reduce(x, carried)  # [batch, seq, dim]
        return self.readout(self.norm(reduced.flatten(0, 1))), balance  # [batch * seq, vocabulary]


def step(model: Model, optimizer: torch.optim.Optimizer, characters: Tensor) -> Tensor:
    logits, balance = model(characters[:, :-1])
    loss = functional.cross_entropy(logits, characters[:, 1:].flatten())
    optimizer.zero_grad()
    (loss + task.BALANCE * balance).backward()
    optimizer.step()
    return loss.detach()


def sites(model: Model) -> dict[str, ManifoldConstrainedHyperConnections | HyperHead]:
    """The sites and the head, under their prefixes in a weights file."""
    kinds = (ManifoldConstrainedHyperConnections, HyperHead)
    return {f"{name}.": module for name, module in model.named_modules() if isinstance(module, kinds)}


def others(model: Model) -> dict[str, Tensor]:
    """All other parameters under their names."""
    inside = tuple(sites(model))
    return {name: value.detach() for name, value in model.named_parameters() if not name.startswith(inside)}


def load(model: Model, path: Path) -> None:
    """Fills the model from a weights file; before it is sharded, which hands each process its part."""
    kept = others(model)
    held = task.read_tensors(path, {name: tuple(value.shape) for name, value in kept.items()})
    for prefix, site in sites(model).items():
        site.load_weights(path, prefix)
    for name, value in kept.items():
        value.copy_(torch.from_numpy(held[name]))


def save(model: Model, path: Path, writes: bool) -> None:
    """Writes the sites, with the dialect, and all other parameters into one file; every process calls it."""
    save_model(task.beside(path), sites(model), replace=True)
    values = {name: getattr(value, "full_tensor", value.clone)() for name, value in others(model).items()}
    if writes:
        task.add_tensors(path, {name: value.numpy() for name, value in values.items()})


def shard(model: Model, mesh: DeviceMesh) -> float:
    """Shards the sites by their own rule, and the rest of the model over the same mesh by FSDP2.

    Returns:
        The part of all weights that this process holds.
    """
    sharding.parallelize(model, mesh)
    fully_shard(model, mesh=sharding.data_mesh(mesh))
    values = list(model.parameters())
    return sum(value.to_local().numel() for value in values) / sum(value.numel() for value in values)


def main() -> None:
    chosen = task.options(str(__doc__).partition("\n")[0], ("data", "fsdp"))
    processes = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets it
    if chosen.batch % processes or (processes > 1) != bool(chosen.shard):
        task.refuse(
            f"--shard and torchrun go together, and --batch must be a multiple of the processes, got --shard "
            f"{chosen.shard or 'not at all'}, {processes} processes and --batch {chosen.batch}"
        )
    config = MHCConfig.from_dialect(chosen.dialect, streams=task.STREAMS, dim=chosen.dim)
    if config.reduce == "none":  # some software leaves it to the model
        config = dataclasses.replace(config, reduce="mean")
    torch.manual_seed(0)
    model = Model(config, chosen.length)
    if chosen.weights:
        load(model, chosen.weights)
    rank = 0
    if chosen.shard:
        dist.init_process_group("gloo")
        rank, part = dist.get_rank(), shard(model, sharding.make_mesh(**chosen.shard))
        if rank == 0:
            print(f"one of {processes} processes holds {part:.2f} of the weights", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), task.RATE, betas=task.BETAS, eps=task.EPS, weight_decay=task.DECAY
    )

    def train(characters: np.ndarray) -> float:
        own = torch.from_numpy(characters).long().chunk(processes)[rank]  # of the batch each process has its part
        loss = step(model, optimizer, own)
        if chosen.shard:
            dist.all_reduce(loss)
        return float(loss) / processes

    task.train(chosen, train, f"torch {torch.__version__}", writes=rank == 0)
    if chosen.save:
        save(model, chosen.save, writes=rank == 0)
    if chosen.shard:
        dist.barrier()  # who leaves first would break off what another process is still sending
        dist.destroy_process_group()
        # A thread of gloo that lets go of its last tensor while Python ends aborts the process (PyTorch's #179291).
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        task.refuse(error)
