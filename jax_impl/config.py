"""The parameters of the layer; every dialect is a row of values for them."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, TypeGuard

CHOICES = {
    "norm_eps_position": ("mean", "root"),
    "residual": ("sinkhorn", "permutations", "identity"),
    "order": ("rows-first", "columns-first"),
    "softmax": ("rows", "columns", "none"),
    "guard": ("none", "add", "denominator", "clip"),
    "mix": ("in-out", "out-in", "identity"),
    "pre_from": ("own", "previous"),
    "coefficients": ("float32", "activation"),
    "matrix": ("float32", "activation"),
    "mixing": ("float32", "activation"),
    "reduce": ("sum", "mean", "head", "carried", "none"),
    "reduction": ("float32", "activation"),
}
MOST_ITERATIONS = 10_000  # each is a step of its own, forward and backward: more is a mistake, and never ends
MOST_PERMUTED = 5  # 6! = 720 columns of the projection are out of proportion
SINKHORN = {"order": "columns-first", "softmax": None, "guard": "none", "eps": 0.0, "iterations": 20}
FIRST = {"rows-first": "rows", "columns-first": "columns"}


@dataclasses.dataclass(frozen=True)
class MHCConfig:
    """Parameters of one layer; the defaults are the paper's (arXiv:2512.24880).

    docs/mathematics.md has the equations: "Forward", "The residual matrix", "Single pass" and "Precision"; "Dialects"
    has the values of every published layer. No number has a unit.

    Args:
        streams: the residual streams n; an integer of at least 1.
        dim: the width C of one stream; an integer of at least 1.
        norm_weight: whether the norm multiplies by a weight w ``[streams, dim]``.
        norm_eps: added in the norm, to the mean of the squares or to the root (``norm_eps_position``); at least 0.
        norm_eps_position: ``"mean"``: ``x / sqrt(mean(x^2) + norm_eps)``; ``"root"``: ``x / (sqrt(mean(x^2)) +
            norm_eps)``.
        residual: how H comes from its logits: ``"sinkhorn"``; ``"permutations"``, a softmax over the n! permutation
            matrices, with at most 5 streams; ``"identity"``, H is the identity and there are no logits.
        softmax: the axis of the softmax that Sinkhorn starts from: ``"rows"``, ``"columns"``, or ``"none"`` for ``exp(L
            - max L)``. None means the axis that ``order`` normalises first.
        order: the two passes of an iteration: ``"rows-first"`` or ``"columns-first"``. None means ``"columns-first"``.
        guard: where eps enters Sinkhorn, with s for a sum: ``"none"``: divides by s; ``"add"``: eps is added to the
            softmax and to every s; ``"denominator"``: to every s alone; ``"clip"``: divides by ``max(s, eps)``. None
            means ``"none"``.
        eps: the eps of ``guard``; 0 with ``"none"``, else positive. None means 0.
        iterations: Sinkhorn's iterations N, of two passes each; 1 to 10,000. None means 20.
        logit_limit: clips every logit of H to ``[-logit_limit, logit_limit]``; positive, or None for no limit.
        pre_eps: ``pre = sigmoid(z) + pre_eps``, also for the gates of the head; at least 0.
        post_scale: ``post = post_scale * sigmoid(z) + post_eps``; positive.
        post_eps: see ``post_scale``; at least 0.
        mix: the index of H that is summed over: ``"in-out"``: ``sum_i H[i, j] x_i``; ``"out-in"``: ``sum_i H[j, i]
            x_i``, the paper's H x; ``"identity"`` with ``residual="identity"`` alone. None means ``"out-in"``, or
            ``"identity"`` with that residual.
        pre_from: the gates that u is read with: ``"own"``, this site's, or ``"previous"``, those of the site before (a
            single-pass stack).
        coefficients: ``"float32"`` keeps the norm's output, the projections, pre, post and H in float32 (float64 for
            float64); ``"activation"`` rounds each of them to x's dtype.
        matrix: ``"float32"`` runs Sinkhorn's passes in float32; ``"activation"`` rounds every step to x's dtype, and
            goes with ``coefficients="activation"`` and Sinkhorn alone.
        mixing: ``"float32"`` rounds the streams once, after the sum; ``"activation"`` rounds post, H and both terms to
            x's dtype. None means as ``coefficients``, whose ``"activation"`` needs this one's.
        reduce: how a model reduces its streams at the end: ``"sum"``, ``"mean"``, ``"head"`` (learned gates),
            ``"carried"`` (by the last pre, with ``pre_from="previous"`` alone), or ``"none"``. None means ``"carried"``
            or ``"sum"``.
        reduction: the sum or mean over the streams at the end: ``"float32"`` rounds it once, ``"activation"`` after
            every addition.
        head_norm_eps: the norm_eps of the head; at least 0. None means ``norm_eps``.

    ``softmax``, ``order``, ``guard``, ``eps``, ``iterations`` and ``logit_limit`` belong to ``residual="sinkhorn"`` and
    stay None for the others.

    Raises:
        ValueError: a value, or a combination, that no layer can have.
    """

    streams: int
    dim: int
    _: dataclasses.KW_ONLY
    norm_weight: bool = False
    norm_eps: float = 1e-20
    norm_eps_position: str = "mean"
    residual: str = "sinkhorn"
    softmax: str | None = None
    order: str | None = None
    guard: str | None = None
    eps: float | None = None
    iterations: int | None = None
    logit_limit: float | None = None
    pre_eps: float = 0.0
    post_scale: float = 2.0
    post_eps: float = 0.0
    mix: str | None = None
    pre_from: str = "own"
    coefficients: str = "float32"
    matrix: str = "float32"
    mixing: str | None = None
    reduce: str | None = None
    reduction: str = "float32"
    head_norm_eps: float | None = None

    def __post_init__(self) -> None:
        if self.residual == "sinkhorn":
            for name, value in SINKHORN.items():
                self._default(name, value)
            self._default("softmax", FIRST.get(str(self.order)))
        self._default("mix", "identity" if self.residual == "identity" else "out-in")
        self._default("mixing", self.coefficients)
        self._default("reduce", "carried" if self.pre_from == "previous" else "sum")
        self._check()

    def _default(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check(self) -> None:
        for name in ("streams", "dim", *(("iterations",) if self.residual == "sinkhorn" else ())):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.residual == "sinkhorn" and self.iterations is not None and self.iterations > MOST_ITERATIONS:
            raise ValueError(f"iterations must be at most {MOST_ITERATIONS}, got {self.iterations}")
        if type(self.norm_weight) is not bool:
            raise ValueError(f"norm_weight must be True or False, got {self.norm_weight!r}")
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (value is None and name in SINKHORN and self.residual != "sinkhorn"):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("norm_eps", "pre_eps", "post_scale", "post_eps", "eps", "logit_limit", "head_norm_eps"):
            value = getattr(self, name)
            if value is None and name in ("eps", "logit_limit", "head_norm_eps"):
                continue
            positive = name in ("post_scale", "logit_limit")
            if not _is_finite(value) or value < 0 or (positive and value == 0):
                kind = "positive" if positive else "non-negative"
                raise ValueError(f"{name} must be a finite {kind} number, got {value!r}")
        if self.residual != "sinkhorn":
            sinkhorns = [name for name in (*SINKHORN, "logit_limit") if getattr(self, name) is not None]
            if sinkhorns:
                raise ValueError(
                    f"{', '.join(sinkhorns)} must be None for residual={self.residual!r}: only Sinkhorn has them"
                )
        elif (self.guard == "none") != (self.eps == 0):
            raise ValueError(
                f"eps must be 0 with guard 'none' and positive with any other, got {self.eps!r} with {self.guard!r}"
            )
        if self.guard == "add" and self.softmax == "none":
            raise ValueError("guard='add' adds eps to a softmax, and softmax='none' has none: use guard='denominator'")
        if self.residual == "permutations" and self.streams > MOST_PERMUTED:
            raise ValueError(f"streams must be at most {MOST_PERMUTED} for residual='permutations', got {self.streams}")
        if (self.mix == "identity") != (self.residual == "identity"):
            raise ValueError(
                f"mix='identity' goes with residual='identity' alone, got {self.mix!r} with {self.residual!r}"
            )
        if self.coefficients == "activation" and self.mixing != "activation":
            raise ValueError(f"mixing must be 'activation' where coefficients is, got {self.mixing!r}")
        if self.matrix == "activation" and (self.coefficients != "activation" or self.residual != "sinkhorn"):
            raise ValueError(
                "matrix='activation' rounds Sinkhorn's passes where the coefficients are rounded: it goes with "
                f"residual='sinkhorn' and coefficients='activation', got {self.residual!r} and {self.coefficients!r}"
            )
        if (self.pre_from == "previous") != (self.reduce == "carried"):
            raise ValueError(
                f"reduce='carried' goes with pre_from='previous' alone, got {self.reduce!r} with {self.pre_from!r}"
            )
        if self.pre_from == "previous" and self.coefficients != "float32":
            raise ValueError(
                f"coefficients must be 'float32' where pre_from='previous' hands them on, got {self.coefficients!r}"
            )

    @property
    def residual_columns(self) -> int:
        """Columns of the residual projection: n*n, n! or none."""
        if self.residual == "identity":
            return 0
        return math.factorial(self.streams) if self.residual == "permutations" else self.streams**2

    def parameters(self) -> dict[str, Any]:
        """All parameters as a plain dict; `from_parameters` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_parameters(cls, parameters: dict[str, Any]) -> MHCConfig:
        """The configuration with these parameters, as a checkpoint's metadata states them.

        Raises:
            ValueError: an unknown or a missing name, or an invalid value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown, missing = sorted(set(parameters) - known), sorted({"streams", "dim"} - set(parameters))
        if unknown or missing:
            raise ValueError(
                f"parameters: unknown {unknown or 'none'}, missing {missing or 'none'}; known are {sorted(known)}"
            )
        return cls(**parameters)

    @classmethod
    def from_dialect(cls, name: str, *, streams: int, dim: int, **overrides: Any) -> MHCConfig:
        """The configuration of a published dialect (docs/mathematics.md, "Dialects").

        Args:
            name: a row of ``fixtures/dialects.json``.
            streams, dim: n and C.
            overrides: parameters that depart from the row.

        Raises:
            ValueError: an unknown dialect or parameter, or an invalid combination.
        """
        rows = dialects()
        if name not in rows:
            raise ValueError(f"dialect must be one of {', '.join(rows)}, got {name!r}")
        return cls.from_parameters({**rows[name], **overrides, "streams": streams, "dim": dim})


def _is_finite(value: Any) -> TypeGuard[float]:
    """Whether a value is a number, and one that a float can be."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


@functools.cache
def dialects() -> dict[str, dict[str, Any]]:
    """The parameters of every published dialect, from the fixtures beside this package."""
    home = Path(__file__).resolve().parent.parent
    places = [home / "fixtures" / "dialects.json", home / "mhc_fixtures" / "dialects.json"]
    for place in places:
        if place.is_file():
            rows = json.loads(place.read_text())["dialects"]
            return {name: {k: v["value"] for k, v in row["parameters"].items()} for name, row in rows.items()}
    raise FileNotFoundError(f"dialects.json is neither at {places[0]} nor at {places[1]}: reinstall the package")
