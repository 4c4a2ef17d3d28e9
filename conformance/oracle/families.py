"""The case families of the golden corpus (docs/bound.md, "Case families")."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from conformance.cases.dialects import Dialect, dialect_names, published
from conformance.cases.rules import most_permuted
from conformance.oracle import data, non_finite
from conformance.oracle.build import CORE, PURE, Wish
from conformance.oracle.data import Draws
from conformance.oracle.families_small import DENSE, expanded, faint, fifty_iterations

SLOWEST = json.loads(Path(__file__).with_name("slowest.json").read_text())
NARROW = ("bfloat16-float32", "float16-float32")
F32 = ("float32-float32",)
BF16 = ("bfloat16-float32",)
F32_BF16 = (*F32, *BF16)
EXPANDED = ("paper", "maxtext", "deepseek-v4", "deepseek-v4.1", "megatron")
"""Rows that read x in different ways: norm before the projection and after it, with a weight, single pass, bfloat16."""
EVERY_CONTRACT = ("paper", "maxtext", "deepseek-v4-transformers", "megatron", "deepseek-v4.1")
MANY_STREAMS = {
    6: ("deepseek-v4", "maxtext-v1"),
    7: ("paper", "deepseek-v4"),
    12: ("deepseek-v4.1",),
    16: ("deepseek-v4",),
}
"""Numbers of streams beyond those that every dialect has, and where."""
EVERY_DTYPE = ("norm-weight", "softmax-columns", "softmax-rows", "eps-apart")
"""Labels of parameters that are seen in narrow dtypes nowhere else."""
QUICK_SMOKE = ("paper", "glm-5", "megatron", "mhc-lite", "hunyuan-v4")
QUICK_GENERIC = ("maxtext", "deepseek-v4-transformers")
MATRIX = ("residual_matrix", "coefficients")
SINGLE_PASS = {"pre_from": "previous", "reduce": "carried"}


def wishes(seed: int | None = None) -> Iterator[Wish]:
    """Every case of the corpus, in a fixed order; with a seed the same cases with other numbers."""
    for name in dialect_names():
        yield from wishes_of(published(name), seed)
    draws = Draws(seed)
    for wish in (*_exact(draws), *_other_parameters(draws)):
        yield dataclasses.replace(wish, seed=seed)


def wishes_of(dialect: Dialect, seed: int | None = None) -> Iterator[Wish]:
    """The cases of every family that fits a row, published or not."""
    for wish in _of_row(dialect.name, dict(dialect.parameters), Draws(seed)):
        yield dataclasses.replace(wish, row=dialect, seed=seed)


def _of_row(name: str, parameters: dict[str, Any], draws: Draws) -> Iterator[Wish]:
    yield from _whole_layers(name, parameters)
    yield from _sizes(name, parameters)
    if parameters["residual"] != "identity":
        yield from _matrices(name, parameters, draws)
    yield from _activations(name, parameters, draws)
    yield from _plumbing(name, parameters, draws)
    yield _exact_mixing(name, parameters, draws)
    yield from non_finite.wishes(name, parameters, _every_stage(parameters), name in EVERY_CONTRACT)


def _reductions(p: dict[str, Any]) -> list[Any]:
    """The reductions of a dialect: ``head`` if it has one (MaxText may have either), and the plain reduction."""
    how = p["reduce"] if p["reduce"] in ("sum", "mean", "carried") else "sum"
    with_head = p["reduce"] == "head" or p["head_norm_eps"] is not None
    return [("reduce", {"how": how}), *(["head"] if with_head else [])]


def _matrix_stage(p: dict[str, Any]) -> list[str]:
    return [] if p["residual"] == "identity" else ["residual_matrix"]


def _every_stage(p: dict[str, Any]) -> list[Any]:
    return ["expand", *_reductions(p), *_matrix_stage(p), "coefficients", "pre", "post", DENSE]


def _whole_layers(name: str, p: dict[str, Any]) -> Iterator[Wish]:
    every = _every_stage(p)
    yield Wish(
        "smoke", "the smallest complete case: if it fails, suspect the harness", "Forward", name,
        streams=2, dim=2, lead=(1, 2), stages=every, variants=F32, quick=name in QUICK_SMOKE,
    )  # fmt: skip
    yield Wish(
        "generic", "swapped slices, transposes, an ignored norm weight, alpha on the bias", "Forward", name, "n4",
        stages=every, variants=CORE + (PURE if name in EVERY_CONTRACT else ()), tf32=True,
        only={"layer": (*CORE, "bfloat16-bfloat16")}, quick=name in QUICK_GENERIC,
    )  # fmt: skip
    yield Wish(
        "initial", "the values that training starts from", "Initial values (MaxText)", name,
        stages=["coefficients", "pre", DENSE],
        weights={
            "pre_alpha_scale": 0.01, "post_alpha_scale": 0.01, "res_alpha_scale": 0.01,
            "pre_beta": 0.0, "post_beta": 0.0, "res_beta": 0.0, "mhc_norm.scale": 1.0,
        },
    )  # fmt: skip


def _sizes(name: str, p: dict[str, Any]) -> Iterator[Wish]:
    # Whoever compiles pays for each shape and dtype: every number of streams has its own, so each comes in few.
    sizes = {
        1: (F32, F32),
        2: (BF16, ()),
        3: (("float32-float32", "float16-float32"), F32),
        5: (F32, ()),
        8: (BF16, BF16),
    }
    for streams, (variants, layer) in sizes.items():
        if p["residual"] == "permutations" and streams > most_permuted():
            continue
        yield Wish(
            "generic", "a transposition shows only for three streams and more", "Forward", name, f"n{streams}",
            streams=streams, stages=["coefficients", "post", *([DENSE] if layer else [])], variants=variants,
            only={"layer": layer},
        )  # fmt: skip
    for streams, dialects in MANY_STREAMS.items():
        if name in dialects:
            yield Wish(
                "generic", "more streams than any release has: a loop that ends at 8, a matrix that is padded",
                "Forward", name, f"n{streams}", streams=streams, stages=["coefficients", "post", DENSE],
                variants=(*F32, *NARROW), only={"layer": F32},
            )  # fmt: skip
    if name in EVERY_CONTRACT:
        yield Wish(
            "generic", "a width at which the order of summation matters", "Forward", name, "n4-dim64", dim=64,
            stages=["coefficients", DENSE], variants=(*F32, *NARROW), only={"layer": BF16}, tf32=True,
        )  # fmt: skip
        yield Wish(
            "generic", "x and the projections with all of float32's bits: an operand rounded to fewer shows",
            "Precision", name, "fine", fine=True, tf32=True, stages=["coefficients", "pre", "post", DENSE],
            variants=("float32-float32", "float64-float64"),
        )  # fmt: skip


def _matrices(name: str, p: dict[str, Any], draws: Draws) -> Iterator[Wish]:
    n = 4
    clause = "The residual matrix"
    near = np.full((n, n), 0.0)
    near[np.arange(n), [1, 2, 3, 0]] = 9.0
    sinkhorn = p["residual"] == "sinkhorn"
    # What is hard for rows first is hard for columns first once it is transposed.
    turned = (lambda a: np.swapaxes(a, -1, -2)) if p["order"] == "columns-first" else (lambda a: a)
    if sinkhorn:
        yield _matrix_wish("permutation", "orientation, rows that have not converged", name, p, near, 1.0, draws)
    yield Wish("wide", "logits of deviation 5: rows that have not converged, wrong gradients", clause, name,
               stages=MATRIX, logit_deviation=5.0, weights={"res_alpha_scale": 3.0},
               only={"residual_matrix": _sharp(CORE, p)})  # fmt: skip
    offsets = (120.0, 9984.0)
    for offset in offsets:
        shape = (3, 4, n, n) if sinkhorn else (3, 4, 24)
        rows = draws.uniform(f"overflow/{offset}", (*shape[:-1], 1), -1, 1) * offset
        noise = draws.normal(f"overflow/noise/{name}/{offset}", shape) * 2
        grid = data.shared_grid if p["coefficients"] == "activation" else (lambda v: np.asarray(v, np.float32))
        bias = np.array([offset, -offset, 0.0, offset])[:, None] if sinkhorn else rows[0, 0]
        logits = grid(rows + np.round(noise * 64) / 64)
        if p["softmax"] == "columns":  # along the axis of the softmax an offset cancels
            logits, bias = np.ascontiguousarray(np.swapaxes(logits, -1, -2)), bias.T
        yield Wish("overflow", "a missing shift by the maximum", clause, name, f"{offset:.0f}", stages=MATRIX,
                   tensors={"logits": logits}, weights={"res_beta": bias})  # fmt: skip
    if not sinkhorn:
        return
    blocks = np.array([[0, 1, -5, -6], [2, 0, -6, -5], [-6, -5, 1, 0], [-5, -7, 0, 3]], float)
    yield _matrix_wish("slow", "nearly decoupled blocks: 19 against 20 iterations, order, ending on rows",
                       name, p, turned(blocks), 0.25, draws)  # fmt: skip
    for streams in (2, 3, 4, 8):
        logits = turned(np.array(SLOWEST[f"n{streams}-N20"]))
        yield _matrix_wish(
            "slowest", "searched: the largest change from iteration N - 1 to N", name, p, logits, 0.0, draws
        )
    floor = np.zeros((n, n))
    floor[:, 2] = -13.0
    yield _matrix_wish("eps-floor", "one column 13 below the rest: eps added against clipped, or missing",
                       name, p, turned(floor), 1.0, draws)  # fmt: skip


def _sharp(variants: Sequence[str], p: dict[str, Any]) -> list[str]:
    """The variants in which sharp logits have finite gradients: passes in float16 overflow on the way back."""
    return [v for v in variants if v != "float16-float32" or p["matrix"] == "float32"]


def _matrix_wish(
    family: str, why: str, name: str, p: dict[str, Any], logits: np.ndarray, noise: float, draws: Draws
) -> Wish:
    """Logits through both doors: as the input of residual_matrix, and as b_res of the coefficients."""
    n = logits.shape[0]
    jitter = draws.normal(f"{family}/{name}/{n}", (3, 4, n, n)) * noise
    grid = data.shared_grid
    label = f"n{n}" if family == "slowest" else ""
    variants = CORE if n == 4 else ("float32-float32", "float64-float64", *NARROW)
    return Wish(
        family, why, "The residual matrix", name, label, streams=n, stages=MATRIX if n == 4 else MATRIX[:1],
        variants=_sharp(variants, p),
        tensors={"logits": grid(draws.shuffled(f"{family}/{name}/{n}", logits, (3, 4)) + jitter)},
        weights={"res_beta": logits, "res_alpha_scale": 2.0**-7 if noise < 0.5 else 0.5},
    )  # fmt: skip


def _activations(name: str, p: dict[str, Any], draws: Draws) -> Iterator[Wish]:
    stages = ["coefficients", "pre", DENSE]
    yield Wish("tiny", "x at 1e-3: the norm's eps, inside or outside the root", "Forward", name,
               stages=stages, x_scale=2.0**-10, variants=CORE)  # fmt: skip
    # Gradients that are kept in float16 overflow on their way through u; the squares are looked at in the coefficients.
    wide = [v for v in CORE if v != "float16-float32"] if p["coefficients"] == "activation" else CORE
    yield Wish("big", "x at 200: overflow of squares in float16", "Forward", name, stages=stages, x_scale=200.0,
               only={"pre": wide, "layer": wide})  # fmt: skip
    if p["norm_eps"] > 0:
        base = data.shared_grid(draws.normal(f"zero/{name}", (3, 4, 4, 8)))
        base[1, 2] = 0.0
        overflows = p["norm_eps_position"] == "root" or p["norm_eps"] < 1e-8  # 1e6 to 1e10 times a cotangent
        yield Wish("zero", "a token of zeros: the norm's eps and its gradient", "Forward", name,
                   stages=stages, tensors={"x": base}, variants=F32_BF16 if overflows else CORE)  # fmt: skip
    for bias in (18, 17, 20):
        yield Wish("closed-gate", f"pre bias -{bias}: only pre_eps is left", "Forward", name,
                   "" if bias == 18 else str(bias), stages=["pre", *_reductions(p)[1:]],
                   variants=CORE if bias == 18 else CORE[:3],
                   weights={"pre_beta": -float(bias), "head_base": np.full(4, -float(bias))})  # fmt: skip
    for bias in (18, 17, 20) if p["pre_from"] == "previous" else ():
        # What a site hands on is judged on the scale of an open gate; the sum that it weights shows all of it.
        yield Wish("closed-gate", f"pre bias -{bias}, handed on: only pre_eps is left", "Single pass", name,
                   f"carried-{bias}", stages=[("stack", {"layers": 1, "reduce": "carried"})], layers=1,
                   weights={"pre_beta": -float(bias)})  # fmt: skip
    for bias in (18, 17, 20) if p["post_eps"] else (18,):
        # y is 2^8 times u, so that 1e-6 of it can be told from x
        yield Wish("closed-gate", f"post bias -{bias}: only post_eps is left", "Forward", name, f"post-{bias}",
                   stages=[DENSE], weights={"post_beta": -float(bias)},
                   tensors={"branch_scale": draws.powers_of_two(f"closed-gate/{name}", (8,), 8, 8)})  # fmt: skip
    eps = {k: v for k, v in {"norm_eps": 0.0625, "eps": 0.03125, "pre_eps": 0.046875, "post_eps": 0.015625}.items()
           if p[k]}  # fmt: skip
    if eps:
        yield Wish("big-eps", "every eps of the dialect at 1e-2 to 1e-1: one missing or misplaced", "Forward", name,
                   stages=[*_matrix_stage(p), "coefficients", *_reductions(p)[1:], DENSE],
                   overrides=eps, variants=F32_BF16, only={"layer": F32})  # fmt: skip
    width, m = 32, {"sinkhorn": 16, "permutations": 24, "identity": 0}[p["residual"]]
    alternate = np.where(np.arange(width) % 2, -1.0, 1.0)[:, None]
    large = {
        f"{k}_alpha": alternate * 24 + draws.normal(f"cancel/{name}/{k}", (width, count)) * 0.25
        for k, count in (("pre", 4), ("post", 4), ("res", m))
    }
    ones = data.shared_grid(1 + draws.normal(f"cancel/{name}/x", (3, 4, 4, 8)) / 64)
    yield Wish("cancel-projection", "large terms of opposite sign in flat @ phi: accumulation in bfloat16, TF32",
               "Precision", name, stages=["coefficients"], tensors={"x": ones},
               weights={**large, "pre_alpha_scale": 0.25, "post_alpha_scale": -0.25, "res_alpha_scale": 0.25},
               tf32=True)  # fmt: skip


def _plumbing(name: str, p: dict[str, Any], draws: Draws) -> Iterator[Wish]:
    clause = "Forward"
    shapes: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
        ("zero-tokens", {"lead": (1, 0)}, F32),
        ("one-token-dim7", {"dim": 7, "lead": (1, 1)}, BF16),
        ("dim1", {"dim": 1, "lead": (2, 3)}, F32),
        ("dim129", {"dim": 129, "lead": (1, 2)}, F32),
        ("strided", {"layout": "strided"}, F32),
    )
    for label, wish, variants in shapes:
        yield Wish("shape", "indexing, padding, contiguity", clause, name, label, stages=[DENSE], variants=variants,
                   quick=label == "zero-tokens" and name == "paper", **wish)  # fmt: skip
    for branch, variants in (("attention", BF16), ("mlp_moe", F32)):
        yield Wish("branch", "what the branch is handed and what it returns", clause, name, branch.replace("_", "-"),
                   stages=[("layer", {"branch": branch})], variants=variants)  # fmt: skip
    yield _cancel_branch(name, p, draws)
    if p["mix"] != "identity":
        yield faint(name, p, draws)
    if name in EXPANDED:
        yield expanded(name, draws)
    (_, options), *head = _reductions(p)
    other = {"how": "sum" if options["how"] == "mean" else "mean"}
    yield Wish("head", "the other reduction; a head with one gate closed", "Forward", name,
               stages=[("reduce", other), *head], x_scale=3.0,
               weights={"head_base": np.array([-18.0, 0.5, -1.0, 1.0])})  # fmt: skip
    how = p["reduce"] if p["reduce"] in ("sum", "mean", "none", "carried") else "sum"
    # Small gates' slopes and branches: 24 layers of order-1 gradients would overflow float16, and float32 soon after.
    yield Wish("stack", "24 layers: growth of error", clause, name, stages=[("stack", {"layers": 24, "reduce": how})],
               layers=24, lead=(1, 3), variants=F32_BF16 if name in EVERY_CONTRACT else BF16,
               weights={"pre_alpha_scale": 0.125, "post_alpha_scale": -0.125, "res_alpha_scale": 0.25},
               tensors={"branch_scale": draws.powers_of_two(f"stack/{name}", (8,), -5, -3)})  # fmt: skip
    if p["pre_from"] == "previous":
        yield from _short_stacks(name, draws)


def _short_stacks(name: str, draws: Draws) -> Iterator[Wish]:
    """A few single-pass sites, which show the first site's read and the gradient of the carried pre in every dtype."""
    for layers in (1, 2, 3):
        yield Wish("stack", "a chain of sites, each reading with the pre of the one before", "Single pass", name,
                   f"{layers}-sites", stages=[("stack", {"layers": layers, "reduce": "carried"})], layers=layers,
                   weights={"pre_alpha_scale": 0.5, "post_alpha_scale": -0.5, "res_alpha_scale": 1.0},
                   tensors={"branch_scale": draws.powers_of_two(f"stack/{layers}/{name}", (8,), -3, 0)})  # fmt: skip


def _cancel_branch(name: str, p: dict[str, Any], draws: Draws) -> Wish:
    """Constant post and H make the cancelling y easy to write down: y = -(sum of x)/n - a little."""
    x = data.shared_grid(draws.normal(f"cancel-branch/{name}", (3, 4, 4, 8)) * 4)
    H = np.full((3, 4, 4, 4), 0.25) + np.round(draws.normal(f"cancel-branch/H/{name}", (3, 4, 4, 4)) * 4) / 64
    H = np.broadcast_to(np.eye(4), H.shape) if p["residual"] == "identity" else H
    grid = data.shared_grid
    H, post = grid(H), np.full((3, 4, 4), 1.0, np.float32)
    weight = H[..., 0] if p["mix"] == "in-out" else H[..., 0, :]  # of each input stream in output stream 0
    mixed = np.sum(weight[..., None].astype(np.float64) * x, axis=-2)
    return Wish("cancel-branch", "the branch cancels the mixed residual: a second rounding of out shows", "Precision",
                name, stages=["post"], tensors={"x": x, "H": H, "post": post, "y": grid(-mixed)})  # fmt: skip


def _exact(draws: Draws) -> Iterator[Wish]:
    zero = {f"{k}_alpha": 0.0 for k in ("pre", "post", "res")} | {f"{k}_beta": 0.0 for k in ("pre", "post", "res")}
    small = draws.uniform("exact/x", (3, 4, 4, 8), -8, 8).astype(np.float32)
    for name in ("paper", "transformer-engine"):
        yield Wish("exact", "small integers and uniform gates: zero tolerance", "Forward", name, "uniform",
                   stages=["expand", ("reduce", {"how": "mean"}), "residual_matrix", "coefficients", "pre",
                           DENSE],
                   tensors={"x": small, "logits": np.zeros((3, 4, 4, 4), np.float32)}, weights=zero, exact=True,
                   gradients=False, quick=name == "paper")  # fmt: skip


def _exact_mixing(name: str, p: dict[str, Any], draws: Draws) -> Wish:
    small = draws.uniform("exact/x", (3, 4, 4, 8), -8, 8).astype(np.float32)
    order = np.argsort(draws.uniform("exact/order", (3, 4, 4), 0, 10**6), axis=-1, kind="stable")
    matrices = np.eye(4, dtype=np.float32)[order]
    H = np.broadcast_to(np.eye(4, dtype=np.float32), matrices.shape) if p["residual"] == "identity" else matrices
    return Wish("exact", "permutation matrices: zero tolerance", "Forward", name, "permutation", stages=["post"],
                tensors={"x": small, "y": small[..., 1, :] * 2, "H": np.ascontiguousarray(H),
                         "post": np.exp2(draws.uniform(f"exact/post/{name}", (3, 4, 4), -1, 1)).astype(np.float32)},
                exact=True, gradients=False)  # fmt: skip


def _seen_in_every_dtype() -> Iterator[Wish]:
    """Features of a single published row, on rows with float32 coefficients, where x in bfloat16 shows mistakes too."""
    why, variants = "what one row has alone, where rounded coefficients don't hide it", (*F32, *NARROW)
    kinds: tuple[tuple[str, tuple[str, ...], dict[str, Any], dict[str, Any]], ...] = (
        (
            "softmax-none", ("deepseek-v4", "liger", "transformer-engine", "paper"),
            {"softmax": "none", "guard": "denominator", "eps": 0.03125, "logit_limit": 2.5078125},  # between the logits
            {"stages": MATRIX},
        ),
        (
            "head-eps", ("deepseek-v4", "hunyuan-v4", "paper", "maxtext"), {"head_norm_eps": 0.25},
            {"stages": ["head"]},
        ),
        (
            "carried", ("deepseek-v4-transformers", "liger", "hunyuan-v4", "paper"), SINGLE_PASS,
            {"stages": ["pre", DENSE]},
        ),
        (
            "carried-stack", ("deepseek-v4", "deepseek-v4-transformers", "liger", "paper"), SINGLE_PASS,
            {"stages": [("stack", {"layers": 2, "reduce": "carried"})], "layers": 2, "lead": (1, 3)},
        ),
    )  # fmt: skip
    for label, names, overrides, rest in kinds:
        for name in names:
            yield Wish("parameters", why, "Dialects", name, label, overrides=overrides, variants=variants, **rest)


def _other_parameters(draws: Draws) -> Iterator[Wish]:
    """Parameters that no published dialect combines: each must work on its own."""
    stages = ["residual_matrix", "coefficients", DENSE]
    combinations = (
        ("paper", "rows-first", {"softmax": "rows", "order": "rows-first"}),
        ("deepseek-v4", "columns-first", {"softmax": "columns", "order": "columns-first", "mix": "out-in"}),
        ("megatron", "columns-first", {"softmax": "columns", "order": "columns-first"}),
        ("paper", "one-iteration", {"iterations": 1}),
        ("paper", "three-iterations", {"iterations": 3, "guard": "clip", "eps": 0.25, "post_scale": 1.5}),
        ("deepseek-v4", "one-iteration", {"iterations": 1}),
        ("deepseek-v4", "two-iterations", {"iterations": 2}),
        ("deepseek-v4", "fifty-iterations", {"iterations": 50}),
        ("paper", "two-iterations", {"iterations": 2}),
        ("maxtext-v1", "one-iteration", {"iterations": 1}),
        ("xing-4", "two-iterations", {"iterations": 2}),
        ("deepseek-v4", "softmax-columns", {"softmax": "columns"}),
        ("liger", "softmax-columns", {"softmax": "columns"}),
        ("paper", "softmax-rows", {"softmax": "rows"}),
        ("deepseek-v4", "single-pass", SINGLE_PASS),
        ("liger", "denominator", {"guard": "denominator", "eps": 0.03125, "logit_limit": 2.5078125}),
        ("deepseek-v4", "eps-apart", {"norm_eps": 0.0625}),
        ("liger", "eps-apart", {"norm_eps": 0.0625}),
        ("transformer-engine", "eps-apart", {"norm_eps": 0.0625}),
        ("transformer-engine", "norm-weight", {"norm_weight": True, "pre_eps": 0.125, "post_eps": 0.0625}),
        ("paper", "norm-weight", {"norm_weight": True}),
        ("deepseek-v4", "norm-weight", {"norm_weight": True}),
        ("liger", "norm-weight", {"norm_weight": True}),
    )
    for name, label, overrides in combinations:
        yield Wish("parameters", "a combination that no dialect has", "Dialects", name, label,
                   stages=stages, overrides=overrides, only={"layer": F32},
                   variants=(*F32, *NARROW) if label in EVERY_DTYPE else F32_BF16)  # fmt: skip
    yield from _seen_in_every_dtype()
    yield from fifty_iterations(np.array(SLOWEST["n4-N20"]), draws)
    for name in ("paper", "deepseek-v4"):
        turned = np.transpose if name == "paper" else np.array
        for streams in (2, 3, 4, 8):
            searched = turned(np.array(SLOWEST[f"n{streams}-N10"]))
            yield Wish("slowest", "searched: the largest change from iteration 9 to 10", "The residual matrix", name,
                       f"n{streams}-N10", streams=streams, stages=MATRIX[:1], overrides={"iterations": 10},
                       variants=F32, tensors={"logits": data.shared_grid(
                           draws.shuffled(f"slowest/{name}/{streams}", searched, (3, 4)))})  # fmt: skip
