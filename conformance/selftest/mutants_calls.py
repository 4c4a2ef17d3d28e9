"""Mistakes that only some calls show: without gradients, on views, after another call, with special numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from conformance.cases.case import DTYPES
from conformance.interface import asked_for
from conformance.selftest.plain import Values
from conformance.selftest.where import Call, Where, by_token, is_weight, packed, per_token

FLUSHED = 1e-7
"""Entries of H below this are the smallest that a float32 sum of entries of order 1 still sees."""
OFF = 1e-3

# What is asked for


class WithoutGradients(Where):
    """Without gradients the last token has the results of the one before it."""

    def strikes(self, call: Call) -> bool:
        return call.cotangents is None and call.tokens > 1

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        for value in per_token(outputs):
            by_token(value)[-1] = by_token(value)[-2]


class FusedWithoutWeight(Where):
    """Without gradients a fused path drops the norm weight."""

    def strikes(self, call: Call) -> bool:
        return call.cotangents is None

    def scale(self, weights: Values, c: Any) -> Tensor | None:
        return None if self.struck else super().scale(weights, c)


class WithoutXsGradient(Where):
    """Where x's gradient isn't asked for, those of the weights miss the last token."""

    def strikes(self, call: Call) -> bool:
        return call.cotangents is not None and call.tokens > 1 and not asked_for("x")

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        gradients.update(self.without_tokens(call, [call.tokens - 1]))


# Layouts


class PackedInputs(Where):
    """Inputs that are views are read as packed."""

    def strikes(self, call: Call) -> bool:
        return True

    def handed(self, call: Call) -> Call:
        return dataclasses.replace(call, inputs={k: v if is_weight(k) else packed(v) for k, v in call.inputs.items()})


class PackedWeights(Where):
    """Weights that are views are read as packed."""

    def strikes(self, call: Call) -> bool:
        return True

    def handed(self, call: Call) -> Call:
        return dataclasses.replace(call, inputs={k: packed(v) if is_weight(k) else v for k, v in call.inputs.items()})


class PackedCotangents(Where):
    """Cotangents that are views are read as packed."""

    def strikes(self, call: Call) -> bool:
        return call.cotangents is not None

    def handed(self, call: Call) -> Call:
        return dataclasses.replace(call, cotangents={k: packed(v) for k, v in (call.cotangents or {}).items()})


# Numbers


class NaNToZero(Where):
    """A NaN in an input becomes 0."""

    def strikes(self, call: Call) -> bool:
        return True

    def handed(self, call: Call) -> Call:
        return dataclasses.replace(
            call, inputs={k: np.where(np.isnan(v), v.dtype.type(0), v) for k, v in call.inputs.items()}
        )


class InfinityToLargest(Where):
    """A logit of +inf becomes the largest number."""

    def strikes(self, call: Call) -> bool:
        return True

    def limited(self, logits: Tensor, c: Any) -> Tensor:
        largest = torch.finfo(logits.dtype).max
        return super().limited(torch.where(logits == torch.inf, largest, logits), c)


class FlushedEntries(Where):
    """Entries of H below 1e-7 are flushed to 0 when it is made."""

    def strikes(self, call: Call) -> bool:
        return True

    def matrix(self, logits: Tensor, c: Any, kept: torch.dtype) -> Tensor:
        H = super().matrix(logits, c, kept)
        return torch.where(H < FLUSHED, torch.zeros_like(H), H)


class FlushedInMixing(Where):
    """Entries of H below 1e-7 are flushed to 0 when the streams are mixed."""

    def strikes(self, call: Call) -> bool:
        return True

    def mixed(self, H: Tensor, x: Tensor, c: Any) -> Tensor:
        return super().mixed(torch.where(H.abs() < FLUSHED, torch.zeros_like(H), H), x, c)


class BiasedGradient(Where):
    """A gradient in bfloat16 is too large by a thousandth."""

    blind: ClassVar[dict[str, str]] = {
        dtype: "the mistake is that of bfloat16 alone" for dtype in ("float32", "float16")
    }

    def strikes(self, call: Call) -> bool:
        return call.dtype == DTYPES["bfloat16"] and call.cotangents is not None

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        # A factor on what is rounded already would be rounded away: these are sums in float32.
        assert call.cotangents is not None
        single = np.dtype(np.float32)
        inputs, cotangents = ({k: v.astype(single) for k, v in part.items()} for part in (call.inputs, call.cotangents))
        for name, value in self.gradients(call.stage, inputs, call.config, cotangents).items():
            if gradients[name].dtype == call.dtype:
                gradients[name] = (value * single.type(1 + OFF)).astype(call.dtype)


# Other calls


class Race(Where):
    """One call of many has the results of the token before in the last one."""

    one_in = 0

    def __init__(self) -> None:
        super().__init__()
        self._draw = random.Random(self.one_in)

    def strikes(self, call: Call) -> bool:
        return call.tokens > 1 and self.one_in > 0 and self._draw.randrange(self.one_in) == 0

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        for value in per_token(outputs):
            by_token(value)[-1] = by_token(value)[-2]


class Race200(Race):
    """A race: in one call of 200 the last token has the results of the one before it."""

    one_in = 200


class Race5000(Race):
    """A race: in one call of 5,000 the last token has the results of the one before it."""

    one_in = 5000


class SecondCall(Where):
    """A second call with the same content adds its gradients to those of the first."""

    def __init__(self) -> None:
        super().__init__()
        self._last = b""

    def strikes(self, call: Call) -> bool:
        digest = hashlib.sha256(repr((call.stage, sorted(call.config.items(), key=str))).encode())
        for value in (*call.inputs.values(), *(call.cotangents or {}).values()):
            digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        last, self._last = self._last, digest.digest()
        return last == self._last

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        for name, value in gradients.items():
            gradients[name] = value + value


class AnotherDtype(Where):
    """After a call in another dtype the last token is in that precision, or has the results of the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self._last: np.dtype | None = None

    def strikes(self, call: Call) -> bool:
        last, self._last = self._last, call.dtype
        return last not in (None, call.dtype) and call.tokens > 1

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        for value in per_token(outputs):
            by_token(value)[-1] = by_token(value)[-2]
