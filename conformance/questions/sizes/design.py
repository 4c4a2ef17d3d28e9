"""Which sizes are run: every pair of T with C and with n that fits into the memory, and a few for every run.

A size is a number of tokens T (in a batch and a sequence), a width C and a number of streams n. Mistakes of *where*
depend on one of these, or on two: tiles of tokens against widths of a tile, tokens against loops over streams.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

TOKENS = (1, 2, 7, 16, 17, 31, 32, 33, 64, 127, 128, 129, 513, 1024, 1025, 4096, 8191, 8192, 16384, 65536)
DIMS = (128, 512, 1000, 1280, 2560, 4096, 5120, 7168, 16384)
STREAMS = (1, 2, 3, 4, 6, 8, 16)
ITERATIONS = (None, 50, None, 21)
"""Iterations of Sinkhorn, one size after the other; None for the dialect's own."""
FORMS = ("full", "quick", "short")
QUICK_LARGEST = 1 << 21
"""Elements of x: ``T * n * C``."""
MOST_PRODUCTS = 1 << 20
"""Products that the projections of one token may have in the quick form, ``n * C * (n * n + 2 * n)``."""
FEWEST = 2
"""Streams where tokens are many: with one stream there is nothing to mix."""
TEXT = re.compile(r"size-(\d{1,9})x(\d{1,9})-C(\d{1,9})-n(\d{1,9})(?:-N(\d{1,9}))?(?:-seed(\d{1,18}))?(?:-(.+))?")


@dataclass(frozen=True)
class Size:
    """Tokens as ``[batch, seq]``, width, streams, iterations (None: the dialect's), and the seed of the data."""

    batch: int
    seq: int
    dim: int
    streams: int
    iterations: int | None = None
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def elements(self) -> int:
        """Of x."""
        return self.tokens * self.streams * self.dim

    @property
    def id(self) -> str:
        iterations = "" if self.iterations is None else f"-N{self.iterations}"
        seed = f"-seed{self.seed}" if self.seed else ""
        return f"size-{self.batch}x{self.seq}-C{self.dim}-n{self.streams}{iterations}{seed}"


def parsed(text: str) -> tuple[Size, str] | None:
    """The size of an id, and the row's name that stands behind it, if any does; None where it is no such id."""
    match = TEXT.fullmatch(text)
    if not match:
        return None
    batch, seq, dim, streams = (int(number) for number in match.group(1, 2, 3, 4))
    iterations, seed, row = match.group(5, 6, 7)
    return Size(batch, seq, dim, streams, int(iterations) if iterations else None, int(seed or 0)), row or ""


def splits(tokens: int) -> list[tuple[int, int]]:
    """Ways to put so many tokens into a batch and a sequence: all in one, each by itself, and what is between."""
    between = [k for k in range(2, int(tokens**0.5) + 1) if tokens % k == 0]
    middle = [] if not between else [(between[-1], tokens // between[-1]), (tokens // between[0], between[0])]
    return list(dict.fromkeys([(1, tokens), *middle, (tokens, 1)]))


def covering(
    tokens: Sequence[int], dims: Sequence[int], streams: Sequence[int], largest: int
) -> list[tuple[int, int, int]]:
    """Triples with at most ``largest`` elements that hold every pair of any two factors which some such triple holds.

    Greedy: the triple with the most pairs that no other has had; of equals the one with the fewest elements.
    """
    candidates = [
        triple for triple in itertools.product(tokens, dims, streams) if triple[0] * triple[1] * triple[2] <= largest
    ]
    missing = {pair for triple in candidates for pair in _pairs(triple)}
    chosen: list[tuple[int, int, int]] = []
    while missing:
        best = max(candidates, key=lambda t: (len(missing & _pairs(t)), -t[0] * t[1] * t[2]))
        chosen.append(best)
        missing -= _pairs(best)
    return chosen


def _pairs(triple: tuple[int, int, int]) -> set[tuple[str, int, int]]:
    tokens, dim, streams = triple
    return {("T and C", tokens, dim), ("T and n", tokens, streams), ("C and n", dim, streams)}


def once(
    tokens: Sequence[int], dims: Sequence[int], streams: Sequence[int], largest: int
) -> list[tuple[int, int, int]]:
    """A triple for each number of tokens; together they hold every width and every number of streams that fits.

    The widest come with the fewest streams, since a projection to H has n * C * n * n elements.
    """
    chosen: list[tuple[int, int, int]] = []
    widest_first = sorted(dims, reverse=True)
    fewest_first = sorted(streams, key=lambda n: (n < FEWEST, n))
    dims_left, streams_left = list(widest_first), list(fewest_first)
    for count in tokens:
        n = next((n for n in streams_left if count * dims[0] * n <= largest), FEWEST)
        most = min(largest // (count * n), MOST_PRODUCTS // (n * n * (n + 2)))
        dim = next((d for d in dims_left if d <= most), dims[0])
        chosen.append((count, dim, n))
        for values_left, value, all_values in ((dims_left, dim, widest_first), (streams_left, n, fewest_first)):
            if value in values_left:
                values_left.remove(value)
            if not values_left:
                values_left += all_values
    return chosen


MOST_ITERATIONS = 10_000
"""As the rows have it."""
BYTES = 120
"""Memory for an element of x: float64 truths, float32 arrays, and all that an implementation keeps for its gradients.
`torch_impl` keeps up to 8.9 times x in bfloat16 (docs/performance.md)."""


def largest_here(jobs: int) -> int:
    """Elements of x that the memory which is free now holds, ``jobs`` times at once."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):  # with what the kernel would give up, such as cached files
                free = int(line.split()[1]) << 10
    except (OSError, ValueError):
        free = 4 << 30
    return max(1, free // (BYTES * jobs))


def sizes(form: str, largest: int, seed: int = 0) -> list[Size]:
    """The sizes of a form, small ones first.

    Args:
        form: one of `FORMS`.
        largest: elements of x that the memory holds; the short forms have a smaller limit of their own.
    """
    if form == "full":
        triples = covering(TOKENS, DIMS, STREAMS, largest)
    elif form == "quick":
        triples = once(TOKENS, DIMS, STREAMS, min(largest, QUICK_LARGEST))
    else:
        triples = [t for t in SHORT if t[0] * t[1] * t[2] <= largest]
    triples = sorted(triples, key=lambda t: (t[0] * t[1] * t[2], t))
    return [_size(number, triple, seed) for number, triple in enumerate(triples)]


SHORT = ((1, 4096, 4), (7, 640, 8), (129, 512, 4), (1025, 128, 3), (16, 7168, 2), (640, 128, 6))
"""One token; a width past 4096; T past 12, 128, 512 and 1024; 16 and 128 tokens to a tile; 6 and 8 streams."""


def _size(number: int, triple: tuple[int, int, int], seed: int) -> Size:
    tokens, dim, streams = triple
    ways = splits(tokens)
    batch, seq = ways[number % len(ways)]
    return Size(batch, seq, dim, streams, ITERATIONS[number % len(ITERATIONS)], seed)


def left_out(form: str, chosen: Iterable[Size]) -> list[str]:
    """Pairs of T with C and with n that no chosen size has; empty for the forms that don't promise them."""
    if form != "full":
        return []
    have = {pair for size in chosen for pair in _pairs((size.tokens, size.dim, size.streams))}
    wanted = [("T and C", t, c) for t in TOKENS for c in DIMS] + [("T and n", t, n) for t in TOKENS for n in STREAMS]
    return [f"{kind.replace(' and ', f' {a} and ')} {b}" for kind, a, b in wanted if (kind, a, b) not in have]
