"""Modes: each mistake that a plain call can't show is found in every dtype, and the mode to blame is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the plain implementation is in PyTorch, which is not installed")

from conformance.cases.case import load_case
from conformance.cases.corpus import fixtures
from conformance.implementations.wrapping import wrap
from conformance.judge import modes
from conformance.judge.item import run_item
from conformance.judge.modes_layouts import LAYOUTS, ROUNDS, lay, layouts_of
from conformance.judge.modes_memory import poison
from conformance.judge.modes_plan import Plan
from conformance.selftest.plain import Plain

CASE = load_case(fixtures() / "golden" / "generic-n4-deepseek-v4.safetensors")
DTYPES = ("float32", "bfloat16", "float16")
CLAIMED = replace(
    wrap(Plain()).capabilities, stages=frozenset({"post", "coefficients"}), dtypes=frozenset(DTYPES)
)


class Planted:
    """The plain implementation with a mistake in one call; honest where `spoil` isn't overridden."""

    name = "planted"

    def __init__(self, **changes):
        self._plain = wrap(Plain())
        self.capabilities = replace(CLAIMED, **changes)
        self.called = []

    def call(self, stage, inputs, config, cotangents):
        self.called.append((stage, dict(inputs), cotangents))
        return self.spoil(stage, inputs, config, cotangents)

    def spoil(self, stage, inputs, config, cotangents):
        return self.right(stage, inputs, config, cotangents)

    def right(self, stage, inputs, config, cotangents):
        return self._plain.call(stage, inputs, config, cotangents)


def packed(value):
    """What code reads that ignores the strides: the elements in the order of memory from the first one on."""
    memory = value.base if value.base is not None and value.size else value
    first = (value.ctypes.data - memory.ctypes.data) // value.itemsize
    elements = np.lib.stride_tricks.as_strided(memory, (memory.nbytes // value.itemsize,), (value.itemsize,))
    return np.resize(elements[first : first + value.size], value.shape).astype(value.dtype)


class WrongWithoutGradients(Planted):
    def spoil(self, stage, inputs, config, cotangents):
        outputs, gradients = self.right(stage, inputs, config, cotangents)
        return (outputs if cotangents else {name: 1.25 * value for name, value in outputs.items()}), gradients


class WrongWhereXNeedsNoGradient(Planted):
    def spoil(self, stage, inputs, config, cotangents):
        outputs, gradients = self.right(stage, inputs, config, cotangents)
        return outputs, gradients if "x" in gradients else {name: 2 * value for name, value in gradients.items()}


class PackedInput(Planted):
    read = "x"

    def spoil(self, stage, inputs, config, cotangents):
        return self.right(stage, {k: packed(v) if k == self.read else v for k, v in inputs.items()}, config, cotangents)


class PackedWeight(PackedInput):
    read = "pre_alpha"


class PackedCotangents(Planted):
    def spoil(self, stage, inputs, config, cotangents):
        return self.right(stage, inputs, config, cotangents and {k: packed(v) for k, v in cotangents.items()})


class Stale(Planted):
    """It keeps the answer by the shapes, the dtypes, and what is asked for."""

    def spoil(self, stage, inputs, config, cotangents):
        key = (stage, str(config), cotangents is None, *((k, v.shape, str(v.dtype)) for k, v in inputs.items()))
        kept = self.__dict__.setdefault("kept", {})
        if key not in kept:
            kept[key] = self.right(stage, inputs, config, cotangents)
        return kept[key]


class WrongTheSecondTime(Planted):
    def spoil(self, stage, inputs, config, cotangents):
        key = (stage, cotangents is None, *(v.tobytes() for v in inputs.values()))
        seen = self.__dict__.setdefault("seen", set())
        outputs, gradients = self.right(stage, inputs, config, cotangents)
        again = key in seen
        seen.add(key)
        return ({name: 1.25 * value for name, value in outputs.items()} if again else outputs), gradients


class StateOfAnotherDtype(Planted):
    def spoil(self, stage, inputs, config, cotangents):
        last, self.last = getattr(self, "last", inputs["x"].dtype), inputs["x"].dtype
        outputs, gradients = self.right(stage, inputs, config, cotangents)
        return ({k: 1.25 * v for k, v in outputs.items()} if last != self.last else outputs), gradients


class OnceInTwenty(Planted):
    def spoil(self, stage, inputs, config, cotangents):
        outputs, gradients = self.right(stage, inputs, config, cotangents)
        return ({k: 1.25 * v for k, v in outputs.items()} if len(self.called) % 20 == 0 else outputs), gradients


class Unwritten(Planted):
    """Without gradients, the last element of what torch allocates isn't written."""

    def spoil(self, stage, inputs, config, cotangents):
        outputs, gradients = self.right(stage, inputs, config, cotangents)
        if cotangents is None:
            for name, value in outputs.items():
                memory = torch.empty(value.nbytes, dtype=torch.uint8).numpy().view(value.dtype).reshape(value.shape)
                memory.reshape(-1)[:-1] = value.reshape(-1)[:-1]
                outputs[name] = memory
        return outputs, gradients


def judged(implementation, stage, dtype):
    item = next(i for i in CASE.items() if i.stage == stage and i.variant.name == f"{dtype}-float32")
    implementation.last = item.dtype("x")
    return run_item(implementation, item, plan=Plan([item]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("mistake", "stage", "blamed"),
    [
        (WrongWithoutGradients, "post", {"without gradients"}),
        (WrongWhereXNeedsNoGradient, "coefficients", {"without the gradient of x"}),
        (PackedInput, "post", {f"layout: x {kind}" for kind in LAYOUTS}),
        (PackedWeight, "coefficients", {f"layout: pre_alpha {kind}" for kind in LAYOUTS}),
        (PackedCotangents, "post", {f"layout: cotangent of out {kind}" for kind in LAYOUTS}),
        (Stale, "post", {"other values"}),
        (WrongTheSecondTime, "post", {"called again", "repeated"}),
        (StateOfAnotherDtype, "post", {f"after {dtype}" for dtype in DTYPES}),
        (Unwritten, "post", {"without gradients", "without gradients + unwritten memory"}),
        (OnceInTwenty, "post", {"repeated"}),
    ],
)
def test_each_mistake_is_found_in_every_dtype_and_its_mode_named(mistake, stage, blamed, dtype):
    outcome = judged(mistake(), stage, dtype)
    found = {check.mode for check in outcome.failed}
    assert found & blamed and "" not in found
    if mistake is not OnceInTwenty:  # a race may fall into any call
        assert found <= blamed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", ["post", "coefficients"])
def test_an_honest_implementation_passes_in_every_mode(stage, dtype):
    outcome = judged(Planted(), stage, dtype)
    assert not outcome.failed and not outcome.differences and not outcome.refused
    rest = {"without the gradient of x", "with the gradient of x alone"}
    assert set(outcome.modes) == set(modes.MODES) - {modes.AGAIN} and rest <= set(outcome.modes)
    assert outcome.repeats == modes.REPEATS
