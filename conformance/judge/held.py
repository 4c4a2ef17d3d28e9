"""The arrays that an implementation is handed: it may change them neither during the call nor afterwards."""

from __future__ import annotations

from conformance.interface import Arrays, Implementation


class Held:
    """The arrays of one call, and what they held when they were handed over."""

    def __init__(self, inputs: Arrays, cotangents: Arrays | None):
        self._arrays = {f"input {name}": array for name, array in inputs.items()}
        self._arrays |= {f"cotangent of {name}": array for name, array in (cotangents or {}).items()}
        self._before = {name: array.tobytes() for name, array in self._arrays.items()}

    def changed(self) -> list[str]:
        """The arrays whose bytes are others than at the last look."""
        now = {name: array.tobytes() for name, array in self._arrays.items()}
        names = [name for name, content in now.items() if content != self._before[name]]
        self._before = now
        return names


_last: dict[int, Held] = {}
"""What the implementation with this identity was handed last; one at most."""


def changes(implementation: Implementation, held: Held) -> list[tuple[str, str]]:
    """(array, sentence) for each array that was changed in this call, or since the one before; keeps this call's.

    Args:
        held: what it was handed in this call.
    """
    before = _last.pop(id(implementation), None)
    _last.clear()
    _last[id(implementation)] = held
    late = before.changed() if before else []
    return [(name.removeprefix("input "), f"changed its {name}") for name in held.changed()] + [
        (name.removeprefix("input "), f"changed the {name} of the call before, after it had returned") for name in late
    ]


def release(implementation: Implementation) -> None:
    """From now on the suite may change what this implementation was handed last."""
    _last.pop(id(implementation), None)
