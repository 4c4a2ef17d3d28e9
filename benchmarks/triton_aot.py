"""What the Triton kernels of `torch_impl` need on GPUs that aren't here: they are compiled ahead of time.

Every launch of a site, forward and backward, is recorded as it would be made, and its kernel compiled for each target.
Registers and local memory are those that ``cuobjdump -res-usage`` reads in the binary (Triton brings it), or the AMD
assembly's own; local memory on the stack is a spill. The bytes are those of tensors that a launch reads and writes
once, in units of tokens x dim x 2, for x in bfloat16: what stays in a cache or is read twice isn't told apart.

    python -m benchmarks.triton_aot [--target sm_90 …] [--check] [--json FILE] [--write docs/performance.md]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from conformance.files import atomic, document
from torch_impl import MHCConfig
from torch_impl.kernels import launching

RESULTS = Path(__file__).parent / "results" / "triton-aot.json"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TOKENS = 8192


@dataclass(frozen=True)
class Site:
    """A site whose launches are recorded."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    streams: int = 4
    dim: int = 4096
    dialect: str = "deepseek-v4"
    tokens: int = TOKENS

    @property
    def config(self) -> MHCConfig:
        return MHCConfig.from_dialect(self.dialect, streams=self.streams, dim=self.dim)


OTHERS = (1, 2, 3, 5, 6, 7)
"""Streams that the kernels pad."""


def _sites(single_pass: bool, dtype: torch.dtype, counts: tuple[int, ...]) -> Iterator[Site]:
    """A site of each number of streams, named by what it is."""
    dialect, end = ("deepseek-v4.1", ", single pass") if single_pass else ("deepseek-v4", "")
    for n in counts:
        of_streams = "" if n == 4 else f", {n} stream{'s' if n > 1 else ''}"
        yield Site(f"{str(dtype).removeprefix('torch.')}{of_streams}{end}", dtype, n, dialect=dialect)


SITES = (
    Site("bfloat16"),
    Site("float32", torch.float32),
    Site("float16", torch.float16),
    Site("bfloat16, 1,280 channels", dim=1280),
    Site("bfloat16, 8 streams", streams=8),
    Site("bfloat16, single pass", dialect="deepseek-v4.1"),
    Site("bfloat16, permutations", dialect="mhc-lite"),
    Site("bfloat16, rounded norm", dialect="maxtext"),
    Site("bfloat16, 64 tokens", tokens=64),
    *_sites(False, torch.bfloat16, OTHERS),
    *_sites(False, torch.float32, (*OTHERS, 8)),
    *_sites(True, torch.bfloat16, (*OTHERS, 8)),
    *_sites(True, torch.float32, (*OTHERS, 4, 8)),
)


@dataclass(frozen=True)
class Launch:
    """A kernel with what it was launched with."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the kernel, and of what else it does."""
        if self.constants.get("FUSED"):
            return f"{self.kernel.__name__}, mixing first"
        return self.kernel.__name__ + (", of a head" if self.constants.get("HEAD") else "")

    def source(self) -> ASTSource:
        """What `triton.compile` takes: types of the arguments, and which are multiples of 16."""
        names = self.kernel.arg_names
        unknown = {parameter.name for parameter in self.kernel.params if parameter.do_not_specialize}
        signature: dict[str, str] = {}
        ones: dict[str, int] = {}
        attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        for index, (name, value) in enumerate(zip(names, self._values(), strict=False)):
            signature[name] = _type(value)
            if isinstance(value, int) and value == 1 and name not in unknown:  # as Triton does when it launches
                signature[name], ones[name] = "constexpr", 1
            elif isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and name not in unknown):
                attributes[(index,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys((name for name in names if name not in signature), "constexpr")
        constants = {name: value for name, value in self.constants.items() if signature.get(name) == "constexpr"}
        return ASTSource(fn=self.kernel, signature=signature, constexprs=constants | ones, attrs=attributes)

    def _values(self) -> Iterator[Any]:
        """The arguments that aren't constants, by position and then by name."""
        yield from self.arguments
        for name in self.kernel.arg_names[len(self.arguments) :]:
            if self.kernel.params[self.kernel.arg_names.index(name)].is_constexpr:
                return
            yield self.constants[name]

    def options(self) -> dict[str, int]:
        """What a launch asks of the compiler."""
        return {name: value for name, value in self.constants.items() if name not in self.kernel.arg_names}

    def moved(self) -> int:
        """Bytes of the tensors that are handed over, each once."""
        tensors = {id(value): value for value in self._values() if isinstance(value, Tensor)}
        return sum(value.numel() * value.element_size() for value in tensors.values())


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def launches(site: Site) -> list[Launch]:
    """All launches of a site, forward and backward, on tensors without memory."""
    recorded: list[Launch] = []
    own, launching.launch = launching.launch, lambda kernel, grid, *a, **k: recorded.append(Launch(kernel, a, k))
    try:
        with torch.device("meta"):
            _site(site)
    finally:
        launching.launch = own
    return recorded


def _site(site: Site) -> None:
    config, n, T, C = site.config, site.streams, site.tokens, site.dim
    m = 2 * n + config.residual_columns
    x, out, dx, y, u, dy = (torch.empty(T, *one, dtype=site.dtype) for one in 3 * [(n, C)] + 3 * [(C,)])
    matrix, scale, shift = torch.empty(n * C, m), torch.empty(m), torch.empty(m)
    carried = torch.empty(T, n) if config.pre_from == "previous" else None
    normed = launching.normed(x, config)
    norm = torch.empty(n * C) if normed and config.norm_weight else None
    rounded = partial(torch.empty, dtype=site.dtype if normed else torch.float32)
    pre, post, H, sums = rounded(T, n), rounded(T, n), rounded(T, n, n), torch.empty(T, m + 1)
    dpre, dpost, dH, dmatrix = torch.empty(T, n), rounded(T, n), rounded(T, n, n), torch.empty(m, n * C)
    launching.read(x, carried, matrix, norm, scale, shift, config, False, (u, pre, post, H, sums))
    launching.mix(y, x, post, H, str(config.mix), config.mixing == "activation", out)
    launching.mix_back(y, x, post, H, str(config.mix), out, (dy, dx, dpost, dH))
    cotangents, own = (u, None, dpost, dH, out), (dx, dpre, dmatrix, scale, shift)
    launching.read_back(x, carried, matrix, scale, shift, sums, cotangents, config, False, own)
    if not normed:
        after = (torch.empty_like(u), torch.empty_like(pre), torch.empty_like(post), torch.empty_like(H), sums)
        launching.mix_read(y, x, post, H, config, carried, matrix, scale, shift, config, out, after)
    head_gates = torch.empty(n * C, n), torch.empty(n), torch.empty(n)
    read = (u, torch.empty(T, n), torch.empty(T, 0), torch.empty(T, 0), torch.empty(T, n + 1))
    of_head = dataclasses.replace(config, coefficients="float32", matrix="float32")  # as `functional.head` has it
    launching.read(x, None, head_gates[0], None, *head_gates[1:], of_head, True, read)
    if config.residual == "sinkhorn":
        launching.balance(H, config, dH)
        launching.balance_back(H, config, dH, torch.empty_like(H))


def compiled(launch: Launch, target: str) -> dict[str, Any]:
    """Registers, bytes of local and of shared memory of a kernel's binary."""
    made = triton.compile(launch.source(), target=TARGETS[target], options=launch.options())
    if "cubin" in made.asm:
        from triton.backends import nvidia

        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
        registers, spilled = used["REG"], used["STACK"] + used["LOCAL"]
    else:
        said = made.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", said)[0])
        counts = re.findall(r"\.(?:private_segment_fixed_size|vgpr_spill_count):\s*(\d+)", said)
        spilled = sum(int(value) for value in counts)
    return {"registers": registers, "spilled": spilled, "shared": made.metadata.shared}


def measured(site: Site, target: str) -> Iterator[dict[str, Any]]:
    """A row for each launch."""
    for launch in launches(site):
        yield {
            "site": site.name, "target": target, "kernel": launch.name,
            **compiled(launch, target), "moved units": round(launch.moved() / (site.tokens * site.dim * 2), 2),
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [site.name for site in SITES]
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--site", choices=names, nargs="+", default=names)
    parser.add_argument("--check", action="store_true", help=f"fail where a figure isn't that of {RESULTS.name}")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--write", type=Path, help=f"put the table of {RESULTS.name} between the markers of this page")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for site in SITES:
        for target in arguments.target if site.name in arguments.site else ():
            for row in measured(site, target):
                rows.append(row)
                print(*row.values(), sep="\t", flush=True)
    if arguments.json:
        atomic.write(arguments.json, written(rows))
    if arguments.write:
        document.rewrite(arguments.write, "triton", table(json.loads(RESULTS.read_text())))
    wrong = [f"it spills {row['spilled']} bytes: {row}" for row in rows if row["spilled"]]
    if arguments.check:
        recorded = json.loads(RESULTS.read_text())["rows"]
        wrong += [f"{RESULTS.name} has another figure, write it anew by --json: {r}" for r in rows if r not in recorded]
    for problem in wrong:
        print(problem, file=sys.stderr)
    return 1 if wrong else 0


def written(rows: list[dict[str, Any]]) -> str:
    """The figures as JSON, a row a line."""
    head = json.dumps({"triton": metadata.version("triton"), "tokens": TOKENS})[1:-1]
    lines = ",\n ".join(json.dumps(row) for row in rows)
    return f'{{{head}, "rows": [\n {lines}\n]}}\n'


def table(held: dict[str, Any]) -> str:
    """A row for each kernel of the first site, the range of registers over all sites, and the bytes that it moves."""
    lines = [
        f"Triton {held['triton']}, {held['tokens']:,} tokens. Registers a thread in {SITES[0].name} at "
        f"{SITES[0].dim:,} channels, and in brackets over {len(SITES)} sites; shared memory in KiB.",
        "",
        f"| kernel | moved | {' | '.join(TARGETS)} | shared | spilled |",
        f"|---|---|{'---|' * len(TARGETS)}---|---|",
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in held["rows"]):
        of_kernel = [row for row in held["rows"] if row["kernel"] == kernel]
        cells = []
        for target in TARGETS:
            there = {row["site"]: row["registers"] for row in of_kernel if row["target"] == target}
            cells.append(f"{there.get(SITES[0].name, '-')} ({min(there.values())} to {max(there.values())})")
        shared = max(row["shared"] for row in of_kernel) / 1024
        moved = of_kernel[0]["moved units"]
        spilled = sum(row["spilled"] for row in of_kernel)
        lines.append(f"| `{kernel}` | {moved:.2f} | {' | '.join(cells)} | {shared:.0f} | {spilled} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
