"""What a mistake of *where* is: a right layer that goes wrong in some calls, at some places (docs/mutants.md).

The places are those of released kernels' bugs: the last tile, a second path, a view that is read as packed, state of an
earlier call. The wrong values are plausible ones: those of the neighbouring place, or what the memory held before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from conformance.interface import Arrays, Result
from conformance.selftest.mutant import Mutant
from conformance.selftest.plain import OUTPUTS_PER_TOKEN, PER_TOKEN, Values
from conformance.stages import HEAD_WEIGHTS, LAYER_WEIGHTS

CHANNELS = ("out", "u", "x", "y", "embedding")
"""Tensors whose last axis is the width."""
STREAMS = {"pre": -1, "post": -1, "H": -1, "out": -2, "x": -2, "carried": -1}
"""The axis of the streams; ``out`` has it in the stages of `WHOLE`."""
WHOLE = ("expand", "post", "layer")
WEIGHTS = (*LAYER_WEIGHTS, *HEAD_WEIGHTS)


@dataclass(frozen=True)
class Call:
    """One call: what it was handed, and its sizes."""

    stage: str
    inputs: Arrays
    config: dict[str, Any]
    cotangents: Arrays | None

    @property
    def lead(self) -> tuple[int, int]:
        """Rows of the batch, and positions of a sequence."""
        batch, seq = next(self.inputs[name] for name in PER_TOKEN if name in self.inputs).shape[:2]
        return batch, seq

    @property
    def tokens(self) -> int:
        return self.lead[0] * self.lead[1]

    @property
    def dim(self) -> int:
        """The width, or 0 in a stage that has none."""
        return 0 if self.stage == "residual_matrix" else int(self.config["dim"])

    @property
    def streams(self) -> int:
        return int(self.config["streams"])

    @property
    def dtype(self) -> np.dtype:
        """The dtype of x, or of the logits."""
        return next(self.inputs[name] for name in PER_TOKEN if name in self.inputs).dtype


class Where(Mutant):
    """Right, until `strikes` says that a call is one of those that go wrong."""

    struck = False
    """Whether the call that runs goes wrong."""
    _inside = False

    def strikes(self, call: Call) -> bool:
        raise NotImplementedError

    def handed(self, call: Call) -> Call:
        """What a call that goes wrong finds in its arguments."""
        return call

    def spoil(self, call: Call, outputs: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:
        """Changes copies of what a call that goes wrong returns."""

    def _run(
        self, stage: str, body: Callable[[Values, Values, Any], Values], inputs: Arrays, config: dict[str, Any],
        cotangents: Arrays | None,
    ) -> Result:  # fmt: skip
        call = Call(stage, inputs, config, cotangents)
        self.struck = not self._inside and self.strikes(call)
        if not self.struck:
            return super()._run(stage, body, inputs, config, cotangents)
        found = self.handed(call)
        right = super()._run(stage, body, found.inputs, config, found.cotangents)
        outputs, gradients = ({k: v.copy() for k, v in part.items()} for part in right)
        self.spoil(call, outputs, gradients)
        return outputs, gradients

    def without_tokens(self, call: Call, dropped: Iterable[int]) -> dict[str, np.ndarray]:
        """The gradients of the stage where these tokens (of all rows, one after the other) are left out of the sums."""
        assert call.cotangents is not None
        places = np.asarray(list(dropped), int)
        cotangents = {name: value.copy() for name, value in call.cotangents.items()}
        for name, value in cotangents.items():
            if name in OUTPUTS_PER_TOKEN:
                by_token(value)[places] = 0
        return self.gradients(call.stage, call.inputs, call.config, cotangents)

    def gradients(
        self, stage: str, inputs: Arrays, config: dict[str, Any], cotangents: Arrays
    ) -> dict[str, np.ndarray]:
        """What a call that goes right returns."""
        self._inside = True
        try:
            return getattr(self, stage)(inputs, config, cotangents)[1]
        finally:
            self._inside = False


def by_token(value: np.ndarray) -> np.ndarray:
    """``[batch * seq, …]`` of ``[batch, seq, …]``: a view of a packed array."""
    return value.reshape(-1, *value.shape[2:]) if value.size else value[:0, :0].reshape(0, *value.shape[2:])


def per_token(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs, or gradients of inputs, that have tokens."""
    return [value for name, value in arrays.items() if name in (*PER_TOKEN, *OUTPUTS_PER_TOKEN)]


def unwritten(value: np.ndarray, place: Any) -> None:
    """Puts at a place what memory holds that was taken anew and isn't written."""
    value[place] = np.empty_like(np.ascontiguousarray(value))[place]


def packed(value: np.ndarray) -> np.ndarray:
    """What a reader finds that takes a view for packed: as many elements, one after the other, from its first on."""
    if value.flags.c_contiguous or not value.size:
        return value
    whole = value
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    memory = whole.ravel(order="K").view(np.uint8)
    start = value.ctypes.data - whole.ctypes.data
    return np.resize(memory[start:], value.size * value.itemsize).view(value.dtype).reshape(value.shape)


def streams_axis(name: str, stage: str) -> int | None:
    """The axis of the streams of an output or input; None where it has none."""
    return None if name == "out" and stage not in WHOLE else STREAMS.get(name)


def is_weight(name: str) -> bool:
    return name in WEIGHTS
