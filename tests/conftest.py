"""Eight virtual devices for JAX, where it is installed; shapes that can be checked; child processes find this folder.

Every function of `jax_impl` and `torch_impl` is imported with jaxtyping's check of shapes and dtypes around it, by
beartype. The check is off unless a folder's own tests turn it on (`checking.checked`); `torch.compile` can't trace it
even then, so that a test of that needs a process of its own.
"""

import importlib.util
import os
import signal
from pathlib import Path

import jaxtyping

if importlib.util.find_spec("jax"):
    import jax

    jax.config.update("jax_num_cpu_devices", 8)

jaxtyping.config.update("jaxtyping_disable", True)
jaxtyping.install_import_hook(["jax_impl", "torch_impl"], "beartype.beartype")

os.environ["PYTHONPATH"] = os.pathsep.join(
    part for part in (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")) if part
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job ignores Ctrl-C, and so do its children
    signal.signal(signal.SIGINT, signal.default_int_handler)
