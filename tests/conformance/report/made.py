"""Runs that nobody ran: of realistic size and with failures of every kind, from the corpus's own items."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from conformance.cases.case import Item
from conformance.cases.corpus import load_corpus
from conformance.judge.heat import heat_map
from conformance.judge.item import Outcome
from conformance.judge.rule import EDGES, Check, verdict_of
from conformance.report.files import Diagnosis, Lines

CHECKS = 3600
"""Of one implementation."""
STAGES = ("residual_matrix", "coefficients", "layer", "stack")
TENSORS = ("H", "out", "d/x", "d/logits", "d/embedding", "d/res_alpha", "d/res_alpha_scale", "d/res_beta")
"""Those of these stages that fail where H does."""


def write(path: Path, names: Sequence[str], failing: Sequence[str], checks: int = CHECKS) -> None:
    """A run of some implementations, of which some fail in H and in all that follows, and in one tail of tokens."""
    items = [item for case in load_corpus() for item in case.items()]
    random.Random(1).shuffle(items)
    lines = Lines(path, asked={"case": ["smoke-*", "generic-*"], "fresh": None, "mesh": []})
    for number, name in enumerate(names):
        draws = random.Random(number)
        for outcome in _outcomes(name, items, checks, name in failing, draws):
            outcome.about = {"device": "cpu", "description": f"{name} 1.0", "threads": 2}
            lines.add(outcome)
    cause = "H is applied transposed (passes as out-in, 0.03 of the bound)"
    said = ["residual_matrix and all that is made of it fail", "the gradients of res_alpha fail with them"]
    lines.end([Diagnosis(name, cause if k % 2 == 0 else "", said) for k, name in enumerate(failing)])


def _outcomes(name: str, items: Sequence[Item], most: int, fails: bool, draws: random.Random) -> Iterator[Outcome]:
    count = 0
    for item in items:
        if count >= most:
            return
        checks = [_check(item, tensor, fails, draws) for tensor in item.expected][: most - count]
        count += len(checks)
        yield Outcome(
            name, item.case.id, item.stage, item.variant.name, item.variant.x, item.case.dialect, checks,
            reference=f"package.of.mine:{name}", family=item.case.family, elements=64 + draws.randrange(4096),
            seconds=0.01, modes=("without gradients",),
        )  # fmt: skip


def _check(item: Item, tensor: str, fails: bool, draws: random.Random) -> Check:
    shape = item.expected[tensor].shape
    if not fails or item.stage not in STAGES or tensor not in TENSORS or 0 in shape:
        ratio = draws.random() * (0.9 if draws.random() < 0.01 else 0.4)
        return Check(tensor, verdict_of(ratio), ratio, ratio * 1e-7, 1e-7)
    errors = np.random.default_rng(draws.randrange(1 << 30)).exponential(0.3, shape)
    if errors.ndim > 2:
        errors[:, shape[1] // 2 :] *= 300  # the later tokens of each row
    ratio = max(1.5, float(errors.max()))
    worst = [{"index": [0] * errors.ndim, "actual": 0.123456789, "expected": 0.25, "error": 0.126543211}] * 4
    bins = np.bincount(np.digitize(errors.ravel(), EDGES) - 1, minlength=len(EDGES)).tolist()
    return Check(tensor, "failed", ratio, ratio * 1e-7, 1e-7, "", worst, bins, map=heat_map(tensor, errors))
