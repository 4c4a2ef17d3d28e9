"""Each test that takes ``backend`` runs once for each framework, and is skipped by name where one isn't installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from tests import checking
from tests.checking import checked, unchecked  # noqa: F401

FRAMEWORKS = {"jax": "flax", "torch": "torch"}
"""Each framework, and a package that it needs here."""
pytest_collection_modifyitems = checking.strict(__file__)


@pytest.fixture(params=FRAMEWORKS)
def backend(request: pytest.FixtureRequest) -> Any:
    """`tests.parity.jax_backend` or `tests.parity.torch_backend`."""
    name = request.param
    if importlib.util.find_spec(FRAMEWORKS[name]) is None:
        pytest.skip(f"{FRAMEWORKS[name]} isn't installed: pip install 'mhc-conformance[{name}]'")
    return importlib.import_module(f"tests.parity.{name}_backend")


@pytest.fixture
def float64(backend: Any) -> Iterator[None]:
    """Arrays may be float64, which JAX has to be told."""
    with backend.float64():
        yield
