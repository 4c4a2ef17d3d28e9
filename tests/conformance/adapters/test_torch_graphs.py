"""Graphs that torch-compile captures are kept for the next run, and found only by all that they were made from."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from types import FunctionType
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", reason="PyTorch is not installed")
graphs = importlib.import_module("conformance.adapters.torch_graphs")
Sources = importlib.import_module("conformance.adapters.sources").Sources
pytestmark = pytest.mark.skipif(
    torch.__version__.split(".")[:2] not in graphs.SEEN, reason="graphs of this PyTorch aren't kept"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "mhc-conformance" / "torch"


SOURCES = Sources(("torch_impl",))


def keeping(sources: Any = SOURCES) -> Any:
    return graphs.Graphs(sources)


@pytest.fixture
def captures(monkeypatch):
    """How often a function was captured."""
    made: list[Any] = []
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *given, **named: made.append(given) or compile(*given, **named))
    return made


def stage(factor: float, **held: Any) -> FunctionType:
    told = {"factor": factor, **held}

    def body(values):
        extra = told.get("extra", 0.0)
        return {"out": torch.sin(values["x"] * told["factor"]).sum(-1) + extra, "twice": 2 * values["x"]}

    return body  # type: ignore[return-value]


def called(function: Any, x: Any) -> tuple[Any, Any]:
    x = x.detach().requires_grad_()
    outputs = function({"x": x})
    (gradient,) = torch.autograd.grad([outputs["out"].sum(), outputs["twice"].square().sum()], [x])
    return outputs["out"].detach(), gradient


X = torch.linspace(-1, 1, 12).reshape(3, 4)
EXPECTED = torch.sin(X * 2).sum(-1), 2 * torch.cos(X * 2) + 8 * X


def agrees(actual: tuple[Any, Any], expected: tuple[Any, Any] = EXPECTED) -> bool:
    return all(torch.allclose(a, e, atol=1e-6) for a, e in zip(actual, expected, strict=True))


def test_a_graph_is_captured_once_and_read_by_the_next(folder, captures):
    first = called(keeping()(stage(2.0), "one"), X)
    assert agrees(first) and len(captures) == len(list(folder.iterdir())) == 1
    read = called(keeping()(stage(2.0), "one"), X)
    assert len(captures) == 1 and all(torch.equal(a, b) for a, b in zip(first, read, strict=True))


READER = """
import sys, torch
from tests.conformance.adapters import test_torch_graphs as those
def refuse(*given, **named): raise AssertionError("captured")
torch.compile = refuse
torch.set_num_threads(int(sys.argv[1]))
assert those.agrees(those.called(those.keeping()(those.stage(2.0), "one"), those.X))
"""


def test_another_process_reads_it_without_capturing_anything(folder):
    called(keeping()(stage(2.0), "one"), X)
    subprocess.run([sys.executable, "-c", READER, str(torch.get_num_threads())], env=dict(os.environ), check=True)


def test_a_process_with_other_threads_keeps_another_graph_and_leaves_this_one(folder, captures):
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 1, 2):
            torch.set_num_threads(number)
            assert agrees(called(keeping()(stage(2.0), "one"), X))
    finally:
        torch.set_num_threads(threads)
    assert len(captures) == 2 == len(list(folder.iterdir()))


def test_another_key_another_kind_of_tensors_and_other_code_are_other_graphs(folder, captures, monkeypatch):
    function = keeping()(stage(2.0), "one")
    called(function, X)
    for number, x in enumerate((X[:2], X.double(), X.T.contiguous().T), start=2):
        called(function, x)
        assert len(captures) == number
    assert not function({"x": X})["out"].requires_grad and len(captures) == 5
    called(keeping()(stage(2.0), "two"), X)
    assert len(captures) == 6
    called(keeping(Sources(("conformance.adapters",)))(stage(2.0), "one"), X)
    monkeypatch.setattr(torch, "__version__", "2.13.1")
    called(keeping()(stage(2.0), "one"), X)
    assert len(captures) == 8 == len(list(folder.iterdir()))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A file of a package that can be imported."""
    place = tmp_path / "captured_code"
    place.mkdir()
    (place / "__init__.py").write_text("")
    (place / "inner.py").write_text("a = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return place / "inner.py"


def test_what_graphs_are_made_from_is_every_line_of_the_packages(package):
    first = Sources(["captured_code"])
    assert first.digest == Sources(["captured_code"]).digest and first.unchanged()
    (package.parent / ".#inner.py").symlink_to("nobody@nowhere")  # an editor's lock
    assert first.digest == Sources(["captured_code"]).digest and first.unchanged()
    package.write_text("a = 2\n")
    assert first.digest != Sources(["captured_code"]).digest and not first.unchanged()


def test_a_graph_of_code_whose_file_has_changed_since_is_not_kept(folder, captures, package):
    sources = Sources(["captured_code"])
    called(keeping(sources)(stage(2.0), "one"), X)
    assert len(list(folder.iterdir())) == 1
    os.utime(package, (1, 1))
    assert agrees(called(keeping(sources)(stage(2.0), "two"), X))
    assert len(captures) == 2 and len(list(folder.iterdir())) == 1


def test_torch_impl_and_the_adapters_are_what_is_captured():
    sources = importlib.import_module("conformance.adapters.torch_adapter").SOURCES
    files = {"/".join(path.split(os.sep)[-2:]) for path, *_ in sources._state()}
    assert {"torch_impl/residual.py", "lean/reading.py", "adapters/torch_adapter.py", "adapters/branch.py"} <= files


def test_a_graph_that_is_read_is_young_again(folder):
    called(keeping()(stage(2.0), "one"), X)
    (file,) = folder.iterdir()
    os.utime(file, (1, 1))
    called(keeping()(stage(2.0), "one"), X)
    assert file.stat().st_mtime > 1


def test_a_graph_whose_file_cannot_be_touched_is_read_all_the_same(folder, captures, monkeypatch):
    called(keeping()(stage(2.0), "one"), X)

    def another_users(*given: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "utime", another_users)
    assert agrees(called(keeping()(stage(2.0), "one"), X)) and len(captures) == 1


def test_where_the_user_has_switched_caches_off_nothing_is_kept(folder):
    run = [sys.executable, "-m", "conformance.cli", "run", "--impl", "torch-compile", "--case", "smoke-paper-2"]
    environment = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    subprocess.run([*run, "--stage", "post", "--sizes", "none"], env=environment, capture_output=True, check=True)
    assert not folder.exists()


@pytest.mark.parametrize("switch", ["TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"])
@pytest.mark.parametrize("name", ["torch-compile", "torch-inductor"])
def test_compiling_that_is_switched_off_is_said_at_once(name, switch):
    run = [sys.executable, "-m", "conformance.cli", "run", "--stage", "expand", "--impl", name]
    ended = subprocess.run(run, env={**os.environ, switch: "1"}, capture_output=True, text=True)
    assert ended.returncode == 3 and ended.stdout == "" and len(ended.stderr.strip().splitlines()) == 1
    assert switch in ended.stderr and name in ended.stderr


def test_pytorch_does_not_warn_of_what_dynamo_looks_at(folder, recwarn):
    x = X.clone().requires_grad_() * 1  # not a leaf
    keeping()(stage(2.0), "one")({"x": x})
    assert not [warning for warning in recwarn if "leaf" in str(warning.message)]


@pytest.mark.parametrize("broken", [b"", b"nonsense", None])
def test_a_file_that_isnt_whole_is_made_anew(folder, captures, broken):
    called(keeping()(stage(2.0), "one"), X)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-50] if broken is None else broken)
    assert agrees(called(keeping()(stage(2.0), "one"), X)) and len(captures) == 2
    assert agrees(called(keeping()(stage(2.0), "one"), X)) and len(captures) == 2


def test_a_graph_of_something_else_is_not_run_though_its_key_is_the_same(folder, captures):
    called(keeping()(stage(2.0), "one"), X)
    out, _ = called(keeping()(stage(3.0), "one"), X)
    assert torch.allclose(out, torch.sin(X * 3).sum(-1)) and len(captures) == 2


def test_a_graph_that_changes_under_its_function_is_captured_anew(folder, captures):
    body = stage(2.0)
    function = keeping()(body, "one")
    called(function, X)
    assert body.__closure__ is not None
    body.__closure__[0].cell_contents["factor"] = 3.0
    out, _ = called(function, X)
    assert torch.allclose(out, torch.sin(X * 3).sum(-1))


@pytest.mark.parametrize("extra", [1.0, 5.0])
def test_a_tensor_that_the_function_holds_is_never_an_old_one(folder, extra):
    called(keeping()(stage(2.0, extra=torch.ones(3)), "one"), X)
    out, _ = called(keeping()(stage(2.0, extra=torch.full((3,), extra)), "one"), X)
    assert torch.allclose(out, EXPECTED[0] + extra)


def test_where_nothing_can_be_written_it_runs_all_the_same(folder, monkeypatch):
    function = keeping()(stage(2.0), "one")

    def full(*given: Any) -> None:
        raise OSError("no space left on the device")

    monkeypatch.setattr(graphs.atomic, "write", full)
    assert agrees(called(function, X)) and not list(folder.iterdir())


def test_without_a_home_nothing_is_kept(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert keeping()._folder is None
    assert agrees(called(keeping()(stage(2.0), "one"), X))


def test_the_oldest_graphs_go_where_they_take_too_much(folder, monkeypatch):
    folder.mkdir(parents=True)
    for age in range(3):
        (folder / str(age)).write_bytes(bytes(20))
        os.utime(folder / str(age), (1000 - age, 1000 - age))
    monkeypatch.setattr(graphs, "LARGEST", 50)
    keeping()
    assert [path.name for path in folder.iterdir()] == ["0"]


def shared(first: int, second: int) -> dict[str, Any]:
    memory = torch.zeros(8)
    return {"x": memory[first : first + 4], "y": memory[second : second + 4]}


def test_kinds_of_tensors():
    base = {"x": torch.zeros(2, 4), "y": torch.zeros(4)}
    differ = [
        {"x": torch.zeros(2, 4), "z": torch.zeros(4)},
        {**base, "x": torch.zeros(4, 2)},
        {**base, "x": torch.zeros(4, 2).T},
        {**base, "x": torch.zeros(2, 4, dtype=torch.bfloat16)},
        {**base, "x": torch.zeros(2, 4).requires_grad_()},
        {**base, "x": torch.zeros(2, 4).requires_grad_() * 1},
        shared(0, 4), shared(0, 0), shared(0, 2), {"x": torch.zeros(4), "y": torch.zeros(4)},
    ]  # fmt: skip
    kinds = [graphs.kind_of(tensors) for tensors in (base, *differ)]
    with torch.no_grad():
        kinds.append(graphs.kind_of(base))
    assert len(set(kinds)) == len(kinds)
    assert graphs.kind_of(base) == graphs.kind_of({"x": torch.ones(2, 4), "y": torch.ones(12)[8:]})


@pytest.mark.parametrize("stage", ["layer", "stack"])
def test_a_stage_holds_its_modules_own_configuration_in_every_call(monkeypatch, stage):
    """Dynamo guards whether both are one object; modules are shared by equal configurations, which are made anew."""
    adapter = importlib.import_module("conformance.adapters.torch_adapter")
    cases = importlib.import_module("conformance.cases.corpus").load_corpus()
    item = next(item for case in cases for item in case.items() if item.stage == stage)
    monkeypatch.setattr(
        adapter, "_layer", lambda values, c, options: held.append(options["module"].config is c) or 1 / 0
    )
    held: list[bool] = []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            getattr(adapter.eager(), stage)(item.inputs(), item.config, None)
    assert held == [True, True]


@pytest.mark.parametrize("stage", ["residual_matrix", "stack"])
def test_the_key_of_a_graph_has_the_backend(monkeypatch, stage):
    adapter = importlib.import_module("conformance.adapters.torch_adapter")
    cases = importlib.import_module("conformance.cases.corpus").load_corpus()
    item = next(item for case in cases for item in case.items() if item.stage == stage)
    keys: list[str] = []
    for backend in ("plain", "lean"):
        implementation = adapter.TorchImplementation("mine", None, "eager", backend=backend)
        monkeypatch.setattr(implementation, "_run", lambda key, function: keys.append(key) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            getattr(implementation, stage)(item.inputs(), item.config, None)
    assert len(set(keys)) == len(keys) == 2
