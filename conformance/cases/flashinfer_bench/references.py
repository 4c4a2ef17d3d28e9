"""The reference of each operation: self-contained PyTorch, written out for the parameters of one dialect.

It computes in float32, or in float64 where it is given that, and rounds where the row says that its software does
(docs/mathematics.md, "Precision"). A kernel that rounds less is nearer to the true value, and further from it.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conformance.cases.flashinfer_bench.kernel import Kernel

AXES = {"rows": -1, "columns": -2}
"""The axis that a pass over rows, or over columns, of ``[tokens, n, n]`` sums over."""
WIDE = "wide = torch.promote_types(x.dtype, torch.float32)  # float32, or float64 for float64"


def reference(kernel: Kernel) -> str:
    """The source of a module with the function ``run``, which takes the arguments and returns the results in order."""
    body = {"pre": _pre, "post": _post, "residual_matrix": _residual_matrix, "head": _head}[kernel.stage](kernel)
    first = f'"""{kernel.op_type} as the dialect {kernel.dialect} computes it, with {kernel.streams} streams (n)."""'
    needed = ["import itertools\n"] if "itertools" in body else []
    return "\n".join([first, "", *needed, "import torch", "", "", body]) + "\n"


def _function(head: str, lines: list[str]) -> str:
    return head + "\n" + textwrap.indent("\n".join(lines), "    ")


def _rounded(row: Mapping[str, Any], parameter: str, value: str) -> str:
    """A value rounded to x's dtype where the row's parameter says so."""
    if row[parameter] != "activation":
        return value
    operator = isinstance(ast.parse(value, mode="eval").body, ast.BinOp)
    return f"({value}).to(x.dtype)" if operator else f"{value}.to(x.dtype)"


def _norm(eps: float, position: str) -> list[str]:
    mean = "flat.square().mean(-1, keepdim=True)"
    root = f"({mean} + {eps!r}).sqrt()" if position == "mean" else f"{mean}.sqrt() + {eps!r}"
    return [
        WIDE,
        "# The norm runs over the streams and their width together.",
        "flat = x.flatten(1).to(wide)  # [tokens, n * C]",
        f"rms = {root}  # [tokens, 1]",
    ]


def _plus(value: float) -> str:
    return f" + {value!r}" if value else ""


def _pre(kernel: Kernel) -> str:
    n, row = kernel.streams, kernel.row

    def rounded(value: str) -> str:
        return _rounded(row, "coefficients", value)

    def gates(number: int, scale: float, eps: float) -> str:
        columns = f"{n * number or ''}:{n * number + n}"
        factor = "" if scale == 1 else f"{scale!r} * "
        value = f"{factor}torch.sigmoid(scale[{number}] * h[:, {columns}] + base[{columns}]){_plus(eps)}"
        return f"{rounded(value)}  # [tokens, n]"

    weight = " * norm_weight.to(wide)" if row["norm_weight"] else ""
    lines = [
        *_norm(row["norm_eps"], row["norm_eps_position"]),
        f"normed = {rounded(f'flat / rms{weight}')}",
        f"h = {rounded('normed.to(wide) @ fn.to(wide).T')}  # [tokens, columns]",
        "h, scale, base = h.to(wide), scale.to(wide), base.to(wide)",
        "# The columns belong to pre, to post and to the residual matrix.",
        f"pre = {gates(0, 1, row['pre_eps'])}",
        f"post = {gates(1, row['post_scale'], row['post_eps'])}",
    ]
    if kernel.mixed:
        logits = _rounded(row, "matrix", f"scale[2] * h[:, {2 * n}:] + base[{2 * n}:]")
        square = f".unflatten(-1, ({n}, {n}))" if row["residual"] == "sinkhorn" else ""
        lines += [f"logits = {logits}", f"H = {rounded(f'residual_matrix(logits{square})')}  # [tokens, n, n]"]
    reading = "pre"
    if kernel.op_type == "mhc_pre_delayed":
        reading = "carried"
        lines.append("# This site reads with the pre of the site before it, and hands on its own.")
    lines += [
        f"u = ({reading}.to(wide).unsqueeze(-1) * x.to(wide)).sum(1)  # [tokens, C]",
        f"return {', '.join(['u.to(x.dtype)', *kernel.results[1:]])}",
    ]
    run = _function(f"def run({', '.join(kernel.arguments)}):", lines)
    return f"{_matrix(row, n)}\n\n\n{run}" if kernel.mixed else run


def _post(kernel: Kernel) -> str:
    row = kernel.row

    def rounded(value: str) -> str:
        return _rounded(row, "mixing", value)

    lines = [
        WIDE,
        f"gate = {rounded('post')}.to(wide).unsqueeze(-1)  # [tokens, n, 1]",
        f"own = {rounded('gate * y.to(wide).unsqueeze(1)')}  # [tokens, n, C]",
    ]
    if not kernel.mixed:
        lines += ["# The residual matrix is the identity.", "mixed = x.to(wide)"]
    else:
        indices, index = ("tij", "first") if row["mix"] == "in-out" else ("tji", "second")
        mixed = f'torch.einsum("{indices},tic->tjc", {rounded("H")}.to(wide), x.to(wide))'
        lines += [f"# The {index} index of H is summed over.", f"mixed = {rounded(mixed)}  # [tokens, n, C]"]
    return _function(f"def run({', '.join(kernel.arguments)}):", [*lines, "return (own + mixed).to(x.dtype)"])


def _residual_matrix(kernel: Kernel) -> str:
    if kernel.row["matrix"] == "activation":
        lines = ["return residual_matrix(logits)  # [tokens, n, n], each step in the dtype of the logits"]
    else:
        lines = [
            WIDE.replace("x.dtype", "logits.dtype"),
            "return residual_matrix(logits.to(wide)).to(logits.dtype)  # [tokens, n, n]",
        ]
    return f"{_matrix(kernel.row, kernel.streams)}\n\n\n{_function('def run(logits):', lines)}"


def _head(kernel: Kernel) -> str:
    row = kernel.row
    eps = row["norm_eps"] if row["head_norm_eps"] is None else row["head_norm_eps"]
    lines = [
        *_norm(eps, row["norm_eps_position"]),
        "h = (flat / rms) @ fn.to(wide).T  # [tokens, n]",
        f"gates = torch.sigmoid(scale.to(wide) * h + base.to(wide)){_plus(row['pre_eps'])}  # [tokens, n]",
        "return (gates.unsqueeze(-1) * x.to(wide)).sum(1).to(x.dtype)  # [tokens, C]",
    ]
    return _function(f"def run({', '.join(kernel.arguments)}):", lines)


def _matrix(row: Mapping[str, Any], n: int) -> str:
    """The function ``residual_matrix``, from wide logits to H."""
    if row["residual"] == "permutations":
        lines = [
            "# H is the mean of all permutation matrices, weighted by a softmax.",
            f"orders = torch.tensor(list(itertools.permutations(range({n}))), device=logits.device)  # [n!, n]",
            f"matrices = torch.nn.functional.one_hot(orders, {n}).to(logits.dtype)  # [n!, n, n]: 1 at (i, p(i))",
            'return torch.einsum("tp,pij->tij", torch.softmax(logits, -1), matrices)',
        ]
    else:
        lines = _logarithms(row) if row["guard"] == "none" else _passes(row)
    if row["logit_limit"] is not None:
        lines = [f"logits = logits.clamp(-{row['logit_limit']!r}, {row['logit_limit']!r})", *lines]
    return _function("def residual_matrix(logits):", lines)


def _order(row: Mapping[str, Any]) -> tuple[str, str]:
    return ("rows", "columns") if row["order"] == "rows-first" else ("columns", "rows")


def _logarithms(row: Mapping[str, Any]) -> list[str]:
    """The passes on logarithms: without an eps a line far below the others would vanish, and 0 be divided by 0."""
    first, second = _order(row)
    lines = ["# No eps guards the sums, so the passes run on logarithms, where no entry vanishes."]
    if row["softmax"] not in ("none", first):
        lines.append(f"logits = torch.log_softmax(logits, {AXES[row['softmax']]})  # over {row['softmax']}")
    return [
        *lines,
        f"for _ in range({row['iterations']}):",
        f"    logits = logits - logits.logsumexp({AXES[first]}, keepdim=True)  # over {first}",
        f"    logits = logits - logits.logsumexp({AXES[second]}, keepdim=True)  # over {second}",
        "return logits.exp()",
    ]


def _passes(row: Mapping[str, Any]) -> list[str]:
    first, second = _order(row)
    eps, iterations = row["eps"], row["iterations"]

    def divided(axis: str) -> str:
        total = f"P.sum({AXES[axis]}, keepdim=True)"
        total = f"{total}.clamp(min={eps!r})" if row["guard"] == "clip" else f"({total} + {eps!r})"
        return f"P = P / {total}  # over {axis}"

    lines: list[str] = []
    if row["softmax"] == "none":
        lines.append(f"P = (logits - logits.amax({AXES[first]}, keepdim=True)).exp()")
    else:
        added = _plus(eps) if row["guard"] == "add" else ""
        lines.append(f"P = torch.softmax(logits, {AXES[row['softmax']]}){added}  # over {row['softmax']}")
    if row["softmax"] == first:
        lines += ["# The softmax took the place of the first pass.", divided(second)]
        iterations -= 1
    return [*lines, f"for _ in range({iterations}):", f"    {divided(first)}", f"    {divided(second)}", "return P"]
