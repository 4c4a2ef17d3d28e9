"""Messages of one line, whatever is in them; nothing is imported for it, since every command needs it."""

from __future__ import annotations

LONGEST = 2000
"""Characters of a message: the names of paths may have 4,096, and a stranger's words any number."""


def one_line(text: str, most: int = LONGEST) -> str:
    """A message without line breaks and other characters that a terminal acts on, of a length that can be read.

    Args:
        most: characters, of which one that is escaped counts as one (`cut`).
    """
    text = cut(text, most)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def cut(text: str, most: int) -> str:
    """A text of at most so many characters and three; its middle is left out, since its end says what to do."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[len(text) - most // 3 :]}"
