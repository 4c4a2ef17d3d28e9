"""Functions that Dynamo and AOTAutograd capture as graphs, which ATen runs; and graphs that are kept for the next run.

Capturing a graph takes half a second, reading it a hundredth of one, and the suite has over a thousand. A graph that is
kept is found by all that it was made from: the code of `torch_impl` and of these adapters, the versions of PyTorch and
Python, what the stage is told, and its tensors' dtypes, shapes, strides and shared memory. Dynamo's own guards on
arguments and on what a closure holds are checked at every call all the same.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import marshal
import os
import sys
import warnings
import zlib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch._dynamo
from functorch.compile import default_partition  # pyright: ignore[reportPrivateImportUsage]
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.output_code import OutputCode

from conformance.adapters.sources import Sources
from conformance.files import atomic, kept

Tensors = dict[str, torch.Tensor]
Stage = Callable[[Tensors], Tensors]
SEEN = (["2", "13"],)
"""Versions of PyTorch whose graphs are known to be the same when they are read back; others keep none."""
LARGEST = 1 << 29
"""Bytes of graphs that a process finds on disk at most; the oldest go."""
NOT_A_LEAF = "The .grad attribute of a Tensor that is not a leaf"
"""So PyTorch begins to warn where Dynamo looks at every attribute of a tensor that it is handed."""


class Program(OutputCode):
    """A captured graph; on disk the compiled Python text of it, and what the text names."""

    def __init__(self, graph: torch.fx.GraphModule):
        self._graph: torch.fx.GraphModule | None = graph
        self._forward: Callable[..., Any] | None = graph.forward
        self._code = b""
        self._names: dict[str, Any] = {}
        self._boxed_call = True  # AOTAutograd hands over a list, and looks for this where it has wrapped the object

    def __call__(self, inputs: Any) -> Any:
        assert self._forward is not None
        return self._forward(*inputs)

    def prepare_for_serialization(self) -> None:
        """Called by PyTorch for a copy of the object, before it is pickled.

        Raises:
            ValueError: the graph has tensors of its own, or other graphs in it.
        """
        assert self._graph is not None
        if any(node.op in ("get_attr", "call_module") for node in self._graph.graph.nodes):
            raise ValueError("a graph with parts of its own isn't kept")
        code = self._graph.graph.python_code("self")
        self._code = marshal.dumps(compile(code.src, "<graph>", "exec"))  # of this Python: its version is in the key
        self._names = {
            name: _Module(v.__name__) if isinstance(v, ModuleType) else v for name, v in code.globals.items()
        }
        self._graph = self._forward = None

    def post_compile(self, *args: Any, **kwargs: Any) -> None:
        """Called by PyTorch when the object has been made, and when it has been read."""
        if self._forward is None:
            names = {k: import_module(v.name) if isinstance(v, _Module) else v for k, v in self._names.items()}
            exec(marshal.loads(self._code), names)  # PyTorch's text of a graph, as it runs every graph
            forward: Any = names["forward"]
            self._forward = functools.partial(forward, None)

    def set_triton_bundle(self, triton_bundle: Any) -> None:
        """Part of the interface; there are no Triton kernels in graphs that ATen runs."""


class _Module:
    """Stands for a module in what is pickled."""

    def __init__(self, name: str):
        self.name = name


def _program(graph: torch.fx.GraphModule, _: Any) -> Any:
    return Program(graph)


def capturing() -> Callable[..., Any]:
    """torch's own "aot_eager", without the min-cut that chooses what to recompute: a third of its time."""
    return aot_autograd(fw_compiler=_program, bw_compiler=_program, partition_fn=default_partition)


class Graphs:
    """Captures functions of tensors, and keeps their graphs in the user's cache where that can be done.

    Args:
        sources: all code that may be captured, as it was imported.
    """

    def __init__(self, sources: Sources):
        self._sources = sources
        keeps = torch.__version__.split(".")[:2] in SEEN and not _told_to_keep_nothing()
        self._folder = kept.folder("torch") if keeps else None
        if self._folder is not None:
            kept.make_room(self._folder, LARGEST)

    def __call__(self, function: FunctionType, key: str) -> Stage:
        """The function, captured once for every kind of tensors that it meets.

        Args:
            key: equal for functions that are the same but for what their closures hold.
        """
        if self._folder is None:
            return torch.compile(function, fullgraph=True, dynamic=False, backend=capturing())
        made_from = f"{torch.__version__} {sys.version}\n{self._sources.digest}"
        return _Kept(function, f"{made_from}\n{key}", self._folder, self._sources)


def _told_to_keep_nothing() -> bool:
    """Whether the user has switched all of PyTorch's caches off, without which it refuses to keep a graph."""
    return bool(getattr(torch.compiler.config, "force_disable_caches", False))


class _Kept:
    """A function whose graphs are looked for on disk before they are captured, and written there."""

    def __init__(self, function: FunctionType, key: str, folder: Path, sources: Sources):
        self._function, self._key, self._folder, self._sources = function, key, folder, sources
        # What the closure holds, modules above all, is handed over when a graph is read, and isn't written.
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self._closure = {name: cell.cell_contents for name, cell in cells}
        self._graphs: dict[str, Any] = {}

    def __call__(self, tensors: Tensors) -> Tensors:
        kind = kind_of(tensors)
        graph = self._graphs.get(kind)
        if graph is None or not graph.guard_check(tensors):
            place = self._folder / hashlib.sha256(f"{self._key}\n{kind}".encode()).hexdigest()
            graph = self._graphs[kind] = self._read(place, tensors) or self._capture(place, tensors)
        return graph(tensors)

    def _read(self, place: Path, tensors: Tensors) -> Any:
        """A graph that was kept; None where there is none, or one that isn't whole or isn't right for the tensors."""
        try:
            content = io.BytesIO(zlib.decompress(place.read_bytes()))
            graph: Any = torch.compiler.load_compiled_function(
                content, f_globals=self._function.__globals__, external_data=self._closure
            )
            if not graph.guard_check(tensors):
                return None
            with contextlib.suppress(OSError):  # the folder may be another user's
                os.utime(place)  # what is read is young, and stays when room is made
            return graph
        except Exception:  # whatever a file that isn't whole makes of it: the graph is captured anew
            return None

    def _capture(self, place: Path, tensors: Tensors) -> Any:
        compiled: Any = torch.compile(self._function, fullgraph=True, dynamic=False, backend=capturing())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", NOT_A_LEAF)
            graph = compiled.aot_compile(((tensors,), {}))
        if not self._sources.unchanged():  # other processes would take it for a graph of what the files are now
            return graph
        try:
            content = type(graph).serialize(graph, self._closure).serialized_data
            atomic.write(place, zlib.compress(content, 1))
        except Exception:  # it can't be pickled, or the disk is full: it runs all the same
            pass
        return graph


def kind_of(tensors: Tensors) -> str:
    """All that a graph of tensors depends on: names, dtypes, shapes, strides, gradients, and who shares memory.

    And what Dynamo guards of the process: a graph of two threads isn't one for a process of one. Where in its memory a
    tensor begins matters beside others of the same memory alone.
    """
    begin: dict[int, tuple[int, int]] = {}
    described: list[tuple[Any, ...]] = []
    for name, t in tensors.items():
        number, offset = begin.setdefault(t.untyped_storage().data_ptr(), (len(begin), int(t.storage_offset())))
        shared = number, int(t.storage_offset()) - offset
        layout = str(t.device), tuple(t.shape), t.stride(), shared
        described.append((name, str(t.dtype), *layout, t.requires_grad, t.is_leaf))
    process = torch.is_grad_enabled(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    return repr((process, described))
