"""Fixtures of the porter's tests."""

from __future__ import annotations

import pytest

from conformance.porter.port import Options, port
from tests.conformance.porter.porter_data import write_canonical


@pytest.fixture
def ported(tmp_path):
    """Writes sites in a dialect and ports them to another; everything under ``tmp_path``."""

    def run(sites, dialect, to_dialect=None, to="canonical", name="there.safetensors", **options):
        source = write_canonical(tmp_path / "source.safetensors", sites, dialect)
        return port(source, tmp_path / name, Options(to=to, to_dialect=to_dialect, **options))

    return run
