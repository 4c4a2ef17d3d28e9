"""Eight virtual devices for JAX, where it is installed; child processes find the modules of this folder."""

import importlib.util
import os
from pathlib import Path

if importlib.util.find_spec("jax"):
    import jax

    jax.config.update("jax_num_cpu_devices", 8)

os.environ["PYTHONPATH"] = os.pathsep.join(
    part for part in (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")) if part
)
