"""The model of fixtures/trajectories/README.md in PyTorch: modules of `torch_impl`, trained by `torch.optim.AdamW`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import torch_impl
from conformance.adapters.torch_gradients import to_numpy, to_torch
from conformance.adapters.training_state import State, returned, taken
from conformance.interface import Arrays, Result
from torch_impl import HyperConnectionType, sharding
from torch_impl.weights import local_part

SITES = ("attention", "mlp")


def configuration(config: Mapping[str, Any]) -> torch_impl.MHCConfig:
    """The dialect of what a step is told, its reduction included."""
    known = torch_impl.MHCConfig(streams=1, dim=1).parameters()
    return torch_impl.MHCConfig.from_parameters({k: v for k, v in config.items() if k in known})


class Block(nn.Module):
    """Attention and MLP, each inside of a hyper-connection."""

    attention_norm: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    mlp_norm: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor

    def __init__(self, c: torch_impl.MHCConfig, config: Mapping[str, Any], shapes: Mapping[str, Any], dtype: Any):
        super().__init__()
        self.heads, self.eps = config["heads"], config["model_norm_eps"]
        self.attention = torch_impl.ManifoldConstrainedHyperConnections(c, dtype=dtype)
        self.mlp = torch_impl.ManifoldConstrainedHyperConnections(c, dtype=dtype)
        _register(self, shapes, dtype)

    def forward(self, x: Tensor, carried: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x, metadata = self.attention(
            self._norm(self.attention_norm), self._attend, x, HyperConnectionType.ATTENTION, carried=carried
        )
        carried = metadata.get("carried")
        x, metadata = self.mlp(self._norm(self.mlp_norm), self._feed, x, HyperConnectionType.MLP_DENSE, carried=carried)
        return x, metadata.get("carried")

    def _norm(self, weight: Tensor) -> Any:
        return lambda u: functional.rms_norm(u, weight.shape, weight, self.eps)

    def _attend(self, inputs_q: Tensor, inputs_kv: Tensor) -> tuple[Tensor, None]:
        q, k, v = (
            (u @ weight).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [batch, heads, seq, d]
            for u, weight in ((inputs_q, self.query), (inputs_kv, self.key), (inputs_kv, self.value))
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(-2) @ self.out, None

    def _feed(self, inputs: Tensor) -> Tensor:
        return functional.silu(inputs @ self.up + self.up_bias) @ self.down + self.down_bias


class LanguageModel(nn.Module):
    """Two blocks between an embedding and an output projection."""

    embedding: Tensor
    positions: Tensor
    final_norm: Tensor
    output: Tensor

    def __init__(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype):
        super().__init__()
        c = configuration(config)
        self.streams, self.eps = c.streams, config["model_norm_eps"]
        self.layers = nn.ModuleList(
            Block(c, config, _below(f"layers.{k}.", shapes), dtype) for k in range(config["layers"])
        )
        self.head = torch_impl.HyperHead(c, dtype=dtype) if c.reduce == "head" else None
        _register(self, {k: v for k, v in shapes.items() if "." not in k}, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch_impl.expand(self.embedding[tokens] + self.positions[: tokens.shape[1]], self.streams)
        first: Any = self.layers[0].attention
        carried = first.one_hot(x) if first.config.pre_from == "previous" else None
        for block in self.layers:
            x, carried = block(x, carried)
        x = self.head(x) if self.head is not None else first.reduce(x, carried)  # [batch, seq, dim]
        return functional.rms_norm(x, self.final_norm.shape, self.final_norm, self.eps) @ self.output


def _below(before: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a block that aren't those of a site."""
    own = {k.removeprefix(before): v for k, v in shapes.items() if k.startswith(before)}
    return {k: v for k, v in own.items() if "." not in k}


def _register(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))


class Trainer:
    """A model and its optimizer, which a state fills and which give a state.

    Args:
        config: what a step is told; its number is that of the next step.
        state: flat arrays; the dtype of the weights is the model's.
        mesh: of `torch_impl.sharding`, along whose fsdp and data the batch is split; None for one process.
    """

    def __init__(self, config: Mapping[str, Any], state: State, mesh: Any = None):
        shapes = {name: value.shape for name, value in state.weight.items()}
        self.model = LanguageModel(config, shapes, to_torch(next(iter(state.weight.values()))).dtype)
        self.mesh, self._shapes = mesh, shapes
        if mesh is not None:
            sharding.parallelize(self.model, mesh)
            fully_shard(self.model, mesh=sharding.data_mesh(mesh))
        held = self.parameters()
        groups = [
            {"params": [held[n] for n in shapes if (n in config["decayed"]) == decays], "weight_decay": decay}
            for decays, decay in ((True, config["weight_decay"]), (False, 0.0))
        ]
        rate, betas = config["learning_rate"], (config["beta1"], config["beta2"])
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, eps=config["adam_eps"])
        for name, parameter in held.items():
            first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
            for target, value in ((parameter, state.weight), (first, state.first), (second, state.second)):
                _copy(target, value[name])
            moments = {"exp_avg": first.detach(), "exp_avg_sq": second.detach()}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(config["step"] - 1)), **moments}

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters under the names of the weights."""
        return {name.replace("mhc_norm_scale", "mhc_norm.scale"): v for name, v in self.model.named_parameters()}

    def step(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Trains one step on this process's part of a batch; the loss before it, and the norm of each gradient."""
        logits = self.model(tokens)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        norms = {name: _gradient(parameter).norm() for name, parameter in self.parameters().items()}
        self.optimizer.step()
        return loss.detach(), norms

    def state(self) -> State:
        """Flat arrays of the whole weights and moments."""
        held = self.parameters()
        moments = [{n: self.optimizer.state[p][key] for n, p in held.items()} for key in ("exp_avg", "exp_avg_sq")]
        return State(*({n: self._flat(n, part[n]) for n in self._shapes} for part in (held, *moments)))

    def _flat(self, name: str, value: Tensor) -> Any:
        return to_numpy(sharding.whole(value.detach())).reshape(self._shapes[name]).copy()


@torch.no_grad()
def _copy(target: Tensor, flat: Any) -> None:
    """A flat array's values, or this process's part of them."""
    local, part = local_part(target)
    local.copy_(to_torch(flat).reshape(target.shape)[part])


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return sharding.whole(parameter.grad)


def step(inputs: Arrays, config: Mapping[str, Any], cotangents: Arrays | None) -> Result:
    """The stage `step` of the contract."""
    del cotangents
    trainer = Trainer(config, taken(inputs))
    tokens, targets = (to_torch(inputs[name]).long() for name in ("tokens", "targets"))
    loss, norms = trainer.step(tokens, targets)
    told = {"loss": to_numpy(loss), **{f"gradient_norm/{k}": to_numpy(v) for k, v in norms.items()}}
    return told | returned(trainer.state()), {}
