"""One process of a sharded implementation: ``python -m conformance.implementations.member CONNECTION ALIVE``.

It is handed calls over the first file descriptor and answers each. The second is the read end of a pipe whose other
end only the suite holds: it ends with the suite, however that ends, and this process with it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from conformance.implementations.registry import load_sharded
from conformance.interface import Implementation, describe
from conformance.mesh import Member


def _end_with(alive: int) -> None:
    """Ends this process, also one that waits for others in a collective, when the suite is gone."""
    with contextlib.suppress(OSError):
        os.read(alive, 1)
    os._exit(1)


def serve(connection: Connection) -> None:
    """Sets the implementation up, says what it claims, then answers one call after the other until there are none."""
    reference, member = connection.recv()
    implementation = _answer(connection, lambda: _claims(load_sharded(reference, member)))
    while implementation is not None:
        try:
            call = connection.recv()
        except EOFError:
            return
        _answer(connection, partial(_call, implementation, member, *call))


def _claims(implementation: Any) -> tuple[Any, Any]:
    return implementation, implementation.capabilities


def _call(implementation: Implementation, member: Member, *call: Any) -> tuple[None, Any]:
    result = implementation.call(*call)
    return None, result if member.rank == 0 else None  # the same on all: one sends it


def _answer(connection: Connection, run: Any) -> Any:
    """Runs and sends ("done", result), ("refused", reason) or ("error", what); returns what isn't for sending."""
    try:
        kept, sent = run()
        connection.send(("done", sent))
        return kept
    except NotImplementedError as error:
        connection.send(("refused", str(error)))
    except Exception as error:
        connection.send(("error", describe(error)))
    return None


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(int(sys.argv[2]),), daemon=True).start()
    status = 1
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            serve(Connection(int(sys.argv[1])))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:  # not by returning: frameworks, and threads of an implementation, would wait for one another
        sys.stderr.flush()
        os._exit(status)
