"""The functions that are tried: every row, and each with one or two changes.

A change is what it sets and the words for it: parameters of a dialect, or what `forward.STRUCTURE` names. What an
implementation doesn't claim can't be told: candidates that agree in everything that the compared outputs depend on are
one candidate.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conformance.questions.identifying.forward import STRUCTURE

Parameters = Mapping[str, Any]

NORM = ("norm_weight", "norm_eps", "norm_eps_position", "norm_over", "norm_scale", "flattening")
LOGITS = ("alpha", "bias", "slices")
MATRIX = (
    "residual", "softmax", "order", "guard", "eps", "iterations", "logit_limit", "start", "passes", "logits", "H",
)  # fmt: skip
PRE = (*NORM, *LOGITS, "pre_eps")
POST = (*NORM, *LOGITS, "post_scale", "post_eps", "post_gate")
MIXING = ("mix", "mixed_by", "gated_by")
LAYER = (*PRE, *POST, *MATRIX, *MIXING, "pre_from", "reads")
DEPENDS: dict[tuple[str, str], tuple[str, ...]] = {
    ("residual_matrix", "H"): MATRIX,
    ("coefficients", "pre"): PRE,
    ("coefficients", "post"): POST,
    ("coefficients", "H"): (*NORM, *LOGITS, *MATRIX),
    ("pre", "u"): (*PRE, "pre_from", "reads", "reads_alone"),
    ("pre", "pre"): PRE,
    ("post", "out"): MIXING,
    ("layer", "out"): (*LAYER, "reads_alone"),
    ("layer", "pre"): PRE,
    ("stack", "out"): (*LAYER, "first_carried", "reduces"),
    ("reduce", "out"): ("reduces",),
    ("head", "out"): (
        "norm_eps", "norm_eps_position", "norm_over", "flattening", "head_norm_eps", "pre_eps", "head_eps", "alpha",
    ),
}  # fmt: skip
"""What the value of each output of a stage depends on; its precision is another matter (`precision`)."""

INHERITED = {"head_norm_eps": "norm_eps", "head_eps": "pre_eps"}
"""What the head has of its own, unless it is None, and where it takes it from otherwise."""

MATHEMATICS = (
    "norm_weight", "norm_eps", "norm_eps_position", "residual", "softmax", "order", "guard", "eps", "iterations",
    "logit_limit", "pre_eps", "post_scale", "post_eps", "mix", "pre_from",
)  # fmt: skip
"""Parameters of a dialect that change the true value of a layer; the others are its precision and the reduction."""


@dataclass(frozen=True)
class Change:
    """One mistake, or one choice that is another dialect's."""

    words: str
    sets: Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A function that the implementation might compute.

    Attributes:
        dialect: the row that it starts from.
        parameters: the row's, with the changes made, and all of `forward.STRUCTURE`.
        changes: what differs from that row, in words; empty for the row itself.
        same: other rows that are the same in everything that can be told.
    """

    dialect: str
    parameters: Parameters = field(compare=False)
    changes: tuple[str, ...] = ()
    same: tuple[str, ...] = field(default=(), compare=False)

    @property
    def words(self) -> str:
        return f"{self.dialect}, except: {'; '.join(self.changes)}" if self.changes else self.dialect


def relevant(outputs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """What (stage, output) pairs depend on, in a fixed order."""
    return tuple(dict.fromkeys(name for output in outputs for name in DEPENDS.get(output, ())))


def same_layer(a: Parameters, b: Parameters) -> bool:
    """Whether two dialects compute the same function, whatever their precision and reduction."""
    return all(a[k] == b[k] for k in MATHEMATICS)


class Functions:
    """All candidates for one implementation, without repetitions.

    Args:
        told: the row that the implementation was told to compute.
        rows: every row that takes the same weights.
        known: what can be told of it, from `relevant`.
    """

    def __init__(self, told: str, rows: Mapping[str, Parameters], known: Sequence[str]):
        weightless = () if rows[told]["norm_weight"] else ("norm_weight", "norm_scale")
        self.told, self.known = told, tuple(name for name in known if name not in weightless)
        self.rows = {name: {**STRUCTURE, **rows[name]} for name in (told, *rows)}
        self._seen: set[tuple[Any, ...]] = set()

    def key(self, p: Parameters) -> tuple[Any, ...]:
        """Equal for two functions that can't differ in what is known."""
        inherited = {own: p[layers] for own, layers in INHERITED.items() if p[own] is None}
        return tuple({**p, **inherited}[name] for name in self.known)

    def of_rows(self) -> list[Candidate]:
        """The rows as they are, the told one first; those that can't be told apart as one."""
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, p in self.rows.items():
            groups.setdefault(self.key(p), []).append(name)
        self._seen |= set(groups)
        return [Candidate(first, self.rows[first], (), tuple(same)) for first, *same in groups.values()]

    def by_weights(self, candidates: Iterable[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
        """Those that use a norm weight if the told row does, and those that would ignore it."""
        uses = self.rows[self.told]["norm_weight"]
        own = [c for c in candidates if c.parameters["norm_weight"] or not uses]
        return own, [c for c in candidates if c not in own]

    def with_one_change(self, dialects: Iterable[str]) -> list[Candidate]:
        """Each of these rows with every change that shows."""
        return list(self._new((name, (change,)) for name in dialects for change in self.changes(name)))

    def with_two_changes(self, dialect: str, changes: Sequence[Change]) -> list[Candidate]:
        """A row with every pair of these changes that don't contradict each other; promising changes come first."""
        pairs = sorted(itertools.combinations(range(len(changes)), 2), key=sum)
        chosen = ((changes[i], changes[j]) for i, j in pairs)
        return list(self._new((dialect, pair) for pair in chosen if not set(pair[0].sets) & set(pair[1].sets)))

    def changes(self, dialect: str) -> list[Change]:
        """Every change of a row in something that can be told."""
        p = self.rows[dialect]
        return [
            c for c in every_change(p) if set(c.sets) & set(self.known) and any(p[k] != v for k, v in c.sets.items())
        ]

    def changed(self, dialect: str, *changes: Change) -> Candidate:
        """A row with some changes made."""
        p = functools.reduce(lambda q, change: {**q, **change.sets}, changes, self.rows[dialect])
        return Candidate(dialect, p, tuple(change.words for change in changes))

    def _new(self, wanted: Iterable[tuple[str, tuple[Change, ...]]]) -> Iterator[Candidate]:
        for name, changes in wanted:
            candidate = self.changed(name, *changes)
            key = self.key(candidate.parameters)
            if key not in self._seen:
                self._seen.add(key)
                yield candidate


def every_change(p: Parameters) -> Iterator[Change]:
    """One change at a time, and what it is in words."""
    if p["residual"] == "sinkhorn":
        yield from _of_sinkhorn(p)
    yield from _of_matrix(p)
    yield from _of_norm(p)
    yield from _of_gates(p)
    yield from _of_layer(p)


EPS = (0.0, 1e-20, 1e-12, 1e-8, 1e-7, 2.0**-23, 1e-6, 1e-5, 1e-4, 1e-3)
GUARDS = {
    "none": "no eps",
    "add": "eps added",
    "denominator": "eps added to the denominators alone",
    "softmax alone": "eps added to the softmax alone",
    "clip": "eps as a floor",
}


def _of_sinkhorn(p: Parameters) -> Iterator[Change]:
    first, last = ("rows", "columns") if p["order"] == "rows-first" else ("columns", "rows")
    mirrored = {"rows": "columns", "columns": "rows", "none": "none"}[p["softmax"]]
    other = f"{last}-first"
    yield Change(f"order {other}, not {p['order']}", {"order": other, "softmax": mirrored})
    if p["softmax"] == "none":
        yield Change(f"a softmax over {last} at the start", {"softmax": last})
    else:
        yield Change(f"softmax over {mirrored}, not {p['softmax']}", {"softmax": mirrored})
        yield Change(
            f"softmax over {mirrored}, not {p['softmax']}, and the other passes as they were", {"start": "other axis"}
        )
    if p["softmax"] != "none" and not (p["softmax"] == first and p["guard"] in ("none", "clip")):
        yield Change("no softmax at the start", {"softmax": "none"})
    yield Change(f"one pass more, over {first}, at the end", {"passes": "one more"})
    yield Change(f"one pass less: it ends on {first}", {"passes": "one less"})
    n = p["iterations"]
    for number in sorted({n - 1, n + 1, n // 2, 1, 2, 3, 5, 10, 20, 50} - {0, n}):
        yield Change(f"{number} iteration{'s' if number > 1 else ''}, not {n}", {"iterations": number})
    for guard, words in GUARDS.items():
        if guard != p["guard"] and not (p["softmax"] == "none" and guard in ("add", "softmax alone")):
            eps = 0.0 if guard == "none" else p["eps"] or 1e-6
            yield Change(f"{words}, not {GUARDS[p['guard']]}", {"guard": guard, "eps": eps})
    near = {p["eps"] * factor for factor in (0.1, 10.0, 100.0)}
    for value in sorted(near | {1e-12, 1e-8, 1e-6, 1e-5}) if p["eps"] else ():
        yield Change(f"eps {value:g}, not {p['eps']:g}", {"eps": value})
    if p["norm_eps"] and p["eps"]:
        yield Change(f"eps {p['norm_eps']:g}, the norm's, not {p['eps']:g}", {"eps": p["norm_eps"]})
    yield Change("no limit of the logits", {"logit_limit": None})
    for limit in (30.0, 50.0):
        yield Change(f"logits clipped to ±{limit:g}", {"logit_limit": limit})


def _of_matrix(p: Parameters) -> Iterator[Change]:
    if p["residual"] == "identity":
        return
    yield Change("H transposed", {"H": "[j, i]"})
    yield Change("H applied transposed", {"mix": _OTHER_MIX[p["mix"]]})
    yield Change("H kept transposed, and applied so", {"H": "[j, i]", "mix": _OTHER_MIX[p["mix"]]})
    yield Change("H is the identity", {"H": "identity"})
    yield Change("H not applied: each stream keeps its own", {"mixed_by": "identity"})
    yield Change("H not applied in a layer, but in post", {"mixed_by": "identity in a layer"})
    if p["residual"] == "sinkhorn":
        yield Change("the residual logits transposed", {"logits": "[j, i]"})
        yield Change("b_res transposed", {"bias": "transposed"})


_OTHER_MIX = {"in-out": "out-in", "out-in": "in-out"}


def _of_norm(p: Parameters) -> Iterator[Change]:
    position = "root" if p["norm_eps_position"] == "mean" else "mean"
    if p["norm_eps"]:
        yield Change(f"norm eps added to the {position}", {"norm_eps_position": position})
    if p["eps"]:
        yield Change(f"norm_eps {p['eps']:g}, Sinkhorn's eps, not {p['norm_eps']:g}", {"norm_eps": p["eps"]})
    for value in EPS:
        yield Change(f"norm_eps {value:g}, not {p['norm_eps']:g}", {"norm_eps": value})
    yield Change("the root mean square of each stream over C alone", {"norm_over": "stream"})
    yield Change("no norm", {"norm_over": "nothing"})
    yield Change("streams flattened dim first (c n + i)", {"flattening": "dim, streams"})
    if p["norm_weight"]:
        yield Change("the norm weight is ignored", {"norm_weight": False})
        yield Change("1 + w for the norm weight w", {"norm_scale": "1 + w"})
    if p["head_norm_eps"] is not None:
        yield Change(f"norm_eps {p['norm_eps']:g}, the layer's, in the head too", {"head_norm_eps": None})
    for value in (1e-6, 1e-5):
        yield Change(f"norm_eps {value:g} in the head", {"head_norm_eps": value})


def _of_gates(p: Parameters) -> Iterator[Change]:
    for name, values in (("pre_eps", (0.0, 1e-6)), ("post_eps", (0.0, 1e-6)), ("post_scale", (1.0, 2.0))):
        for value in values:
            words = f"{name} {value:g}, not {p[name]:g}"
            yield Change(words, {name: value})
            if name == "pre_eps":
                yield Change(f"{words}, but in the head", {name: value, "head_eps": p["pre_eps"]})
    yield Change("no post gate: post is 1", {"post_gate": "1"})
    yield Change("α on the bias too", {"alpha": "on the bias too"})  # noqa: RUF001
    yield Change("α on the bias too, but in the head", {"alpha": "on the layer's bias too"})  # noqa: RUF001
    yield Change("α ignored", {"alpha": "never"})  # noqa: RUF001
    yield Change("the biases ignored", {"bias": "never"})
    yield Change("pre and post swapped in φ", {"slices": "post, pre"})
    yield Change("pre and post swapped", {"slices": "all weights"})
    yield Change("no eps on the head's gates", {"head_eps": 0.0})


def _of_layer(p: Parameters) -> Iterator[Change]:
    yield Change("no post gate: post is not applied", {"gated_by": "1"})
    yield Change("no post gate in a layer, but in post", {"gated_by": "1 in a layer"})
    yield Change("no pre gate: reads the sum of the streams", {"reads": "sum"})
    yield Change("no pre gate: reads the mean of the streams", {"reads": "mean"})
    if p["pre_from"] == "own":
        previous = "reads with the previous site's pre"
        yield Change(previous, {"pre_from": "previous"})
        yield Change(
            f"{previous}, and with stream 0 where it gets none", {"pre_from": "previous", "reads_alone": "stream 0"}
        )
        yield Change(f"{previous}, and reduces with the last", {"pre_from": "previous", "reduces": "carried"})
    else:
        yield Change("reads with its own pre", {"pre_from": "own"})
        yield Change("the first site reads with all streams, not with stream 0", {"first_carried": "all streams"})
    yield Change("mean for sum and sum for mean in the reduction", {"reduces": "other"})
    yield Change("always reduces by the mean", {"reduces": "mean"})
    yield Change("always reduces by the sum", {"reduces": "sum"})


def differences(of: Parameters, to: Parameters, known: Collection[str]) -> list[str]:
    """What one row has another value of than another, among what is known, in words."""
    words = []
    for name in of:
        if name in known and name not in STRUCTURE and of[name] != to[name]:
            origin = ", Sinkhorn's eps" if name == "norm_eps" and of[name] == to["eps"] else ""
            words.append(f"{name} {_shown(of[name])}{origin}, not {_shown(to[name])}")
    return words


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
