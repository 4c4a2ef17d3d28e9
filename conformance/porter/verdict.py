"""What a port can be, from the parameters of the two dialects alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EXACT, ROUNDING, APPROXIMATE, IMPOSSIBLE = "exact", "exact to rounding", "approximate", "impossible"
KINDS = (EXACT, ROUNDING, APPROXIMATE, IMPOSSIBLE)
NAMES = {
    "norm_eps": "the norm's eps", "norm_eps_position": "where the norm's eps is added", "order": "Sinkhorn's order",
    "guard": "Sinkhorn's guard", "eps": "Sinkhorn's eps", "iterations": "Sinkhorn's iterations", "pre_eps": "pre_eps",
    "post_scale": "post_scale", "post_eps": "post_eps",
}  # fmt: skip


@dataclass(frozen=True)
class Reason:
    """One difference between two dialects, and what it makes of a port.

    Attributes:
        step: what is done to the weights for it (`convert`), empty for nothing.
    """

    kind: str
    text: str
    step: str = ""


@dataclass(frozen=True)
class Verdict:
    """The worst of its reasons."""

    reasons: tuple[Reason, ...]

    @property
    def kind(self) -> str:
        return max((r.kind for r in self.reasons), key=KINDS.index, default=EXACT)

    @property
    def steps(self) -> tuple[str, ...]:
        return tuple(r.step for r in self.reasons if r.step)

    def __str__(self) -> str:
        why = "; ".join(r.text for r in self.reasons if r.kind == self.kind and r.text)
        return f"{self.kind}: {why}" if why else self.kind


def derive(
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    streams: int,
    *,
    narrowed: str = "",
    head_lost: bool = False,
    unfolded: bool = False,
    zero_norm: bool = False,
) -> Verdict:
    """The verdict on porting weights of one dialect to another.

    Args:
        source, target: all parameters (mathematics.md, "Dialects").
        streams: n; with a single stream order and mix make no difference.
        narrowed: the narrower dtype that the weights are stored in, if they are.
        head_lost: the source has a head and the target has no place for it, or reduces otherwise.
        unfolded: φ is divided by a given norm weight.
        zero_norm: that norm weight has zeros.
    """
    reasons: list[Reason] = []
    if source["residual"] != target["residual"]:
        reasons.append(Reason(IMPOSSIBLE, _residuals(source["residual"], target["residual"])))
        return Verdict(tuple(reasons))
    if source["norm_weight"] and not target["norm_weight"]:
        reasons.append(Reason(ROUNDING, "the norm weight w is folded into φ", "fold"))
    elif target["norm_weight"] and not source["norm_weight"]:
        if unfolded and zero_norm:
            reasons.append(Reason(IMPOSSIBLE, "φ can't be divided by a norm weight that has zeros"))
        elif unfolded:
            reasons.append(Reason(ROUNDING, "φ is divided by the given norm weight w", "unfold"))
        else:
            reasons.append(Reason(EXACT, "the norm weight is set to 1", "ones"))
    reasons += _orientation(source, target, streams)
    no_norm_eps = source["norm_eps"] == target["norm_eps"] == 0
    for key in ("norm_eps", "norm_eps_position", "guard", "eps", "iterations", "pre_eps", "post_scale", "post_eps"):
        if source[key] != target[key] and not (key == "norm_eps_position" and no_norm_eps):
            reasons.append(Reason(APPROXIMATE, f"{NAMES[key]} {source[key]} becomes {target[key]}"))
    moved = [key for key in ("coefficients", "mixing") if source[key] != target[key]]
    if moved:
        where = {"float32": "in float32", "activation": "in the dtype of x"}[target[moved[0]]]
        reasons.append(
            Reason(ROUNDING, f"the target keeps {' and '.join(moved)} {where}: it rounds elsewhere when it runs")
        )
    if narrowed:
        reasons.append(Reason(ROUNDING, f"weights are stored in {narrowed}", "cast"))
    if head_lost:
        reasons.append(Reason(APPROXIMATE, "the head is left out: the target has no place for it"))
    return Verdict(tuple(reasons))


def _residuals(source: str, target: str) -> str:
    columns = {"sinkhorn": "n*n columns", "permutations": "n! columns", "identity": "no residual columns"}
    return f"{columns[source]} ({source}) can't become {columns[target]} ({target})"


def _orientation(source: Mapping[str, Any], target: Mapping[str, Any], streams: int) -> list[Reason]:
    """Whether H or its transpose mixes, and which axis is normalised first."""
    turned = source["mix"] != target["mix"] and streams > 1
    reordered = source["order"] != target["order"] and streams > 1
    if turned and (source["residual"] == "permutations" or reordered):
        how = "the permutations are inverted" if source["residual"] == "permutations" else "the orders are the reverse"
        return [Reason(EXACT, f"H is transposed: the residual logits are, and {how}", "transpose")]
    if turned and streams == 2:
        text = (
            "H is transposed; of two streams a converged H is its own transpose, so that the logits are copied, and "
            "only what Sinkhorn leaves unconverged differs"
        )
        return [Reason(APPROXIMATE, text)]
    if turned:
        text = (
            "H is transposed: the residual logits are, which is nearer than copying them, but a finite Sinkhorn "
            "normalises the other axis last"
        )
        return [Reason(APPROXIMATE, text, "transpose")]
    if reordered:
        return [Reason(APPROXIMATE, f"{NAMES['order']} {source['order']} becomes {target['order']}")]
    return []
