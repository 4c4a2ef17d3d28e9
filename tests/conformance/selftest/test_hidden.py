"""Mistakes that hide a NaN or an infinity, planted into the plain layer: the family `non-finite` notices each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the plain implementation is in PyTorch, which is not installed")

from conformance.cases.corpus import load_corpus  # noqa: E402
from conformance.implementations.wrapping import wrap  # noqa: E402
from conformance.judge.item import run_item  # noqa: E402
from conformance.selftest.plain import Plain  # noqa: E402

CASES = [case for case in load_corpus() if case.family == "non-finite"]
LARGE = 1e4


class NanInXBecomesZero(Plain):
    def project(self, x, weights, kinds, c):
        return super().project(torch.nan_to_num(x, nan=0.0, posinf=torch.inf, neginf=-torch.inf), weights, kinds, c)

    def pre_mix(self, x, pre):
        return super().pre_mix(x.nan_to_num(nan=0.0), pre.nan_to_num(nan=0.0))

    def mixed(self, H, x, c):
        return super().mixed(H.nan_to_num(nan=0.0), x.nan_to_num(nan=0.0), c)

    def post_mix(self, y, x, post, H, c):
        return super().post_mix(y.nan_to_num(nan=0.0), x, post.nan_to_num(nan=0.0), H, c)


class XIsClampedToItsLargest(Plain):
    def project(self, x, weights, kinds, c):
        return super().project(x.clamp(-LARGE, LARGE), weights, kinds, c)


class LogitsAreClamped(Plain):
    def matrix(self, logits, c, kept):
        return super().matrix(logits.clamp(-LARGE, LARGE), c, kept)


class InfinityIsALargeLogit(Plain):
    def matrix(self, logits, c, kept):
        return super().matrix(torch.where(logits.isinf(), LARGE * logits.sign(), logits), c, kept)


class NanIsMaskedInTheSoftmax(Plain):
    def matrix(self, logits, c, kept):
        return super().matrix(logits.masked_fill(logits.isnan(), -torch.inf), c, kept)


class TheGuardIgnoresNan(Plain):
    def guarded(self, total, c):
        return (
            torch.fmax(total, torch.tensor(c.eps, dtype=total.dtype))
            if c.guard == "clip"
            else super().guarded(total, c)
        )


class GatesAreNumbers(Plain):
    def sigmoid(self, z):
        return super().sigmoid(z).nan_to_num(nan=0.5)


class OneTokenReachesTheOthers(Plain):
    def project(self, x, weights, kinds, c):
        return {k: h + 0 * x.sum().to(h.dtype) for k, h in super().project(x, weights, kinds, c).items()}


class GradientsAreNumbers(Plain):
    def layer(self, inputs, config, cotangents):
        outputs, gradients = super().layer(inputs, config, cotangents)
        return outputs, {k: np.nan_to_num(g.astype(np.float32)).astype(g.dtype) for k, g in gradients.items()}


MISTAKES = {
    NanInXBecomesZero: ("deepseek-v4", "hidden"),
    XIsClampedToItsLargest: ("paper", "hidden"),
    LogitsAreClamped: ("deepseek-v4", "hidden"),
    InfinityIsALargeLogit: ("transformer-engine", "hidden"),
    NanIsMaskedInTheSoftmax: ("mhc-lite", "hidden"),
    TheGuardIgnoresNan: ("maxtext-v1", "hidden"),
    GatesAreNumbers: ("glm-5", "hidden"),
    OneTokenReachesTheOthers: ("xing-4", "non-finite"),
    GradientsAreNumbers: ("liger", "hidden"),
}


def verdicts(implementation: Callable[[], Plain], dialect: str, dtype: str) -> set[str]:
    wrapped, found = wrap(implementation()), set()
    for case in CASES:
        for item in case.items() if case.dialect == dialect else []:
            if item.variant.x == dtype:
                found |= {check.verdict for check in run_item(wrapped, item).failed}
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_that_hides_or_spreads_is_noticed(mistake, dtype):
    dialect, verdict = MISTAKES[mistake]
    assert verdicts(Plain, dialect, dtype) == set()
    assert verdict in verdicts(mistake, dialect, dtype)
