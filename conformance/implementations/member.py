"""One process of a sharded implementation: it is handed calls over a connection and answers each."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from conformance.files.plain import text_of
from conformance.implementations.borrowed import borrowed
from conformance.implementations.calling import called
from conformance.implementations.registry import SHARDED, load_sharded, module_of
from conformance.interface import Implementation, describe
from conformance.mesh import Member


def serve(connection: Connection) -> NoReturn:
    """Sets the implementation up, says what it claims, then answers one call after the other until there are none."""
    status = 1
    try:
        with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
            _serve(connection)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:  # not by returning: frameworks, and threads of an implementation, would wait for one another
        sys.stderr.flush()
        os._exit(status)


def _serve(connection: Connection) -> None:
    reference, member = connection.recv()
    implementation = _answer(connection, lambda: _claims(load_sharded(reference, member)))
    while implementation is not None:
        _answer(connection, partial(_call, implementation, member, reference, *connection.recv()))


def _claims(implementation: Any) -> tuple[Any, Any]:
    return implementation, implementation.capabilities


def _call(implementation: Implementation, member: Member, reference: str, *call: Any) -> tuple[None, Any]:
    result = called(implementation, *call)  # plain, so that it can be sent
    taken = borrowed(module_of(reference, SHARDED))
    return None, (result, taken) if member.rank == 0 else None  # the same on all: one sends it


def _answer(connection: Connection, run: Any) -> Any:
    """Runs and sends ("done", result), ("refused", reason) or ("error", what); returns what isn't for sending."""
    try:
        kept, sent = run()
        connection.send(("done", sent))
        return kept
    except NotImplementedError as error:
        connection.send(("refused", text_of(error)))
    except Exception as error:
        connection.send(("error", describe(error)))
    return None
