"""Fetches the witnesses' wheels: ``python -m conformance.witnesses.fetch FOLDER``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

VARIABLE = "MHC_WITNESSES"
"""The environment variable that names the folder."""
PACKAGES = (
    "fla-core==0.6.0",
    "maxtext==0.2.2",
    "maxtext==0.2.5",
    "mlx-lm==0.32.2",
    "mlx-vlm==0.7.10",
    "nemo-automodel==0.7.0",
    "tile-kernels==2.1.0",
    "vllm-tpu==0.32.0",
)
PYTHON = "3.12"  # some have wheels for this one only; what is imported of them runs on 3.11 too


class WitnessError(ImportError):
    """A witness that isn't there, or can't be loaded."""


def folder(package: str) -> Path:
    """Where a package lies, for instance ``maxtext==0.2.2``.

    Raises:
        WitnessError: it hasn't been fetched.
    """
    root = os.environ.get(VARIABLE)
    place = Path(root or "") / package
    if root is None or not place.is_dir():
        raise WitnessError(
            f"{package} must be unpacked in the folder that {VARIABLE} names ({root or 'not set'}): run "
            f"python -m conformance.witnesses.fetch FOLDER, and set {VARIABLE}=FOLDER"
        )
    return place


def fetch(root: Path) -> None:
    """Unpacks every package of `PACKAGES` that isn't there yet, without its dependencies.

    Raises:
        subprocess.CalledProcessError: pip failed; nothing half-unpacked is left.
    """
    for package in PACKAGES:
        place = root / package
        if place.is_dir():
            continue
        partial = root / f".{package}.{os.getpid()}"
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", PYTHON]
        without = {k: v for k, v in os.environ.items() if k != "PIP_CONSTRAINT"}  # two versions of one package
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(partial), package]
        subprocess.run(command, check=True, env=without)
        partial.rename(place)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m conformance.witnesses.fetch FOLDER")
    try:
        fetch(Path(sys.argv[1]))
    except subprocess.CalledProcessError as error:
        sys.exit(f"pip could not fetch {error.cmd[-1]}: exit status {error.returncode}")
