"""One call of an implementation, which may do anything: what comes out is plain, or an `Exception`.

A stranger's exception may be none that `except Exception` catches, its text may raise, its mappings and arrays may be
classes of its own whose methods raise. Everything of that kind ends here, and the caller sees dicts of NumPy's own
arrays (docs/contract.md, "Exceptions and verdicts").
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any, cast

import numpy as np

from conformance.interface import Arrays, Implementation, Raised, Result, describe

RETURN = '; return for instance {"u": u}, {"x": gradient}, the second empty where cotangents is None'
"""What to do about a wrong return."""


class Interrupts:
    """Notices Ctrl-C in its block, so that it can be told from a KeyboardInterrupt that a stranger raises."""

    def __init__(self) -> None:
        self.came = False
        self._held = False

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._held = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            if self._held:
                signal.signal(signal.SIGINT, self._hear)
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        signal.default_int_handler(number, frame)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._held and signal.getsignal(signal.SIGINT) == self._hear:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def excuse(self, error: BaseException) -> bool:
        """Whether an exception is the user's own Ctrl-C, which must go on."""
        return isinstance(error, KeyboardInterrupt) and self.came


def called(
    implementation: Implementation, stage: str, inputs: Arrays, config: Mapping[str, Any], cotangents: Arrays | None
) -> Result:
    """Outputs and gradients of one call, in plain dicts of plain arrays; what isn't an array is as it came.

    Raises:
        NotImplementedError: the implementation refuses.
        Raised: it raised something that isn't an `Exception`, such as SystemExit.
        Exception: it raised that, or returned something else than two mappings.
    """
    with Interrupts() as interrupts:
        try:
            return mappings(implementation.call(stage, inputs, config, cotangents))
        except Exception:
            raise
        except BaseException as error:
            if interrupts.excuse(error):
                raise
            raise Raised(describe(error)) from error


def mappings(result: object) -> Result:
    """Outputs and gradients.

    Raises:
        TypeError: there aren't two, one is no mapping, or has a key that is no name.
    """
    expected = "expected (outputs, gradients), two mappings"
    if not isinstance(result, tuple):
        raise TypeError(f"{expected}, got a {type(result).__name__}{RETURN}")
    values = tuple.__getitem__(cast("tuple[Any, ...]", result), slice(None))
    if len(values) != 2:
        raise TypeError(f"{expected}, got a tuple of {len(values)}{RETURN}")
    outputs, gradients = values
    if isinstance(outputs, Mapping) and isinstance(gradients, Mapping):
        return _plain(cast("Mapping[Any, Any]", outputs)), _plain(cast("Mapping[Any, Any]", gradients))
    kinds = f"{type(outputs).__name__} and {type(gradients).__name__}"
    raise TypeError(f"expected two mappings, outputs and gradients, got {kinds}{RETURN}")


def _plain(returned: Mapping[Any, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name in returned:
        if not isinstance(name, str):
            raise TypeError(f"expected names as keys of what is returned, got a {type(name).__name__}")
        plain[str.__str__(name)] = _array(returned[name])
    return plain


def _array(value: Any) -> Any:
    """A NumPy array without the methods of a class of its own; anything else as it is."""
    if not isinstance(value, np.ndarray):
        return value
    array = value if type(value) is np.ndarray else np.ndarray.view(value, np.ndarray)
    return array if array.dtype.metadata is None else array.view(np.dtype(array.dtype.type))
