"""Strict runs for some folders of tests: shapes are checked at every call, and a warning is an error.

A folder's conftest imports the fixtures, and has ``pytest_collection_modifyitems = checking.strict(__file__)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import jaxtyping
import pytest

ALLOWED = (
    # torch.compile imports torch.jit's classes, whose own decorator is deprecated (torch 2.13).
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
)
"""The warnings that aren't errors, all of other packages, each with the reason."""


@pytest.fixture(autouse=True)
def checked() -> Iterator[None]:
    """Checks the shapes and dtypes of every call of `jax_impl` and `torch_impl` against their annotations."""
    jaxtyping.config.update("jaxtyping_disable", False)
    yield
    jaxtyping.config.update("jaxtyping_disable", True)


@pytest.fixture
def unchecked(checked: None) -> None:
    """Turns the check off, so that the package's own errors come, which a user gets."""
    jaxtyping.config.update("jaxtyping_disable", True)


def strict(conftest: str) -> Callable[[list[pytest.Item]], None]:
    """The hook that makes every warning of a folder's tests an error."""
    folder = Path(conftest).parent

    def modify(items: list[pytest.Item]) -> None:
        for item in items:
            if folder in item.path.parents:
                item.add_marker(pytest.mark.filterwarnings("error", *ALLOWED))

    return modify
