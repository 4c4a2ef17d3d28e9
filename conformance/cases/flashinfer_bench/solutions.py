"""Solutions that call `torch_impl`: what somebody else's kernel is compared with, and what the export is tried with."""

from __future__ import annotations

import textwrap

from conformance.cases.flashinfer_bench.kernel import Kernel
from conformance.cases.flashinfer_bench.records import Build, Solution, Source

PRE = """
    n, sizes = CONFIG.streams, [CONFIG.streams, CONFIG.streams, CONFIG.residual_columns]
    weights = {norm}
    # [columns, n * dim] -> [n, dim, columns]
    phi = fn.T.unflatten(0, (n, CONFIG.dim)).split(sizes, -1)
    for index, (part, bias) in enumerate(zip({parts}, base.split(sizes), strict=False)):
        square = part == "res" and CONFIG.residual == "sinkhorn"
        weights[f"{{part}}_alpha"] = phi[index]
        weights[f"{{part}}_alpha_scale"] = scale[index : index + 1]
        weights[f"{{part}}_beta"] = bias.unflatten(0, (n, n)) if square else bias
    u, context, handed = torch_impl.pre(x, weights, CONFIG, {carried})
    return {results}
"""
HEAD = """
    phi = fn.T.unflatten(0, (CONFIG.streams, CONFIG.dim))  # [n, n * dim] -> [n, dim, n]
    return torch_impl.head(x, {"head_fn": phi, "head_scale": scale, "head_base": base}, CONFIG)
"""


def torch_solution(kernel: Kernel) -> Solution:
    """The operation by `torch_impl`, which must be installed where the Solution is built."""
    dim = 1 if kernel.dim is None else kernel.dim
    config = f'CONFIG = torch_impl.MHCConfig.from_dialect("{kernel.dialect}", streams={kernel.streams}, dim={dim})'
    run = f"def run({', '.join(kernel.arguments)}):\n    {_body(kernel).strip()}"
    source = "\n".join(
        [f'"""{kernel.op_type} by torch_impl, of the package mhc-conformance."""', "", "import torch_impl", "", config]
    )
    return Solution(
        name=f"torch_impl_{kernel.name}",
        definition=kernel.name,
        author="mhc-conformance",
        description="torch_impl of mhc-conformance: eager PyTorch, written to be read and to be right",
        spec=Build(
            language="python",
            target_hardware=("cpu", "cuda"),
            entry_point="main.py::run",
            dependencies=("mhc-conformance",),
            destination_passing_style=False,
        ),
        sources=(Source("main.py", f"{source}\n\n\n{run}\n"),),
    )


def _body(kernel: Kernel) -> str:
    if kernel.stage == "residual_matrix":
        return "return torch_impl.residual_matrix(logits, CONFIG)"
    if kernel.stage == "post":
        H = "H" if kernel.mixed else "None"
        return f"return torch_impl.post_mix(y, x, post, {H}, CONFIG)"
    if kernel.stage == "head":
        return HEAD
    norm = "norm_weight" in kernel.arguments
    results = {"u": "u", "pre": "handed", "post": "context.post", "H": "context.H"}
    return (
        textwrap.dedent(PRE)
        .replace("\n", "\n    ")
        .format(
            norm='{"mhc_norm.scale": norm_weight.unflatten(0, (n, CONFIG.dim))}' if norm else "{}",
            parts=kernel.parts,
            carried="carried" if "carried" in kernel.arguments else "None",
            results=", ".join(results[name] for name in kernel.results),
        )
    )
