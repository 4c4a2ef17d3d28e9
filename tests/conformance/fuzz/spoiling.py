"""How a document or some bytes are spoilt."""

from __future__ import annotations

import random
import struct
from typing import Any

from tests.conformance.files.mutations import mutations

Random = random.Random


def document(content: Any, random_: Random) -> bytes:
    """A document, spoilt."""
    return next(mutations(content, 1, random_.getrandbits(64)))


def spoilt(content: bytes, random_: Random) -> bytes:
    """Bytes that are cut, doubled, or have other ones in a place."""
    at, count = random_.randrange(len(content) + 1), random_.choice([1, 2, 4, 8, 64])
    number = struct.pack("<Q", random_.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]))
    ways = [
        lambda: content[:at], lambda: content[:at] + random_.randbytes(count) + content[at + count :],
        lambda: content[:at] + number + content[at + 8 :], lambda: content[:at] + number[:4] + content[at + 4 :],
        lambda: content[:at] + content[at : at + count] + content[at:], lambda: content + content[:at],
        lambda: content[at:], lambda: content[:at] + content[at + count :],
    ]  # fmt: skip
    return random_.choice(ways)()
