"""Eight virtual devices for JAX, where it is installed; Triton's interpreter where there is no GPU; shapes that can be
checked; child processes find this folder.

Every function of `jax_impl` and `torch_impl`, but Triton's kernels, is imported with jaxtyping's check of shapes and
dtypes around it, by beartype. The check is off unless a folder's own tests turn it on (`checking.checked`);
`torch.compile` can't trace it even then, so that a test of that needs a process of its own.
"""

import importlib.util
import os
import signal
from pathlib import Path

import jaxtyping

if importlib.util.find_spec("jax"):
    import jax

    jax.config.update("jax_num_cpu_devices", 8)

if not Path("/dev/nvidiactl").exists() and not Path("/dev/kfd").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, by whichever test does so first

jaxtyping.config.update("jaxtyping_disable", True)
root = Path(__file__).parents[1]
sources = [path for path in (root / "torch_impl").rglob("*.py") if path.name != "__init__.py"]
# Triton reads the source of a kernel, and can't see through a check around it.
plain = [path for path in sources if "@triton.jit" not in path.read_text()]
modules = [".".join(path.relative_to(root).with_suffix("").parts) for path in plain]
jaxtyping.install_import_hook(["jax_impl", *modules], "beartype.beartype")

os.environ["PYTHONPATH"] = os.pathsep.join(part for part in (str(root), os.environ.get("PYTHONPATH")) if part)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job ignores Ctrl-C, and so do its children
    signal.signal(signal.SIGINT, signal.default_int_handler)
