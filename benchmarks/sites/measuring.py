"""Times, memory and operators of the contenders at one shape, taken in turns so that the machine's mood is shared."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from benchmarks.sites.contenders import CONTENDERS, Ours, drawn
from benchmarks.sites.numbers import STREAMS, TOLERANCE, Shape, quartiles, rounds_are_enough

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Figures:
    """What one contender takes at one shape; or why that isn't known.

    Attributes:
        seconds: by ``forward`` and ``both`` the median, with the first and the third quartile.
        saved, peak: bytes kept for the way back beside x and the weights, and the largest that are held in a call.
        operators: dispatched by ``forward`` and ``both``.
    """

    seconds: dict[str, tuple[float, float, float]]
    saved: int
    peak: int
    operators: dict[str, int]


def measured(shape: Shape, device: str) -> dict[str, Any]:
    """The figures of every contender by name, or a sentence for one that wasn't measured; and a copy's seconds."""
    torch.compiler.reset()  # a graph is made for each shape
    made: dict[str, nn.Module] = {}
    cells: dict[str, Any] = {}
    weights = drawn(shape.dim, device)
    x = torch.randn(1, shape.tokens, STREAMS, shape.dim, generator=torch.Generator().manual_seed(1))
    x = x.to(device, DTYPES[shape.dtype]).requires_grad_()
    true = _results(Ours(shape.dim, weights, "plain").to(device), x)
    for contender in CONTENDERS:
        reason = contender.missing(device)
        if not reason and contender.make is not None:
            try:
                module = contender.make(shape.dim, weights).to(device)
                _poison(x)
                reason = _difference(_results(module, x), true, TOLERANCE[shape.dtype])
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        if reason:
            cells[contender.name] = f"not measured: {reason}"
        else:
            made[contender.name] = module
    calls = {
        **{(name, "forward"): _forward(module, x) for name, module in made.items()},
        **{(name, "both"): _both(module, x) for name, module in made.items()},
        ("copy", ""): lambda: x.detach().clone(),
    }
    times = _in_turns(calls, device)
    for name, module in made.items():
        operators = {kind: _profiled(calls[name, kind]) for kind in ("forward", "both")}
        cells[name] = asdict(
            Figures(
                {kind: quartiles(times[name, kind]) for kind in ("forward", "both")},
                _saved(module, x),
                operators["both"][1],
                {kind: count for kind, (count, _) in operators.items()},
            )
        )
    return {"copy": quartiles(times["copy", ""])[0], "cells": cells}


def _results(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    out = module(x)
    return out.detach(), torch.autograd.grad(out.float().square().sum(), x)[0]


def _difference(results: tuple[Tensor, Tensor], true: tuple[Tensor, Tensor], tolerance: float) -> str:
    """What is wrong with results; empty where they are those of the same function."""
    for name, one, other in zip(("output", "gradient of x"), results, true, strict=True):
        error = float((one.float() - other.float()).abs().max() / other.float().abs().max())
        if not error <= tolerance:
            return f"its {name} is off by {error:.2g} of the largest value"
    return ""


def _poison(x: Tensor) -> None:
    """Leaves NaN in the memory that is freed, so that an output which isn't written shows."""
    held = [torch.full_like(x, torch.nan) for _ in range(3)]
    held.append(torch.full((x.shape[1], STREAMS * STREAMS), torch.nan, device=x.device))
    del held


def _forward(module: nn.Module, x: Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return module(x)

    return call


def _both(module: nn.Module, x: Tensor) -> Callable[[], object]:
    cotangent = torch.ones_like(x)
    parameters = [value for value in module.parameters() if value.requires_grad]

    def call() -> object:
        return torch.autograd.grad(module(x), [x, *parameters], cotangent, allow_unused=True)

    return call


def _in_turns(calls: Mapping[Any, Callable[[], object]], device: str) -> dict[Any, list[float]]:
    """Seconds of each call, one of each after the other, until the slowest has taken a second."""
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call()
    order, draw = list(calls), random.Random(0)
    while not rounds_are_enough(times):
        for key in order:
            with _timed(times[key], device):
                calls[key]()
        draw.shuffle(order)  # what comes after a large call finds colder caches
    return times


@contextmanager
def _timed(times: list[float], device: str) -> Iterator[None]:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    yield
    if device == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - began)


def _saved(module: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that a forward pass keeps, beside those of x and of the parameters."""
    known = {value.untyped_storage().data_ptr() for value in (x, *module.parameters())}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with saved_tensors_hooks(keep, lambda value: value):
        out = module(x)
    del out
    return sum(kept.values())


def _profiled(call: Callable[[], object]) -> tuple[int, int]:
    """Operators that a call dispatches, not counting those inside of another; and the most bytes that it holds."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.events() or []
    outermost = [e for e in events if e.name.startswith("aten::") and not _inside(e)]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.time_range.start):  # what each allocates itself, less what it frees
        held += event.self_cpu_memory_usage
        peak = max(peak, held)
    return len(outermost), peak


def _inside(event: Any) -> bool:
    """Whether an operator was called by another."""
    parent = event.cpu_parent
    return parent is not None and (parent.name.startswith("aten::") or _inside(parent))
