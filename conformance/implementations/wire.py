"""A connection between two processes that hands large messages over in pieces.

`multiprocessing.connection.Connection` asks the system for all that is left of a message at each read, and gets some
200 KB of it. Each time it makes room for the whole rest, and where fresh memory is filled (`child.DIRTY`) that is a
write of the whole rest: 150 MB took 18 s, 600 MB would take five minutes.
"""

from __future__ import annotations

import pickle
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

PIECE = 1 << 18  # bytes; about what one read returns
NUMBER = 8  # bytes of a length


class Wire(Connection):
    """A connection whose `send` and `recv` go with each other alone, not with those of a plain `Connection`."""

    def send(self, obj: Any) -> None:
        content = memoryview(ForkingPickler.dumps(obj))
        self.send_bytes(len(content).to_bytes(NUMBER, "little"))
        for start in range(0, len(content), PIECE):
            self.send_bytes(content[start : start + PIECE])

    def recv(self) -> Any:
        content = bytearray(int.from_bytes(self.recv_bytes(NUMBER), "little"))
        place = 0
        while place < len(content):
            place += self.recv_bytes_into(content, place)
        return pickle.loads(content)
