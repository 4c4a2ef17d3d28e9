"""The one error that the porter raises for its user."""

from __future__ import annotations

from conformance.files.line import one_line

CONTRADICTED, BROKEN, PACKAGE, REFUSED, CANNOT, UNKNOWN, INCOMPLETE = 1, 2, 3, 4, 5, 6, 7
"""Exit statuses: the measurement contradicts the verdict; a broken input or a target in the way; a package is missing;
approximate and not allowed; impossible; nothing says which function the source computes; hyper-connections are missing,
or are under names that no layout has."""


class PortError(Exception):
    """An error whose one line names the file and the tensor, and says what was expected, what came and what to do.

    Attributes:
        status: the exit status of the command line.
    """

    def __init__(self, message: str, status: int = BROKEN):
        super().__init__(one_line(" ".join(message.split())))
        self.status = status


class Incomplete(PortError):
    """A part of a checkpoint is missing; the rest may be of use."""


class Ambiguous(PortError):
    """Several layouts fit.

    Attributes:
        fits: their names.
    """

    def __init__(self, message: str, fits: list[str]):
        super().__init__(message)
        self.fits = fits
