"""The command's own figures are those of `jax_impl.health` and `torch_impl.health`, which know nothing of it."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

from conformance.cases.dialects import dialect_rows
from conformance.oracle import formulas
from conformance.porter.probe import Float64
from conformance.questions.health import quantities

N, DIM = 4, 6
DIALECTS = ("deepseek-v4", "liger", "mhc-lite", "hunyuan-v4")


def arrays(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sigmoids of pre and post, H and x, in float32 so that every framework is given the same numbers."""
    generator = np.random.default_rng(0)
    sigmoids = generator.uniform(size=(2, 9, N)).astype(np.float32)
    sigmoids[0, :, 1], sigmoids[1, :, 2], sigmoids[0, :5, 3] = 2.0**-14, 1 - 2.0**-14, 0
    H = generator.uniform(size=(9, N, N)).astype(np.float32)
    if row["residual"] == "identity":
        H = np.broadcast_to(np.eye(N, dtype=np.float32), H.shape)
    return sigmoids[0], sigmoids[1], H, generator.standard_normal((9, N, DIM)).astype(np.float32)


def ours(framework: str, name: str) -> tuple[Any, Any, Any]:
    """The health of a site, and of two such sites, in a framework, and its configuration."""
    needed = {"torch": "torch", "jax": "flax"}[framework]
    pytest.importorskip(needed, reason=f"needs the extra {framework}")
    package: Any = importlib.import_module(f"{framework}_impl")
    make: Any = importlib.import_module({"torch": "torch", "jax": "jax.numpy"}[framework]).asarray
    config = package.MHCConfig.from_dialect(name, streams=N, dim=DIM)
    pre, post, H, x = (np.array(value) for value in arrays(dialect_rows()[name]))
    site = [make(value) for value in (pre + config.pre_eps, config.post_scale * post + config.post_eps, H, x)]
    return (
        package.site_health(*site[:3], config, site[3]),
        package.stack_health([tuple(site[:3])] * 2, config).composite,
        package.drifting(config),
    )


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("name", DIALECTS)
def test_three_writings_give_the_same_figures(framework, name):
    row = dialect_rows()[name]
    site, composite, drifts = ours(framework, name)
    pre, post, H, x = (value.astype(np.float64) for value in arrays(row))
    M = quantities.mixing(H, row)
    assert quantities.drifting(row) == drifts
    pairs = [
        (site.gains, quantities.gains(M)), (site.pre, quantities.gate(pre)), (site.post, quantities.gate(post)),
        *((type(composite)(*(field[k] for field in composite)), quantities.gains(C)) for k, C in enumerate((M, M @ M))),
    ]  # fmt: skip
    for given, expected in pairs:
        for field in type(given)._fields:
            np.testing.assert_allclose(
                np.asarray(getattr(given, field)), getattr(expected, field), rtol=1e-5, atol=1e-6
            )
    matrix = quantities.matrix(M)
    for field in ("entropy", "from_permutation", "from_uniform", "from_identity", "spread"):
        np.testing.assert_allclose(float(getattr(site, field)), getattr(matrix, field), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(site.share), quantities.share(x), rtol=1e-5)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_a_gate_is_closed_below_the_same_number(framework):
    """Both sides of the threshold, in all three writings."""
    edge = quantities.SATURATED
    s = np.array([[edge * 0.99, edge * 1.01, 1 - edge * 1.01, 1 - edge * 0.99]])
    assert quantities.gate(s).closed == [1, 0, 0, 0] and quantities.gate(s).open == [0, 0, 0, 1]
    pytest.importorskip({"torch": "torch", "jax": "flax"}[framework], reason=f"needs the extra {framework}")
    assert edge == importlib.import_module(f"{framework}_impl.health").SATURATED


@pytest.mark.parametrize("name", dialect_rows())
def test_the_side_that_drifts_is_the_one_that_does(name):
    """For every published row: logits that no iterations balance, and the sums that come out."""
    row = {**dialect_rows()[name], "streams": N}
    side = quantities.drifting(row)
    if row["residual"] != "sinkhorn":
        assert side == "neither"
        return
    logits = 6 * np.random.default_rng(1).standard_normal((50, N, N))
    gains = quantities.gains(quantities.mixing(formulas.residual_matrix(logits, row, Float64())[0], row))
    off = {which: np.abs(np.array(getattr(gains, f"{which}_sums")) - 1).max() for which in ("forward", "backward")}
    assert max(off, key=lambda which: off[which]) == side and off[side] > 1e-3 and sorted(off.values())[0] < 1e-4
