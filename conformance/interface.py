"""What the suite knows of an implementation: arrays in, arrays out.

An implementation is any object with ``name``, ``capabilities`` and one method per claimed stage::

    def residual_matrix(self, inputs, config, cotangents):
        return {"H": H}, {"logits": gradient}

``inputs`` maps the stage's inputs and weights (`stages.STAGES`; weights flat, as in the file) to NumPy arrays,
bfloat16 by ml_dtypes. ``config`` holds the parameters of ``fixtures/dialects.json`` with ``streams``, ``dim``,
``dialect`` and the stage's options (``how``, ``branch``, ``layers``, ``reduce``). ``cotangents`` maps each
output to its cotangent, or is None where no gradients are asked for. Expected values are never handed over.
A `NotImplementedError` is a refusal and counts as skipped; every other exception is a verdict, ``errored``.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np

from conformance.files.line import one_line

MESSAGE = 500
"""Characters of an exception that are kept."""
Arrays = Mapping[str, np.ndarray]
Result = tuple[dict[str, Any], dict[str, Any]]
"""Outputs, and the gradients of inputs and weights, under their names."""


@dataclass(frozen=True)
class Capabilities:
    """What an implementation claims; everything else is skipped, with the reason.

    Attributes:
        stages: names of `stages.STAGES`.
        dialects: names of ``fixtures/dialects.json``.
        dtypes: dtypes of x; or, for each claimed stage, its dtypes of x.
        weights: ``"float32"`` (the wide dtype of the variant), ``"x"`` (weights in the dtype of x); or these for
            each claimed stage.
        gradients: whether vector-Jacobian products come back.
        overrides: parameters in which it may depart from a dialect, None for any; or, for each such parameter,
            the values that it may take, None for any.
        contracts: precisions kept; ``"tf32"`` takes the place of ``"float32"`` where the two differ.
        outputs: for a stage, the outputs returned if not all of them.
        streams: numbers of streams, None for any.
        empty: whether zero tokens are accepted.
        device: where it runs.
        description: packages and versions, in a few words.
        settings: what else the figures depend on, as found where it runs: threads, TF32, matmul precision, x64.
        copies: whether every input is copied in order before anything reads it, so that no layout can show.
        tokens: how many it may be asked for in one call at production sizes, None for any: an interpreter takes minutes
            for a thousand.
        compiled: whether each new layout and each other set of gradients is compiled anew, which takes long.
    """

    stages: frozenset[str]
    dialects: frozenset[str]
    dtypes: frozenset[str] | Mapping[str, Collection[str]] = frozenset({"float32"})
    weights: tuple[str, ...] | Mapping[str, Collection[str]] = ("float32", "x")
    gradients: bool = True
    overrides: frozenset[str] | Mapping[str, Collection[Any] | None] | None = frozenset()
    contracts: frozenset[str] = frozenset({"float32", "mixing", "activation", "float64"})
    outputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    streams: frozenset[int] | None = None
    empty: bool = True
    device: str = "cpu"
    description: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    copies: bool = False
    compiled: bool = False
    tokens: int | None = None

    def dtypes_of(self, stage: str) -> frozenset[str]:
        """The dtypes of x that a stage is claimed for; none for a stage that a mapping leaves out."""
        return _of_stage(self.dtypes, stage)

    def weights_of(self, stage: str) -> frozenset[str]:
        """The kinds of weights that a stage is claimed for; none for a stage that a mapping leaves out."""
        return _of_stage(self.weights, stage)

    def allows(self, parameter: str, value: Any) -> bool:
        """Whether a parameter may depart from the dialect's value and take this one."""
        if self.overrides is None:
            return True
        values = self.overrides.get(parameter) if isinstance(self.overrides, Mapping) else None
        return parameter in self.overrides and (values is None or value in values)


def _of_stage(claim: Collection[str] | Mapping[str, Collection[str]], stage: str) -> frozenset[str]:
    if isinstance(claim, Mapping):
        return frozenset(cast("Mapping[str, Collection[str]]", claim).get(stage, ()))
    return frozenset(claim)


_UNASKED: ContextVar[frozenset[str]] = ContextVar("unasked", default=frozenset())


@contextmanager
def without_gradients_of(names: Collection[str]) -> Generator[None]:
    """In it, the gradients of these inputs and weights aren't asked for."""
    token = _UNASKED.set(frozenset(names))
    try:
        yield
    finally:
        _UNASKED.reset(token)


def asked_for(name: str) -> bool:
    """Whether a call that has cotangents wants the gradient of this input or weight.

    An implementation that doesn't ask may return all of them. One that does sees x, or the weights, as a model in
    training has them where nothing before x is trained, or the weights are frozen.
    """
    return name not in _UNASKED.get()


class Implementation(Protocol):
    """What the suite calls; an object with a method for each stage is wrapped into it (`implementations.wrapping`)."""

    name: str
    capabilities: Capabilities

    def call(self, stage: str, inputs: Arrays, config: Mapping[str, Any], cotangents: Arrays | None) -> Result:
        """Outputs and gradients of one stage.

        Args:
            stage: one of ``capabilities.stages``.
            inputs: the stage's inputs and weights under their names.
            config: parameters of the dialect, ``streams``, ``dim``, ``dialect`` and the stage's options.
            cotangents: a cotangent for each output, or None where no gradients are asked for.

        Raises:
            NotImplementedError: it refuses these inputs, with the reason.
        """
        ...


class SetupError(RuntimeError):
    """An implementation could not be set up."""


class Raised(Exception):
    """An implementation raised something that isn't an `Exception`; the text is what `describe` makes of it."""


def describe(error: BaseException, most: int = MESSAGE) -> str:
    """An exception in one line that a terminal may print, whatever its text is, and even where it has none.

    Args:
        most: characters.
    """
    name = type(error).__name__
    try:
        text = " ".join(str.split(str(error)))
    except BaseException as raised:
        text = f"its text can't be had, since that raises {type(raised).__name__}"
    whole = text if isinstance(error, Raised) else f"{name}: {text}" if text else name
    return one_line(whole[:most])[:most]  # what is escaped is longer
