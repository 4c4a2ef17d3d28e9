"""What is installed here, what runs, and what is broken: for ``mhc-conformance doctor``.

A framework is imported in a process of its own, so that a broken one can't end the command, nor keep it waiting.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any

from conformance.cases import corpus
from conformance.files.line import one_line
from conformance.files.places import CaseError
from conformance.implementations import registry
from conformance.implementations.child import Deadline, PythonChild, end_all
from conformance.interface import describe
from conformance.judge import integrity
from conformance.version import version as own_version

PACKAGES = (
    "numpy", "ml_dtypes", "msgspec", "safetensors", "jax", "jaxlib", "flax", "torch", "transformers", "triton",
    "python-flint", "plotly", "orbax-checkpoint", "gguf", "libtpu", "mlx",
)  # fmt: skip
EXTRAS = {
    "jax": ("jax", "flax"), "torch": ("torch",), "regenerate": ("flint", "hypothesis"), "report": ("plotly",),
    "orbax": ("orbax.checkpoint",), "gguf": ("gguf",), "triton": ("triton",),
}  # fmt: skip
"""The extras of pyproject.toml, and the modules that each brings."""
TOOLS = {
    "C compiler": ("cc", "gcc", "clang"), "git": ("git",),
    "browser, for tests of the page": ("chromium", "chromium-browser", "google-chrome", "firefox"),
}  # fmt: skip
SETTINGS = {
    "XLA_FLAGS": "how XLA compiles",
    "JAX_ENABLE_X64": "whether JAX has float64",
    "JAX_DEFAULT_MATMUL_PRECISION": "how JAX multiplies matrices",
    "JAX_NUMPY_DTYPE_PROMOTION": "which dtypes JAX mixes",
    "JAX_PLATFORMS": "where JAX runs",
    "NVIDIA_TF32_OVERRIDE": "whether CUDA's libraries round operands to TF32",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "whether PyTorch rounds operands to TF32",
    "CUBLAS_WORKSPACE_CONFIG": "whether cuBLAS repeats to the bit",
    "TRITON_INTERPRET": "whether Triton's kernels are interpreted",
    "CUDA_VISIBLE_DEVICES": "which GPUs there are",
    "OMP_NUM_THREADS": "how many threads add up",
    "MKL_NUM_THREADS": "how many threads add up",
    "MHC_CONFORMANCE_IMPL": "what pytest runs",
    "MHC_WITNESSES": "where the witnesses are",
}
"""Settings of the environment that change results or what runs, and what each says."""
PATIENCE = 7.0
"""Seconds for all frameworks to be imported."""


@dataclass
class Examination:
    """What was found.

    Attributes:
        broken: what is installed and doesn't work, and files that aren't as promised: a line each.
        sections: a heading, and its lines.
    """

    broken: list[str] = field(default_factory=list[str])
    sections: dict[str, list[str]] = field(default_factory=dict[str, list[str]])


def look(patience: float = PATIENCE) -> Examination:
    """Looks at everything; it takes at most about ``patience`` seconds."""
    examination = Examination()
    devices = _frameworks(examination, patience)
    examination.sections = {
        "versions": [f"mhc-conformance {own_version()}, Python {platform.python_version()} ({sys.executable})"]
        + [f"{name} {number}" for name, number in _versions()],
        "devices": [_machine(), *devices],
        "extras": list(_extras()),
        "implementations": list(_implementations()),
        "tools": list(_tools()),
        "fixtures": list(_fixtures(examination)),
        "settings in the environment": list(_settings(os.environ)),
    }
    return examination


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"CPU: {platform.machine()}, {cores} cores, {memory:.0f} GiB of memory"


def ask_torch(connection: Connection) -> None:
    """In the process of its own: what PyTorch sees."""

    def devices() -> list[str]:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return [f"CUDA GPU {k}: {torch.cuda.get_device_name(k)}" for k in range(count)] or ["no GPU"]

    _answer(connection, devices)


def ask_jax(connection: Connection) -> None:
    """In the process of its own: what JAX sees."""

    def devices() -> list[str]:
        import jax

        importlib.import_module("flax")  # whether it can be imported is the question
        return [f"{device.platform} {device.id}: {device.device_kind}" for device in jax.devices()]

    _answer(connection, devices)


def ask_flint(connection: Connection) -> None:
    """In the process of its own: whether python-flint works."""

    def devices() -> list[str]:
        import flint

        assert flint.arb(1) + 1 == 2
        return []

    _answer(connection, devices)


def _answer(connection: Connection, found: Callable[[], list[str]]) -> None:
    try:
        connection.send(("found", found()))
    except Exception as error:
        connection.send(("broken", describe(error)))


ASKED = {"torch": ("torch", "ask_torch"), "jax": ("jax", "ask_jax"), "flint": ("flint", "ask_flint")}
"""A framework, the module by which it is known to be installed, and the function that asks it."""


def _frameworks(examination: Examination, patience: float) -> list[str]:
    """The devices that each framework sees; what can't be imported is noted as broken."""
    there = {name: function for name, (module, function) in ASKED.items() if registry.installed(module)}
    children: dict[str, PythonChild] = {}
    lines: list[str] = []
    deadline = Deadline(patience)
    try:
        for name, function in there.items():
            children[name] = PythonChild(f"{__name__}:{function}", kept="12")
        for name, child in children.items():
            if not child.connection.poll(deadline.left):
                lines.append(f"{name}: no answer within {patience:g} s, which may be the machine's load")
                continue
            try:
                kind, content = child.receive()
            except EOFError:
                kind, content = "broken", f"importing it {child.death(2.0) or 'failed'}"
            if kind == "broken":
                examination.broken.append(one_line(f"{name} is installed and can't be used: {content}"))
            else:
                lines += [one_line(f"{name} sees {device}") for device in content]
    finally:
        end_all(children.values())
    return lines


def _extras() -> Iterator[str]:
    for name, modules in EXTRAS.items():
        missing = [module for module in modules if not registry.installed(module)]
        lacking = f"missing {', '.join(missing)}: pip install 'mhc-conformance[{name}]'"
        yield f"{name}: {lacking if missing else 'complete'}"


def _implementations() -> Iterator[str]:
    chosen, left = registry.defaults()
    yield from (f"{name}: runs" for name in chosen)
    yield from (f"{name}: {reason}" for name, reason in left.items())


def _tools() -> Iterator[str]:
    for name, programs in TOOLS.items():
        paths = [path for program in programs if (path := shutil.which(program))]
        absent = f"none of {', '.join(programs)} is here"
        yield f"{name}: {paths[0] if paths else absent}"


def _fixtures(examination: Examination) -> Iterator[str]:
    try:
        problems = corpus.verify() + integrity.altered_dialects()
        examination.broken += [one_line(f"fixtures: {problem}") for problem in problems]
        state = f"{len(problems)} of them aren't as promised" if problems else f"corpus {corpus.corpus_hash()}"
        yield f"{len(corpus.manifest())} golden files, {state}"
    except CaseError as error:
        examination.broken.append(f"fixtures: {error}")
        yield "can't be read"


def _settings(environment: Mapping[str, Any]) -> Iterator[str]:
    given = {name: environment[name] for name in SETTINGS if name in environment}
    yield from (one_line(f"{name}={value[:200]} says {SETTINGS[name]}") for name, value in given.items())
    if not given:
        yield f"none of {', '.join(SETTINGS)} is set"
