"""How the command line ends where a command doesn't: one line on standard error, and an exit status."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

import click

from conformance.files.line import one_line

PROGRAM = "mhc-conformance"
PIPE_CLOSED = 1  # as the parser has it where a command prints
USAGE = OUT_OF_MEMORY = 2
INTERRUPTED = 130  # 128 and SIGINT, as a shell has it


def ended(command: Callable[[], Any]) -> int:
    """Runs a command and returns its exit status; whatever it raises for its user becomes one line.

    Options that aren't right are the parser's exceptions, which would print how the command is used before the error.
    Standard output may be a full disk or a pipe that nobody reads any more. An exception that nobody expected is a
    mistake of this project, and keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        _take_any_text(stream)
    try:
        status = command()
        if sys.stdout is not None:
            sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return USAGE
    except click.ClickException as error:
        place = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else PROGRAM
        return _told(f"{' '.join(error.format_message().split())} ({place} --help)", error.exit_code, place)
    except click.Abort:
        return _told("interrupted", INTERRUPTED)
    except OSError as error:
        _leave_silently(sys.stdout)
        if error.errno == errno.EPIPE:
            return PIPE_CLOSED
        where = error.filename or "standard output"
        return _told(f"{where}: can't be read or written ({error.strerror or error})", USAGE)
    except MemoryError:
        return _told("this takes more memory than there is", OUT_OF_MEMORY)
    except ValueError as error:
        from conformance.files.places import CaseError

        if not isinstance(error, CaseError):  # of the package's own files, which every command may read
            raise
        return _told(str(error), USAGE)


def _told(message: str, status: int, place: str = PROGRAM) -> int:
    with contextlib.suppress(OSError):
        print(f"{place}: {one_line(message)}", file=sys.stderr, flush=True)
    return status


def _take_any_text(stream: TextIO | None) -> None:
    """Characters that a terminal can't have, such as halves of pairs, are escaped instead of an error."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _leave_silently(stream: TextIO | None) -> None:
    """What couldn't be written isn't tried again when the interpreter ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())  # type: ignore[union-attr]
        os.close(null)
