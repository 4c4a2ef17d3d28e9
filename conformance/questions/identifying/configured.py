"""Whether an implementation follows the eps of its configuration.

In most rows the eps of the norm, of Sinkhorn and of the gates are the same number. A kernel that takes one for the
other, or that has one built in, computes the row all the same; it shows in the cases of the family ``big-eps``, whose
configurations set them apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from conformance.cases.case import Item
from conformance.interface import Implementation
from conformance.questions.identifying.candidates import Change, Functions, relevant
from conformance.questions.identifying.forward import STAGES
from conformance.questions.identifying.ranking import Ranking
from conformance.questions.identifying.records import run

FAMILY = "big-eps"
NAMES = {"norm_eps": "the norm's eps", "eps": "Sinkhorn's eps", "pre_eps": "pre_eps", "post_eps": "post_eps"}


def configured(
    implementation: Implementation, told: str, row: Mapping[str, Any], items: Sequence[Item], dtype: str
) -> str:
    """What it does with the eps of a configuration that sets them apart, in words; empty where it follows them all.

    Args:
        row: the told dialect's own parameters.
    """
    records, _ = run(implementation, [item for item in items if _sets_apart(item, row, dtype)])
    records = [record for record in records if record.outputs]
    if not records:
        return ""
    parameters = {k: v for k, v in records[0].item.case.parameters.items() if k in row}
    known = relevant({(record.stage, tensor) for record in records for tensor in record.outputs})
    functions, ranking = Functions(told, {told: parameters}, known), Ranking(records)
    (own,) = functions.of_rows()
    changes = list(_changes(parameters, row))
    tried = [own, *(functions.changed(told, c) for c in changes), *functions.with_two_changes(told, changes)]
    best = ranking.nearest(tried)[0]
    if best.candidate == own and best.ratio <= 1:
        return ""
    return " and ".join(best.candidate.changes) if best.ratio <= 1 else "it computes something else"


def _sets_apart(item: Item, row: Mapping[str, Any], dtype: str) -> bool:
    case = item.case
    return (
        (case.family, item.variant.x, item.variant.secondary) == (FAMILY, dtype, False)
        and item.stage in STAGES
        and all(case.parameters[k] == v for k, v in row.items() if k not in NAMES or k not in case.overrides)
    )


def _changes(parameters: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[Change]:
    """One eps taken for another, or built in."""
    apart = [name for name in NAMES if parameters[name] != row[name]]
    if parameters["head_norm_eps"] is not None:
        yield Change("the head's norm eps is taken from the layer's", {"head_norm_eps": None})
    for name in apart:
        yield Change(f"{NAMES[name]} is {row[name]:g} whatever it is told", {name: row[name]})
        for other in apart:
            if other != name:
                yield Change(f"{NAMES[name]} is taken from {NAMES[other]}", {name: parameters[other]})
