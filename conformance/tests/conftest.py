"""Eight virtual devices for JAX, where it is installed."""

import importlib.util

if importlib.util.find_spec("jax"):
    import jax

    jax.config.update("jax_num_cpu_devices", 8)
