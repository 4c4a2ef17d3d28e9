"""The golden layer and stack cases on meshes of virtual devices and of processes: ``python -m tests.parity.meshes``.

Options are handed on to every ``mhc-conformance run``; ``--quick`` takes a covering subset of the cases. ``--sample``
takes four meshes: each axis of each framework once, in one process and in several.
"""

from __future__ import annotations

import subprocess
import sys

QUICK = ("--quick",)
RUNS = (
    ("jax", (), "data=8 fsdp=8 sequence=8 tensor=8 data=2,tensor=4 fsdp=2,sequence=2,tensor=2 data=2,fsdp=2,tensor=2"),
    ("jax-explicit", (), "data=2,fsdp=2,tensor=2"),
    ("jax", ("--processes", "2"), "data=2,tensor=2"),
    ("jax", ("--processes", "4", *QUICK), "fsdp=2,tensor=2"),
    ("torch", QUICK, "data=2,fsdp=2,tensor=2 data=2,fsdp=2,sequence=2"),
    (
        "torch",
        (),
        "data=2 fsdp=2 sequence=2 tensor=2 data=2,tensor=2 fsdp=2,tensor=2 sequence=2,tensor=2 data=2,fsdp=2",
    ),
)
"""Implementation, options and meshes of each run. Eight processes of PyTorch, and four of JAX, take a subset."""


SAMPLE = (
    ("jax", (), "data=2,fsdp=2,tensor=2"),
    ("jax", ("--processes", "2"), "sequence=2,tensor=2"),
    ("torch", (), "data=2,tensor=2 fsdp=2,sequence=2"),
)


def commands(options: list[str]) -> list[list[str]]:
    """The command lines."""
    lines = []
    runs, options = (SAMPLE if "--sample" in options else RUNS), [o for o in options if o != "--sample"]
    for name, own, meshes in runs:
        named = [part for mesh in meshes.split() for part in ("--mesh", mesh)]
        added = [option for option in options if option not in own]
        stages = ["--stage", "layer", "--stage", "stack", "--no-progress"]
        lines.append(["mhc-conformance", "run", "--impl", name, *named, *own, *added, *stages])
    return lines


def main() -> None:
    for command in commands(sys.argv[1:]):
        print("$", *command, flush=True)
        status = subprocess.run(command).returncode
        if status:
            sys.exit(status)


if __name__ == "__main__":
    main()
