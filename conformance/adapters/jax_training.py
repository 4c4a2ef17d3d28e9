"""The model of fixtures/trajectories/README.md in JAX: functions of `jax_impl`, trained by `optax.adamw`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_impl
from conformance.adapters import branch
from conformance.adapters.jax_gradients import CHEAP
from conformance.adapters.training_state import State, returned, taken
from conformance.interface import Arrays, Result
from jax_impl import sharding

SITES = ("attention", "mlp")
Values = dict[str, jax.Array]


def configuration(config: Mapping[str, Any]) -> jax_impl.MHCConfig:
    """The dialect of what a step is told, its reduction included."""
    known = jax_impl.MHCConfig(streams=1, dim=1).parameters()
    return jax_impl.MHCConfig.from_parameters({k: v for k, v in config.items() if k in known})


def under(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight


def attend(u: jax.Array, weights: Values, heads: int) -> jax.Array:
    """Causal attention of the normalised u ``[batch, seq, dim]``.

    `jax.nn.dot_product_attention` (JAX 0.10) takes its softmax in float32 also of float64, which is 1e-7 off.
    """
    q, k, v = (
        (u @ weights[name]).reshape(*u.shape[:2], heads, -1)  # [batch, seq, heads, d]
        for name in ("query", "key", "value")
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    shares = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)  # [batch, heads, seq, seq]
    return jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(u.shape) @ weights["out"]


def feed(u: jax.Array, weights: Values) -> jax.Array:
    return jax.nn.silu(u @ weights["up"] + weights["up_bias"]) @ weights["down"] + weights["down_bias"]


def logits(weights: Values, tokens: jax.Array, config: Mapping[str, Any]) -> jax.Array:
    """``[batch, seq, vocabulary]``; the weights of sites are in their in-memory shapes."""
    c, shards = configuration(config), sharding.current()
    x = jax_impl.expand(weights["embedding"][tokens] + weights["positions"][: tokens.shape[1]], c.streams)
    carried = jax_impl.one_hot(x, shards=shards) if c.pre_from == "previous" else None
    for layer in range(config["layers"]):
        own = under(f"layers.{layer}.", weights)
        for kind in SITES:
            u, context, carried = jax_impl.pre(x, under(f"{kind}.", own), c, carried, shards=shards)
            u = rms_norm(u, own[f"{kind}_norm"], config["model_norm_eps"])
            y = attend(u, own, config["heads"]) if kind == "attention" else feed(u, own)
            x = jax_impl.post(y, context)
    if c.reduce == "head":
        x = jax_impl.head(x, under("head.", weights), c, shards=shards)
    else:
        x = jax_impl.reduce(x, str(c.reduce), carried, reduction=c.reduction, shards=shards)
    return rms_norm(x, weights["final_norm"], config["model_norm_eps"]) @ weights["output"]


def in_memory(flat: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of sites and head with streams and dim as two axes, all others as they are."""
    shaped = dict(flat)
    for prefix in {name.rpartition(".")[0] + "." for name in flat if name.endswith(("_alpha", "head_fn"))}:
        own = branch.in_memory(under(prefix, flat), config["streams"], config["dim"])
        shaped |= {f"{prefix}{name}": value for name, value in own.items()}
    return shaped


def optimizer(config: Mapping[str, Any]) -> Any:
    import optax  # here, since everything else of the suite works without it

    def decayed(weights: Values) -> dict[str, bool]:
        return {name: name in config["decayed"] for name in weights}

    return optax.adamw(
        config["learning_rate"], config["beta1"], config["beta2"], config["adam_eps"],
        weight_decay=config["weight_decay"], mask=decayed,
    )  # fmt: skip


@functools.lru_cache(16)
def compiled(told: str, mesh: Any) -> Any:
    """One step as a compiled function of (state, tokens, targets, the number of steps before)."""
    del mesh  # the program is another one on each
    import optax

    config = json.loads(told)
    transformation = optimizer(config)

    def loss_fn(weights: Values, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        found = logits(weights, tokens, config)
        return optax.softmax_cross_entropy_with_integer_labels(found, targets).mean()

    def run(state: State, tokens: jax.Array, targets: jax.Array, before: jax.Array) -> tuple[Any, Values, State]:
        loss, gradients = jax.value_and_grad(loss_fn)(state.weight, tokens, targets)
        moments = optax.tree.set(transformation.init(state.weight), count=before, mu=state.first, nu=state.second)
        updates, moments = transformation.update(gradients, moments, state.weight)
        first, second = (optax.tree.get(moments, name) for name in ("mu", "nu"))
        norms = {name: jnp.sqrt(jnp.sum(jnp.square(value))) for name, value in gradients.items()}
        weights: Any = optax.apply_updates(state.weight, updates)
        return loss, norms, State(weights, first, second)

    return jax.jit(run, compiler_options=CHEAP if jax.default_backend() == "cpu" else None)


class Trainer:
    """A state on the devices, which steps replace.

    Args:
        config: what a step is told; its number is that of the next step.
        state: flat arrays.
        mesh: of `jax_impl.sharding`; None for one device. Calls stand inside `sharding.use` of it.
    """

    def __init__(self, config: Mapping[str, Any], state: State, mesh: Any = None):
        self._config, self._mesh, self._before = config, mesh, config["step"] - 1
        self._shapes = {name: value.shape for name, value in state.weight.items()}
        told = {k: v for k, v in config.items() if k != "step"}
        self._run = compiled(json.dumps(told, sort_keys=True), mesh)
        self.held = State(*({k: self._placed(k, v) for k, v in in_memory(part, config).items()} for part in state))

    def _placed(self, name: str, value: Any) -> jax.Array:
        if self._mesh is None:
            return jnp.asarray(np.ascontiguousarray(value).reshape(value.shape))
        canonical = "mhc_norm.scale" if name.endswith("mhc_norm.scale") else name.rpartition(".")[2]
        axes = sharding.logical_axes(canonical, value.shape)  # all but a site's weights are whole everywhere
        return sharding.place(value, jax.NamedSharding(self._mesh, sharding.partition(axes, self._mesh)))

    def step(self, tokens: Any, targets: Any) -> tuple[jax.Array, Values]:
        """Trains one step; the loss before it, and the norm of each gradient."""
        loss, norms, self.held = self._run(self.held, tokens, targets, jnp.asarray(self._before, jnp.int32))
        self._before += 1
        return loss, norms

    def state(self) -> State:
        """Flat arrays of the whole weights and moments."""
        return State(*({n: self._flat(n, part[n]) for n in self._shapes} for part in self.held))

    def _flat(self, name: str, value: jax.Array) -> np.ndarray:
        whole = sharding.gather(value) if self._mesh is not None else value
        return np.array(whole).reshape(self._shapes[name])  # a copy that may be written to, as PyTorch wants it


def step(inputs: Arrays, config: Mapping[str, Any], cotangents: Arrays | None) -> Result:
    """The stage `step` of the contract."""
    del cotangents
    wide = any(value.dtype == np.float64 for value in inputs.values())
    with jax.enable_x64(wide):
        trainer = Trainer(config, taken(inputs))
        tokens, targets = (jnp.asarray(inputs[name], jnp.int32) for name in ("tokens", "targets"))
        loss, norms = trainer.step(tokens, targets)
        told = {"loss": np.asarray(loss), **{f"gradient_norm/{k}": np.asarray(v) for k, v in norms.items()}}
        return told | returned(trainer.state()), {}
