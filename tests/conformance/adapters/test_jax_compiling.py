"""JAX compiles cheaply in an adapter's own calls alone, and keeps programs where the user hasn't said otherwise."""

from __future__ import annotations

import importlib
from typing import Any

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


def test_a_place_that_the_user_has_chosen_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update(FOLDER, "mine")
    try:
        gradients.keep_programs()
        assert getattr(jax.config, FOLDER) == "mine" and not list(tmp_path.iterdir())
    finally:
        jax.config.update(FOLDER, None)
