"""Derives the verdict on a port from the parameters of the two dialects alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

EXACT, ROUNDING, APPROXIMATE, IMPOSSIBLE = "exact", "exact to rounding", "approximate", "impossible"
PARTIAL = "partial"
"""The verdict on a port that leaves tensors out, whatever the port is for the rest."""
KINDS = (EXACT, ROUNDING, APPROXIMATE, IMPOSSIBLE)
NAMES = {
    "norm_eps": "the norm's eps", "norm_eps_position": "where the norm's eps is added", "order": "Sinkhorn's order",
    "softmax": "the axis of Sinkhorn's softmax", "guard": "Sinkhorn's guard", "eps": "Sinkhorn's eps",
    "iterations": "Sinkhorn's iterations", "logit_limit": "the limit of the residual logits", "pre_eps": "pre_eps",
    "post_scale": "post_scale", "post_eps": "post_eps",
}  # fmt: skip
VALUES = ("norm_eps", "norm_eps_position", "guard", "eps", "iterations", "logit_limit", "pre_eps", "post_scale",
          "post_eps")  # fmt: skip
"""Parameters with which the function changes."""
ROUNDED = {"coefficients": "coefficients", "matrix": "Sinkhorn's passes", "mixing": "mixing",
           "reduction": "the sum over streams"}  # fmt: skip
"""Parameters that only say where values are rounded."""
READS = {
    "previous": "a site reads with the previous site's pre, and no longer with its own",
    "own": "a site reads with its own pre, and no longer with the previous site's",
}
FIRST = {"rows-first": "rows", "columns-first": "columns"}
MIRRORED = {"rows": "columns", "columns": "rows", "rows-first": "columns-first", "columns-first": "rows-first"}


@dataclass(frozen=True)
class Reason:
    """One difference between two dialects, and the kind of port that it makes.

    Attributes:
        step: the step that `convert` takes for it; empty if the weights stay as they are.
    """

    kind: str
    text: str
    step: str = ""


@dataclass(frozen=True)
class Verdict:
    """The verdict is the worst of its reasons."""

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
    head: bool | None = None,
    head_lost: str = "",
    unfolded: bool = False,
    zero_norm: bool = False,
) -> Verdict:
    """The verdict on porting weights of one dialect to another.

    Args:
        source, target: all parameters (docs/mathematics.md, "Dialects").
        streams: n; with a single stream order and mix make no difference.
        narrowed: the narrower dtype that the weights are stored in, if they are.
        head: whether a head is ported; if None, one is ported if one of the dialects reduces by a head.
        head_lost: why the source's head is lost, in words; empty if it isn't.
        unfolded: whether φ is divided by a given norm weight.
        zero_norm: whether that norm weight has zeros.
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
    for key in VALUES:
        if source[key] != target[key] and not (key == "norm_eps_position" and no_norm_eps):
            reasons.append(Reason(APPROXIMATE, f"{NAMES[key]} {source[key]} becomes {target[key]}"))
    if source["pre_from"] != target["pre_from"]:
        reasons.append(Reason(APPROXIMATE, READS[target["pre_from"]]))
    if head or (head is None and "head" in (source["reduce"], target["reduce"])):
        reasons += _head(source, target)
    reasons += _roundings(source, target)
    if narrowed:
        reasons.append(Reason(ROUNDING, f"weights are stored in {narrowed}", "cast"))
    if head_lost:
        reasons.append(Reason(APPROXIMATE, f"the head is left out: {head_lost}"))
    return Verdict(tuple(reasons))


def _residuals(source: str, target: str) -> str:
    columns = {"sinkhorn": "n*n columns", "permutations": "n! columns", "identity": "no residual columns"}
    return f"{columns[source]} ({source}) can't become {columns[target]} ({target})"


def _head(source: Mapping[str, Any], target: Mapping[str, Any]) -> list[Reason]:
    """The reason that comes from the head's own norm eps; if neither dialect has one, the norm's eps is enough."""
    if source["head_norm_eps"] is None and target["head_norm_eps"] is None:
        return []
    before, after = (p["norm_eps"] if p["head_norm_eps"] is None else p["head_norm_eps"] for p in (source, target))
    return [] if before == after else [Reason(APPROXIMATE, f"the head's norm eps {before} becomes {after}")]


def _roundings(source: Mapping[str, Any], target: Mapping[str, Any]) -> list[Reason]:
    reasons: list[Reason] = []
    in_float32, in_narrow = "in float32", "in the dtype of x"
    for value, where, where_before in (("float32", in_float32, in_narrow), ("activation", in_narrow, in_float32)):
        moved = [name for key, name in ROUNDED.items() if source[key] != target[key] == value]
        if moved:
            names = " and ".join(filter(None, (", ".join(moved[:-1]), moved[-1])))
            text = f"at run time the target computes {names} {where}, and the source {where_before}"
            reasons.append(Reason(ROUNDING, text))
    return reasons


def _orientation(source: Mapping[str, Any], target: Mapping[str, Any], streams: int) -> list[Reason]:
    """The reasons that come from the orientation of H and from the axes of Sinkhorn's start and passes.

    Transposing the logits transposes H only if the target's softmax and order are the source's with rows and columns
    exchanged: only then are the 2N passes (2N - 1 if the softmax is one of them) the same.
    """
    if source["residual"] == "identity":
        return []
    if streams == 1:
        return _of_one_stream(source, target)
    turned = source["mix"] != target["mix"]
    if source["residual"] == "permutations":
        text = "H is transposed: the residual logits are, and the permutations are inverted"
        return [Reason(EXACT, text, "transpose")] if turned else []
    wanted = _mirrored(source) if turned else source
    alike = (_start(wanted), wanted["order"]) == (_start(target), target["order"])
    if alike:
        return _aligned(wanted, target, turned)
    if turned and streams == 2:
        text = (
            "H is transposed; of two streams a converged H is its own transpose, so that the logits are copied, and "
            "only what Sinkhorn leaves unconverged differs"
        )
        return [Reason(APPROXIMATE, text)]
    if turned:
        text = (
            "H is transposed: the residual logits are, which is nearer than copying them, but a finite Sinkhorn "
            "normalises the other axis last, or starts from another one"
        )
        return [Reason(APPROXIMATE, text, "transpose")]
    return [_changed(key, source, target) for key in ("softmax", "order") if source[key] != target[key]]


def _aligned(wanted: Mapping[str, Any], target: Mapping[str, Any], turned: bool) -> list[Reason]:
    """The reasons if the passes are the same, after H is transposed if it must be."""
    reasons: list[Reason] = []
    if turned:
        text = "H is transposed: the residual logits are, and softmax and order are the reverse"
        reasons.append(Reason(EXACT, text, "transpose"))
    if wanted["softmax"] != target["softmax"]:
        text = "the softmax is the first pass of a Sinkhorn without one: the same function, rounded elsewhere"
        reasons.append(Reason(ROUNDING, text))
    return reasons


def _mirrored(p: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters whose H is the transpose of p's, on transposed logits."""
    return {**p, **{key: MIRRORED.get(p[key], p[key]) for key in ("softmax", "order")}}


def _start(p: Mapping[str, Any]) -> str:
    """The axis of the softmax, or of the first pass if that equals a softmax because no guard changes it.

    Without a softmax the sums of the first pass are at least 1, since the largest entry is exp(0).
    """
    plain = p["guard"] == "none" or (p["guard"] == "clip" and p["eps"] <= 1)
    return FIRST[p["order"]] if p["softmax"] == "none" and plain else p["softmax"]


def _changed(key: str, source: Mapping[str, Any], target: Mapping[str, Any]) -> Reason:
    return Reason(APPROXIMATE, f"{NAMES[key]} {source[key]} becomes {target[key]}")


def _of_one_stream(source: Mapping[str, Any], target: Mapping[str, Any]) -> list[Reason]:
    """The reasons with one stream, where H is a number that no logit moves; axes may change how often it is divided."""
    if source["residual"] != "sinkhorn" or _alone(source) == _alone({**source, **_axes(target)}):
        return []
    return [_changed(key, source, target) for key in ("softmax", "order") if source[key] != target[key]]


def _axes(p: Mapping[str, Any]) -> dict[str, Any]:
    return {key: p[key] for key in ("softmax", "order")}


def _alone(p: Mapping[str, Any]) -> float:
    """The only entry of H if there is one stream."""
    value = 1 + p["eps"] if p["guard"] == "add" else 1.0
    for _ in range(2 * p["iterations"] - (p["softmax"] == FIRST[p["order"]])):
        value /= {"none": value, "clip": max(value, p["eps"])}.get(p["guard"], value + p["eps"])
    return value
