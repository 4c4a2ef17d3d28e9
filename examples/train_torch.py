"""A transformer of two blocks whose residual connections are mHC, trained on a CPU for some seconds (PyTorch).

    python examples/train_torch.py [DIALECT]

It learns to repeat the token that stood two places before. Every sub-layer has a site of its own, a
`ManifoldConstrainedHyperConnections`: it reads one stream out of the n streams, calls the sub-layer's norm, then the
sub-layer itself by keywords, and spreads the result over the mixed streams. The second block's MLP is a mixture of
experts. docs/layer.md explains each step, and dialects of a single pass, which take one argument more.
"""

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional

from torch_impl import HyperConnectionType, HyperHead, ManifoldConstrainedHyperConnections, MHCConfig, expand, reduce

VOCABULARY, LENGTH, DIM, STREAMS = 16, 24, 32, 4


class Block(nn.Module):
    def __init__(self, config: MHCConfig, experts: int):
        super().__init__()
        self.attention_site = ManifoldConstrainedHyperConnections(config)
        self.mlp_site = ManifoldConstrainedHyperConnections(config)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.attention = nn.MultiheadAttention(DIM, 4, batch_first=True)
        self.router = nn.Linear(DIM, experts)
        self.up = nn.ModuleList(nn.Linear(DIM, 2 * DIM) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(2 * DIM, DIM) for _ in range(experts))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        # x is [batch, seq, streams, dim]. The site hands further keywords, here the mask, on to the sub-layer.
        x, _ = self.attention_site(self.attention_norm, self.attend, x, HyperConnectionType.ATTENTION, mask=mask)
        if len(self.up) == 1:
            x, _ = self.mlp_site(self.mlp_norm, self.expert, x, HyperConnectionType.MLP_DENSE)
            return x, x.new_zeros(())
        x, metadata = self.mlp_site(self.mlp_norm, self.mixture, x, HyperConnectionType.MLP_MOE)
        return x, metadata["load_balance_loss"]

    def attend(self, inputs_q: Tensor, inputs_kv: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attention(inputs_q, inputs_kv, inputs_kv, attn_mask=mask)  # a pair; the site ignores the second

    def expert(self, inputs: Tensor, number: int = 0) -> Tensor:
        return self.down[number](functional.gelu(self.up[number](inputs)))

    def mixture(self, inputs: Tensor) -> tuple[Tensor, Tensor, None]:
        gates = self.router(inputs).softmax(-1)  # [batch, seq, experts]
        y = sum(gates[..., k, None] * self.expert(inputs, k) for k in range(len(self.up)))
        return y, gates.mean((0, 1)).square().sum(), None  # y, load_balance_loss, moe_bias_updates


class Model(nn.Module):
    def __init__(self, config: MHCConfig):
        super().__init__()
        self.config = config
        self.embedding, self.positions = nn.Embedding(VOCABULARY, DIM), nn.Embedding(LENGTH, DIM)
        self.blocks = nn.ModuleList(Block(config, experts) for experts in (1, 2))
        self.head = HyperHead(config) if config.reduce == "head" else None
        self.norm, self.readout = nn.RMSNorm(DIM), nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = expand(self.embedding(tokens) + self.positions(torch.arange(LENGTH)), self.config.streams)
        balance, mask = torch.zeros(()), nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for block in self.blocks:
            x, balance_of_block = block(x, mask)
            balance = balance + balance_of_block
        x = self.head(x) if self.head else reduce(x, self.config.reduce)  # [batch, seq, dim]
        return self.readout(self.norm(x)), balance


def loss_fn(model: Model, tokens: Tensor) -> Tensor:
    logits, balance = model(tokens)
    return functional.cross_entropy(logits[:, 2:].flatten(0, 1), tokens[:, :-2].flatten()) + 0.01 * balance


if __name__ == "__main__":
    torch.manual_seed(0)
    dialect = sys.argv[1] if len(sys.argv) > 1 else "deepseek-v4"
    model = Model(MHCConfig.from_dialect(dialect, streams=STREAMS, dim=DIM))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for number in range(61):
        loss = loss_fn(model, torch.randint(VOCABULARY, (32, LENGTH)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number % 20 == 0:
            print(f"step {number:2}: loss {loss.item():.2f}")
