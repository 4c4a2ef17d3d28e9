"""Streams of a .npy file: what it states is believed as far as its bytes go."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest

from conformance.porter.activations import MAGIC, read
from conformance.porter.errors import PortError
from conformance.porter.options import MOST_ELEMENTS


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_an_array_is_read_as_numpy_wrote_it(tmp_path, dtype, order):
    value = np.asarray(np.arange(48).reshape(3, 2, 8), dtype, order=order)  # type: ignore[call-overload]
    np.save(tmp_path / "x.npy", value)
    assert np.array_equal(read(tmp_path / "x.npy"), value) and read(tmp_path / "x.npy").dtype == np.float64


def described(path, text: str, data: bytes = b""):
    header = text.encode().ljust(117) + b"\n"
    path.write_bytes(MAGIC + b"\x01\x00" + struct.pack("<H", len(header)) + header + data)
    return path


@pytest.mark.parametrize(
    "text, saying",
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 4, 8), }", str(MOST_ELEMENTS)),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1000, 4, 8), }", "128000 bytes, and 0 are there"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (9**9**9, 4, 8), }", "malformed"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1, 4, 8), }", ""),
        ("{'descr': '<f4', 'shape': (1, 4, 8), }", "fortran_order"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4, 8), }", "a shape of"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4, 8), }", "at least one token"),
        ("[" * 100, "expected an array"),
    ],
)
def test_a_forged_description_costs_no_memory(tmp_path, text, saying):
    path = described(tmp_path / "x.npy", text)
    with pytest.raises(PortError, match=r"x\.npy") as caught:
        read(path)
    assert saying in str(caught.value) and str(caught.value).isprintable()


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.npy")
    with pytest.raises(PortError, match="it is a pipe, not a file"):
        read(tmp_path / "x.npy")
