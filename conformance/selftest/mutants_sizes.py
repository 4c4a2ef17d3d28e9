"""Mistakes that only some sizes show: numbers of tokens, widths, numbers of streams, iterations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from conformance.selftest.plain import Values
from conformance.selftest.where import CHANNELS, Call, Where, by_token, per_token, streams_axis, unwritten

TILE = 16
"""Tokens of a tile."""
LANES = 8
"""Channels of a vector."""
GRID = 65_535
"""Blocks that a dimension of a grid may have."""

# Tokens


class BeyondTwelve(Where):
    """T > 12: the last token has the results of the one before it."""

    def strikes(self, call: Call) -> bool:
        return call.tokens > 12

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        for value in per_token(outputs):
            by_token(value)[-1] = by_token(value)[-2]


class MultipleOf16(Where):
    """T divisible by 16: the last token is not written."""

    def strikes(self, call: Call) -> bool:
        return call.tokens > 0 and call.tokens % TILE == 0

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        for value in per_token(outputs):
            unwritten(by_token(value), -1)


class MultipleOf128(Where):
    """T divisible by 128: the gradients miss the last tile of 16 tokens."""

    def strikes(self, call: Call) -> bool:
        return call.cotangents is not None and call.tokens > 0 and call.tokens % 128 == 0

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        gradients.update(self.without_tokens(call, range(call.tokens - TILE, call.tokens)))


class OneToken(Where):
    """One token: the path of its own applies H transposed."""

    def strikes(self, call: Call) -> bool:
        return call.tokens == 1

    def matrix(self, logits: Tensor, c: Any, kept: torch.dtype) -> Tensor:
        H = super().matrix(logits, c, kept)
        return H.transpose(-1, -2) if self.struck else H

    def post(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        turned = {**inputs, "H": np.swapaxes(inputs["H"], -1, -2)}
        one = inputs["x"].shape[:2] == (1, 1)
        outputs, gradients = super().post(turned if one else inputs, config, cotangents)
        if one and "H" in gradients:
            gradients["H"] = np.ascontiguousarray(np.swapaxes(gradients["H"], -1, -2))
        return outputs, gradients


class Above512(Where):
    """T > 512: the path for many tokens keeps the gates in bfloat16."""

    def strikes(self, call: Call) -> bool:
        return call.tokens > 512

    def gates(self, x: Tensor, weights: Values, c: Any) -> tuple[Tensor, Tensor, Tensor]:
        pre, post, H = super().gates(x, weights, c)
        if not self.struck:
            return pre, post, H
        return pre.to(torch.bfloat16).to(pre.dtype), post.to(torch.bfloat16).to(post.dtype), H

    def post_mix(self, y: Tensor, x: Tensor, post: Tensor, H: Tensor, c: Any) -> Tensor:
        return super().post_mix(y, x, post.to(torch.bfloat16).to(post.dtype) if self.struck else post, H, c)


class SwappedBlocks(Where):
    """T >= 32: the first two blocks of 16 tokens are swapped."""

    def strikes(self, call: Call) -> bool:
        return call.tokens >= 2 * TILE

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        for value in per_token(outputs):
            tokens = by_token(value)
            tokens[: 2 * TILE] = np.roll(tokens[: 2 * TILE], TILE, 0)


class LongerThan(Where):
    """A sequence's position that is the first beyond a limit has the results of position 0."""

    limit = 0

    def strikes(self, call: Call) -> bool:
        return call.lead[1] > self.limit > 0

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        for value in per_token(outputs):
            value[:, self.limit] = value[:, 0]


class LongerThan4(LongerThan):
    """seq > 4: position 4 has the results of position 0."""

    limit = 4


class LongerThan64(LongerThan):
    """seq > 64: position 64 has the results of position 0."""

    limit = 64


class LongerThan1024(LongerThan):
    """seq > 1024: position 1,024 has the results of position 0."""

    limit = 1024


class MoreThanThreeRows(Where):
    """batch > 3: the fourth row has the results of the third."""

    def strikes(self, call: Call) -> bool:
        return call.lead[0] > 3

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        for value in per_token(outputs):
            value[3] = value[2]


class ManyElements(Where):
    """More than 65,535 elements: those beyond are not written."""

    def strikes(self, call: Call) -> bool:
        return any(value.size > GRID for value in call.inputs.values())

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        for value in (*outputs.values(), *gradients.values()):
            unwritten(value.reshape(-1), slice(GRID, None))


# Widths


class WidthOf64(Where):
    """dim divisible by 64: the last 8 channels are those of the vector before."""

    def strikes(self, call: Call) -> bool:
        return call.dim > 0 and call.dim % 64 == 0

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        for part in (outputs, gradients):
            for name, value in part.items():
                if name in CHANNELS:
                    value[..., -LANES:] = value[..., -2 * LANES : -LANES]


class WidthOf128(Where):
    """dim divisible by 128: the projections miss their last 8 products."""

    def strikes(self, call: Call) -> bool:
        return call.dim > 0 and call.dim % 128 == 0

    def contract(self, a: Tensor, b: Tensor) -> Tensor:
        return super().contract(a[..., :-LANES], b[:-LANES]) if self.struck else super().contract(a, b)


class Width512(Where):
    """dim >= 512: the norm's mean is that of each stream's first 512 channels, less one."""

    def strikes(self, call: Call) -> bool:
        return call.dim >= 512

    def rms(self, flat: Tensor, c: Any) -> Tensor:
        if not self.struck:
            return super().rms(flat, c)
        return super().rms(flat.unflatten(-1, (c.streams, c.dim))[..., :511].flatten(-2), c)


class Width4096(Where):
    """dim >= 4096: channel 4,095 is the one before it."""

    def strikes(self, call: Call) -> bool:
        return call.dim >= 4096

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        for part in (outputs, gradients):
            for name, value in part.items():
                if name in CHANNELS:
                    value[..., 4095] = value[..., 4094]


class UnwrittenTail(Where):
    """A width of which 512 is no divisor: the tail is not written."""

    def strikes(self, call: Call) -> bool:
        return call.dim > 512 and call.dim % 512 > 0

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        for part in (outputs, gradients):
            for name, value in part.items():
                if name in CHANNELS:
                    unwritten(value, (..., slice(call.dim // 512 * 512, None)))


# Streams and iterations


class Streams(Where):
    """The last stream has the results of the one before it."""

    def strikes(self, call: Call) -> bool:
        return False

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        for part in (outputs, gradients):
            for name, value in part.items():
                axis = streams_axis(name, call.stage)
                if axis is not None and value.size:
                    moved = np.moveaxis(value, axis, 0)
                    moved[-1] = moved[-2]


class SixStreams(Streams):
    """n = 6: the last stream has the results of the one before it."""

    def strikes(self, call: Call) -> bool:
        return call.streams == 6


class SevenStreams(Streams):
    """n = 7: the last stream has the results of the one before it."""

    def strikes(self, call: Call) -> bool:
        return call.streams == 7


class ManyStreams(Streams):
    """n > 8: the last stream has the results of the one before it."""

    def strikes(self, call: Call) -> bool:
        return call.streams > 8


class TwentyIterations(Where):
    """More than 20 iterations: it stops after 20."""

    def strikes(self, call: Call) -> bool:
        return (call.config["iterations"] or 0) > 20

    def iterations(self, c: Any) -> int:
        return min(c.iterations, 20) if self.struck else c.iterations
