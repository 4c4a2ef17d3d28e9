"""A transformer of two blocks whose residual connections are mHC, trained on a CPU for some seconds (Flax, optax).

    python examples/train_jax.py [DIALECT]

It learns to repeat the token that stood two places before. Every sub-layer has a site of its own, a
`ManifoldConstrainedHyperConnections`: it reads one stream out of the n streams, calls the sub-layer's norm, then the
sub-layer itself by keywords, and spreads the result over the mixed streams. The second block's MLP is a mixture of
experts. docs/layer.md explains each step, and dialects of a single pass, which take one argument more.
"""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jax_impl import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections, MHCConfig, expand, reduce

VOCABULARY, LENGTH, DIM, STREAMS = 16, 24, 32, 4


class Block(nnx.Module):
    def __init__(self, config: MHCConfig, experts: int, rngs: nnx.Rngs):
        self.attention_site = ManifoldConstrainedHyperConnections(config, rngs=rngs)
        self.mlp_site = ManifoldConstrainedHyperConnections(config, rngs=rngs)
        self.attention_norm, self.mlp_norm = nnx.RMSNorm(DIM, rngs=rngs), nnx.RMSNorm(DIM, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, DIM, decode=False, rngs=rngs)
        self.router = nnx.Linear(DIM, experts, rngs=rngs)
        self.up = nnx.List(nnx.Linear(DIM, 2 * DIM, rngs=rngs) for _ in range(experts))
        self.down = nnx.List(nnx.Linear(2 * DIM, DIM, rngs=rngs) for _ in range(experts))

    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        # x is [batch, seq, streams, dim]. The site hands further keywords, here the mask, on to the sub-layer.
        x, _ = self.attention_site(self.attention_norm, self.attend, x, HyperConnectionType.ATTENTION, mask=mask)
        if len(self.up) == 1:
            x, _ = self.mlp_site(self.mlp_norm, self.expert, x, HyperConnectionType.MLP_DENSE)
            return x, jnp.zeros(())
        x, metadata = self.mlp_site(self.mlp_norm, self.mixture, x, HyperConnectionType.MLP_MOE)
        return x, metadata["load_balance_loss"]

    def attend(self, inputs_q: jax.Array, inputs_kv: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        return self.attention(inputs_q, inputs_kv, mask=mask), None  # a pair, whose second part the site ignores

    def expert(self, inputs: jax.Array, number: int = 0) -> jax.Array:
        return self.down[number](nnx.gelu(self.up[number](inputs)))

    def mixture(self, inputs: jax.Array) -> tuple[jax.Array, jax.Array, None]:
        gates = nnx.softmax(self.router(inputs))  # [batch, seq, experts]
        y = sum(gates[..., k, None] * self.expert(inputs, k) for k in range(len(self.up)))
        return y, jnp.square(gates.mean((0, 1))).sum(), None  # y, load_balance_loss, moe_bias_updates


class Model(nnx.Module):
    def __init__(self, config: MHCConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding, self.positions = (nnx.Embed(size, DIM, rngs=rngs) for size in (VOCABULARY, LENGTH))
        self.blocks = nnx.List(Block(config, experts, rngs) for experts in (1, 2))
        self.head = HyperHead(config, rngs=rngs) if config.reduce == "head" else None
        self.norm, self.readout = nnx.RMSNorm(DIM, rngs=rngs), nnx.Linear(DIM, VOCABULARY, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = expand(self.embedding(tokens) + self.positions(jnp.arange(LENGTH)), self.config.streams)
        balance, mask = jnp.zeros(()), nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x, balance_of_block = block(x, mask)
            balance += balance_of_block
        x = self.head(x) if self.head else reduce(x, self.config.reduce)  # [batch, seq, dim]
        return self.readout(self.norm(x)), balance


@nnx.jit
def step(model: Model, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    def loss_fn(model: Model) -> jax.Array:
        logits, balance = model(tokens)
        errors = optax.softmax_cross_entropy_with_integer_labels(logits[:, 2:], tokens[:, :-2])
        return errors.mean() + 0.01 * balance

    loss, gradients = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, gradients)
    return loss


if __name__ == "__main__":
    dialect = sys.argv[1] if len(sys.argv) > 1 else "deepseek-v4"
    model = Model(MHCConfig.from_dialect(dialect, streams=STREAMS, dim=DIM), nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    for number in range(61):
        tokens = jax.random.randint(jax.random.key(number), (32, LENGTH), 0, VOCABULARY)
        loss = step(model, optimizer, tokens)
        if number % 20 == 0:
            print(f"step {number:2}: loss {loss:.2f}")
