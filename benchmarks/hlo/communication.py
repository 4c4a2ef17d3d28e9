"""How much a sharded layer has to send, and what a compiled program sends beyond it.

With dim on ``tensor``, each token's n*n + 2n projections and its sum of squares are partial sums: one all-reduce a site
adds them up, and backward the cotangents of pre, post and H. With the parameters on ``fsdp``, they are gathered where
they are used and their gradients scattered. Over data, fsdp and sequence the gradients of the parameters are added
up: at once, but with fsdp and copies the scattered ones over the copies, and those that every device has over all.
Where the norm's output is rounded, its sum is added up on its own, forward and backward. Nothing else: in particular
nothing as large as x.

A single-pass site (``pre_from="previous"``) sends no more and no less: the pre that it is handed, and the one that it
hands on, are whole on every device, and backward the cotangent of the carried pre takes the place of its own. The
reduction of a stack with the last pre adds up that pre's cotangent, n numbers a token, and nothing forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hlo.collectives import Collective


@dataclass(frozen=True)
class SiteSize:
    """One layer on one device.

    Attributes:
        tokens: on the device.
        streams, dim: of the whole x.
        columns: of the three projections together, n*n + 2n with Sinkhorn.
        norm_weight: whether there is one.
        rounded: whether the norm's output is rounded, so that its sum has to be added up first.
    """

    tokens: int
    streams: int
    dim: int
    columns: int
    norm_weight: bool = False
    rounded: bool = False


def surplus(
    found: Sequence[Collective], site: SiteSize, mesh: Mapping[str, int], *, backward: bool, sites: int = 1
) -> list[str]:
    """What a program sends beyond the need of ``sites`` layers, a line each; empty where it sends no more.

    Args:
        mesh: sizes of data, fsdp, sequence and tensor.
        backward: whether the program also computes gradients.
    """
    tensor, fsdp = mesh["tensor"], mesh["fsdp"]
    copies = mesh["data"] * mesh["sequence"]
    weights = (site.columns + site.norm_weight) * site.streams * site.dim // tensor
    small = 2 * site.columns  # scales and shifts, a number for each column
    kinds = {
        "all-reduce": tensor > 1 or (backward and copies * fsdp > 1),
        "all-gather": fsdp > 1,
        "reduce-scatter": fsdp > 1 and backward,
    }
    problems = [
        f"not needed: {one.kind} of {', '.join(one.shapes)} x {one.times}, from {one.source or 'no named operation'}"
        for one in found
        if not kinds.get(one.kind)
    ]

    def sent(kind: str) -> tuple[int, int]:
        of_kind = [one for one in found if one.kind == kind]
        return sum(one.times for one in of_kind), sum(one.times * one.numbers for one in of_kind)

    rounds = (2 if site.rounded else 1) * (tensor > 1)
    sums = site.tokens * (site.columns + 1) * (tensor > 1)
    if not backward and sent("all-reduce") != (rounds * sites, sums * sites):
        count, numbers = sent("all-reduce")
        problems.append(f"expected {rounds * sites} all-reduce of {sums * sites} numbers, got {count} of {numbers}")
    if backward:
        reduced = (copies * fsdp > 1) + (copies > 1 and fsdp > 1)
        most = rounds * 2 + (tensor > 1) + reduced
        cotangents = site.tokens * (site.columns + site.rounded) * (tensor > 1)
        limit = sums + cotangents + weights // fsdp * (copies > 1) + small * (reduced > 0)
        count, numbers = sent("all-reduce")
        if count > most * sites or numbers > limit * sites:
            problems.append(
                f"expected at most {most * sites} all-reduces of {limit * sites} numbers, got {count} of {numbers}"
            )
    for kind, limit in (("all-gather", weights), ("reduce-scatter", weights // fsdp)):
        _, numbers = sent(kind)
        if kinds[kind] and numbers > limit * sites:
            problems.append(f"expected {kind} of at most {limit * sites} numbers, got {numbers}")
    return problems
