"""What a model's figures warn of: for each warning its threshold, and the reason for it in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conformance.questions.health.quantities import SATURATED, Gate

if TYPE_CHECKING:
    from conformance.questions.health.measure import HeadHealth, SiteHealth, Stack

GAIN, OFF, CLOSED, UNLEARNED, STATIC = 2.0, 0.01, 0.99, 0.01, 1e-3
THRESHOLDS = {"gain": GAIN, "not-converged": OFF, "closed-gate": CLOSED, "unlearned": UNLEARNED, "static": STATIC}
"""For each warning the figure from which it fires."""
REASONS = {
    "gain": "the paper's mHC stays at 1.6 over 60 sites and unconstrained hyper-connections reach 3,000; a stream's "
    "signal or gradient has doubled, and grows with every further layer",
    "not-converged": "sums that all miss 1 by 0.01 on the same side make 1.01^60 = 1.8 of 1 over 60 sites; the logits "
    "are too sharp for so few iterations",
    "closed-gate": f"below {SATURATED:g} a sigmoid has less than 1/250 of its steepest slope, so that training hardly "
    "opens the gate again: the stream is neither read nor written here",
    "unlearned": "such an H does no more than separate residual streams, or their mean: it is where training starts",
    "static": "the projections or their scales are 0, as in an upcycled model before training; MaxText's initial scale "
    "of 0.01 moves the gates by 2.5e-3. Where both are 0, no gradient reaches either",
}
"""Why each is a problem."""


@dataclass(frozen=True)
class Warned:
    """One warning about one stack.

    Attributes:
        name: of the warning.
        stack: the sites that it is about.
        places: the sites or gates that it names, the worst first.
        value: the worst figure.
        threshold: what the figure was held against.
        said: the finding, in words.
        reason: why that is a problem.
    """

    name: str
    stack: str
    places: list[str]
    value: float
    threshold: float
    said: str
    reason: str


Found = tuple[list[tuple[str, float]], str] | None
"""Places with their figures, the worst first, and the finding in words."""


def of(stacks: Sequence[Stack], heads: Sequence[HeadHealth], p: Mapping[str, Any], tokens: int) -> list[Warned]:
    """All warnings, of each name at most one for each stack; heads belong to the stack of layers.

    Args:
        p: the dialect's parameters.
        tokens: how many were looked at.
    """
    warned: list[Warned] = []
    for stack in stacks:
        own = [head for head in heads if _ends(head.name, stack.name, stacks)]
        rules: dict[str, Callable[[], Found]] = {
            "gain": lambda stack=stack: _gain(stack),
            "not-converged": lambda stack=stack: _not_converged(stack, p),
            "closed-gate": lambda stack=stack, own=own: _closed(stack, own),
            "unlearned": lambda stack=stack: _unlearned(stack, p),
            "static": lambda stack=stack: _static(stack) if tokens > 1 else None,
        }
        for name, rule in rules.items():
            if found := rule():
                places, said = found
                where = [place for place, _ in places]
                warned.append(Warned(name, stack.name, where, places[0][1], THRESHOLDS[name], said, REASONS[name]))
    return warned


def _ends(head: str, stack: str, stacks: Sequence[Stack]) -> bool:
    """Whether a head reduces the streams of a stack: an mtp layer's its own, the model's those of the first stack."""
    return head.startswith(f"{stack}.") or ("." not in head and stack == stacks[0].name)


def _worst(figures: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    return sorted(figures, key=lambda pair: -pair[1])


def _gain(stack: Stack) -> Found:
    gains = [
        (site.name, side, value)
        for site, composite in zip(stack.sites, stack.composite, strict=True)
        for side, value in (("forward", composite.forward), ("backward", composite.backward))
    ]
    name, side, value = max(gains, key=lambda row: row[2])
    if not value > GAIN:
        return None
    return [(name, value)], f"the {side} gain of all sites up to {name} is {value:.3g}"


def _not_converged(stack: Stack, p: Mapping[str, Any]) -> Found:
    if p["residual"] != "sinkhorn":
        return None
    off = _worst([(site.name, site.gains.off) for site in stack.sites if site.gains.off > OFF])
    if not off:
        return None
    name, value = off[0]
    sharp = next(site.deviation for site in stack.sites if site.name == name)
    return off, (
        f"after {p['iterations']} iterations the sums of H miss 1 by {value:.2g} at {name}, whose logits deviate by "
        f"{sharp:.2g}, and by more than {OFF:g} at {len(off)} of {len(stack.sites)} sites"
    )


def _gates(site: SiteHealth) -> tuple[tuple[str, Gate], ...]:
    return ((f"{site.name} pre", site.pre), (f"{site.name} post", site.post))


def _closed(stack: Stack, heads: Sequence[HeadHealth]) -> Found:
    gates = [row for site in stack.sites for row in _gates(site)] + [(head.name, head.gate) for head in heads]
    closed = _worst(
        [
            (f"{name} {stream}", fraction)
            for name, gate in gates
            for stream, fraction in enumerate(gate.closed)
            if fraction >= CLOSED
        ]
    )
    if not closed:
        return None
    count = sum(len(gate.closed) for _, gate in gates)
    return (
        closed,
        f"{len(closed)} of {count} gates {'is' if len(closed) == 1 else 'are'} closed for at least {CLOSED:.0%} of the "
        f"tokens: {_listed(closed)}",
    )


def _unlearned(stack: Stack, p: Mapping[str, Any]) -> Found:
    if p["residual"] == "identity" or p["streams"] == 1:
        return None
    for name, figure in (("the identity", "from_identity"), ("1/n", "from_uniform")):
        distances = [(site.name, float(getattr(site.matrix, figure))) for site in stack.sites]
        if all(value < UNLEARNED for _, value in distances):
            return _worst(distances), f"H is at {name} at every site, within {max(v for _, v in distances):.2g}"
    return None


def _static(stack: Stack) -> Found:
    spreads = [(site.name, max(site.pre.spread, site.post.spread, site.matrix.spread)) for site in stack.sites]
    if any(value >= STATIC for _, value in spreads):
        return None
    largest = max(value for _, value in spreads)
    return _worst(spreads), f"the coefficients are the same for every token at every site, within {largest:.2g}"


def _listed(places: Sequence[tuple[str, float]], most: int = 4) -> str:
    named = ", ".join(place for place, _ in places[:most])
    return named + (f" and {len(places) - most} more" if len(places) > most else "")
