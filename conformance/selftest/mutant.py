"""What a planted mistake is: the plain layer with one step overridden (docs/bound.md, "Mutants").

``blind`` gives, for a dtype in which a mutant can't be seen in principle, the reason with its figure.
"""

from __future__ import annotations

from typing import ClassVar

from conformance.selftest.plain import Plain


class Mutant(Plain):
    """One planted mistake; the class's docstring says which."""

    blind: ClassVar[dict[str, str]] = {}

    def __init__(self) -> None:
        super().__init__(type(self).title())

    @classmethod
    def title(cls) -> str:
        return " ".join((cls.__doc__ or cls.__name__).split()).rstrip(".")
