"""JAX compiles cheaply in an adapter's own calls alone, and keeps programs where the user hasn't said otherwise."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

jax: Any = pytest.importorskip("jax", reason="JAX is not installed")
gradients = importlib.import_module("conformance.adapters.jax_gradients")

CHEAP, FOLDER = "jax_disable_most_optimizations", "jax_compilation_cache_dir"
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="both are for CPUs alone")


@pytest.fixture
def updates(monkeypatch):
    """What is set while a test runs, which leaves JAX as it was."""
    made: dict[str, Any] = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: made.update({name: value}))
    return made


def test_optimisations_are_left_out_in_a_call_and_come_back_even_where_it_raises():
    before = jax.config.read(CHEAP)
    with pytest.raises(ValueError, match="mine"), gradients.compiled_cheaply():
        assert jax.config.read(CHEAP) is True
        raise ValueError("mine")
    assert jax.config.read(CHEAP) is before is False


def test_programs_are_kept_in_the_users_cache(updates, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gradients.keep_programs()
    folder = tmp_path / "mhc-conformance" / "jax"
    assert updates[FOLDER] == str(folder) and folder.is_dir()
    assert updates["jax_persistent_cache_min_compile_time_secs"] == 0.0  # all of them are small


def test_the_oldest_programs_go_where_they_take_too_much(updates, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gradients, "LARGEST_CACHE", 100)
    folder = tmp_path / "mhc-conformance" / "jax"
    folder.mkdir(parents=True)
    for age in range(5):
        (folder / f"{age}-cache").write_bytes(bytes(20))
        os.utime(folder / f"{age}-cache", (1000 - age, 1000 - age))
    gradients.keep_programs()
    assert len(list(folder.iterdir())) == 5  # as much as there may be
    (folder / "new-cache").write_bytes(bytes(1))
    gradients.keep_programs()
    assert {path.name for path in folder.iterdir()} == {"new-cache", "0-cache", "1-cache"}


def test_programs_go_before_the_system_refuses_to_map_more(tmp_path, monkeypatch):
    """With Linux's default of 65,530 parts a run of all cases, compiled with XLA's own options, died on the way."""
    parts, most, cleared = tmp_path / "maps", tmp_path / "most", list[int]()
    monkeypatch.setattr(gradients, "MAPPED", parts)
    monkeypatch.setattr(gradients, "MOST_MAPPED", most)
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(1))
    assert gradients.programs_have_room()  # there are no such files
    parts.write_text("one\ntwo\nthree\n")
    most.write_text("7\n")
    assert gradients.programs_have_room()
    calls = gradients.StageCalls(jit=False)
    arrays = [np.zeros((1, 2, 2), dtype) for dtype in (np.float32, np.float64)] * 8  # each asks for another graph
    for count, limit in ((0, "7"), (1, "6")):
        most.write_text(limit)
        for logits in arrays:
            calls("residual_matrix", {}, lambda values: {"H": values["logits"]}, {"logits": logits}, None)
        assert len(cleared) == count


SINE = """
import os
import conformance.adapters.jax_gradients as gradients
gradients.compile_all_cheaply()
import jax.numpy as jnp
print(float(jnp.sin(0.0)), os.environ.get("XLA_FLAGS", ""))
"""


def sine(**environment: str) -> str:
    given = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    run = [sys.executable, "-c", SINE]
    return subprocess.run(run, env={**given, **environment}, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.skipif(jax.__version_info__[:2] not in gradients.SEEN, reason="this XLA may not know the options")
def test_options_of_programs_without_any_are_set_on_a_cpu_and_the_users_own_stay():
    every = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    assert sine(JAX_PLATFORMS="cpu") == f"0.0 {every}"
    mine = "--xla_cpu_parallel_codegen_split_count=2"
    assert sine(JAX_PLATFORMS="cpu", XLA_FLAGS=mine) == f"0.0 {mine} --xla_cpu_use_fusion_emitters=false"


def test_no_option_is_set_where_an_accelerator_may_read_it(monkeypatch, tmp_path):
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    gradients.compile_all_cheaply()
    assert "XLA_FLAGS" not in os.environ


OPERATIONS = """
import sys, warnings
import conformance.adapters.jax_gradients as gradients
gradients.keep_programs()
import jax.numpy as jnp
with warnings.catch_warnings(record=True) as seen:
    print(float(jnp.tanh(jnp.arange(7.0)).sum()), len(seen))
"""


def test_a_program_that_isnt_whole_is_made_again_and_nobody_is_warned(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    run = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-c", OPERATIONS], env=environment, capture_output=True, text=True, check=True
    )
    first = run()
    programs = [path for path in (tmp_path / "mhc-conformance" / "jax").iterdir() if path.name.endswith("-cache")]
    assert programs
    for path in programs:
        path.write_bytes(path.read_bytes()[:50])
    assert (run().stdout, run().stderr) == (first.stdout, "")


def test_a_place_that_the_user_has_chosen_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update(FOLDER, "mine")
    try:
        gradients.keep_programs()
        assert getattr(jax.config, FOLDER) == "mine" and not list(tmp_path.iterdir())
    finally:
        jax.config.update(FOLDER, None)


ENDING = """
import jax, sys
import conformance.adapters.jax_gradients as gradients
if "leave" in sys.argv:
    gradients.leave_caches()
emptied = []
jax._src.util.clear_all_caches = lambda: print("emptied")
jax.numpy.ones(3)
"""


@pytest.mark.skipif(jax.__version_info__[:2] not in gradients.SEEN, reason="this JAX may end otherwise")
@pytest.mark.parametrize(("arguments", "expected"), [([], True), (["leave"], False)])
def test_a_process_that_ends_leaves_the_caches_as_they_are(arguments, expected):
    run = [sys.executable, "-c", ENDING, *arguments]
    assert ("emptied" in subprocess.run(run, capture_output=True, text=True, check=True).stdout) is expected


LOWERING = """
import jax
import conformance.adapters.jax_gradients as gradients
lowered = lambda: jax.jit(lambda x: x + 1).lower(2.0).as_text(debug_info=True)
with gradients.compiled_cheaply():
    inside = lowered()
jax.clear_caches()
print("<string>" in inside, "<string>" in lowered(), "stablehlo.add" in inside)
"""


@pytest.mark.parametrize(("asked", "named"), [({}, False), ({"JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "10"}, True)])
def test_programs_of_a_call_name_lines_of_python_only_where_that_is_asked_for(asked, named):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_TRACEBACK_IN_LOCATIONS_LIMIT"} | asked
    run = [sys.executable, "-c", LOWERING]
    text = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert text.split() == [str(named), "True", "True"]


FIRST = """
import os, sys, jax
seen = []
default_backend = jax.default_backend
jax.default_backend = lambda: seen.append(os.environ.get("XLA_FLAGS", "")) or default_backend()
from conformance.implementations.registry import load
load(sys.argv[1])
print(seen[0])
"""


@pytest.mark.skipif(jax.__version_info__[:2] not in gradients.SEEN, reason="this XLA may not know the options")
@pytest.mark.parametrize("name", ["jax", "jax-jit"])
def test_options_are_set_before_xla_reads_them_whichever_implementation_comes_first(name):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-c", FIRST, name]
    seen = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    assert "xla_cpu_use_fusion_emitters=false" in seen
