"""Small implementations that behave, and that misbehave, for tests of the runner."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import numpy as np

from conformance.interface import Capabilities

CLAIMED = Capabilities(stages=frozenset({"reduce"}), dialects=frozenset({"paper", "glm-5"}), gradients=True)


class Honest:
    """reduce alone, in NumPy: sum and mean over the streams, in float32."""

    name = "honest"
    capabilities = CLAIMED

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        x = inputs["x"]
        share = np.float32(1 / config["streams"] if config["how"] == "mean" else 1)
        outputs = {"out": x.sum(-2) * share}
        if cotangents is None:
            return outputs, {}
        gradient = np.repeat((cotangents["out"] * share)[..., None, :], config["streams"], axis=-2)
        return outputs, {"x": gradient.astype(x.dtype)}


class Slipped(Honest):
    """Claims a dialect that there isn't."""

    name = "slipped"
    capabilities = replace(CLAIMED, dialects=frozenset({"papers"}))


class ClaimsPost(Honest):
    name = "claims-post"
    capabilities = replace(CLAIMED, stages=frozenset({"post"}))

    def post(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        raise NotImplementedError("not done yet")


class Raises(Honest):
    name = "raises"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        raise RuntimeError("no such\nkernel")


class ReadsPacked(Honest):
    name = "reads-packed"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        x = inputs["x"]
        packed = np.lib.stride_tricks.as_strided(x, x.shape, np.empty_like(x, order="C").strides)
        return super().reduce({"x": packed}, config, cotangents)


class WrongShape(Honest):
    name = "wrong-shape"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        outputs, gradients = super().reduce(inputs, config, cotangents)
        return {"out": outputs["out"][..., None]}, gradients


class WrongDtype(Honest):
    name = "wrong-dtype"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        outputs, gradients = super().reduce(inputs, config, cotangents)
        return {"out": outputs["out"].astype(np.float64)}, gradients


class NotANumber(Honest):
    name = "not-a-number"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        outputs, gradients = super().reduce(inputs, config, cotangents)
        return {"out": outputs["out"] * np.float32(np.nan)}, gradients


class HidesNan(Honest):
    name = "hides-nan"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        return super().reduce({"x": np.nan_to_num(inputs["x"])}, config, cotangents)


class Zeros(Honest):
    name = "zeros"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        outputs, gradients = super().reduce(inputs, config, cotangents)
        return {"out": np.zeros_like(outputs["out"])}, gradients


class ReturnsInput(Honest):
    """Its gradient of x is x itself."""

    name = "returns-input"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        outputs, _ = super().reduce(inputs, config, cotangents)
        return outputs, {"x": inputs["x"].copy()}


class Mutates(Honest):
    name = "mutates"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        found = super().reduce(inputs, config, cotangents)
        inputs["x"][...] += 1
        return found


class SlightlyOff(Honest):
    name = "slightly-off"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        outputs, gradients = super().reduce(inputs, config, cotangents)
        return {"out": outputs["out"] * np.float32(1 + 1e-4)}, gradients


class Refuses(Honest):
    name = "refuses"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        raise NotImplementedError("use another backend")


class Dies(Honest):
    """Ends its process in the cases of one dialect, and goes on with the others."""

    name = "dies"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        if config["dialect"] == "glm-5":
            os._exit(9)
        return super().reduce(inputs, config, cotangents)


class NoMethod:
    name = "no-method"
    capabilities = Capabilities(stages=frozenset({"head"}), dialects=frozenset({"paper"}))


class ReturnsNothing(Honest):
    name = "returns-nothing"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        return None, None


class Hangs(Honest):
    """Never answers the cases of one dialect."""

    name = "hangs"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        if config["dialect"] == "glm-5":
            time.sleep(3600)
        return super().reduce(inputs, config, cotangents)


class Wavers(Honest):
    """The last bit depends on how often it was called."""

    name = "wavers"

    def __init__(self) -> None:
        self._calls = 0

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        self._calls += 1
        outputs, gradients = super().reduce(inputs, config, cotangents)
        return {"out": outputs["out"] * np.float32(1 + 2.0**-23 * (self._calls % 2))}, gradients


class Crowded(Honest):
    """A token's result depends on the batch that it is in."""

    name = "crowded"

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        outputs, gradients = super().reduce(inputs, config, cotangents)
        return {"out": outputs["out"] * np.float32(1 + 2.0**-23 * (len(inputs["x"]) > 1))}, gradients


PAPER = Capabilities(stages=frozenset({"reduce"}), dialects=frozenset({"paper"}))


class OnlyPaper(Honest):
    """Refuses what it doesn't claim."""

    name = "only-paper"
    capabilities = PAPER

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        if config["dialect"] != "paper":
            raise ValueError(f"only paper, got {config['dialect']}")
        return super().reduce(inputs, config, cotangents)


class SumAlways(Honest):
    """Accepts what it doesn't claim, and gets it wrong."""

    name = "sum-always"
    capabilities = PAPER

    def reduce(self, inputs: Any, config: dict[str, Any], cotangents: Any) -> Any:
        return super().reduce(inputs, {**config, "how": "sum"}, cotangents)
