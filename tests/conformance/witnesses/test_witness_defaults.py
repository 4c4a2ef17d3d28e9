"""Rows and the defaults of the packages that run them: a configuration's, or a function's own.

A parameter that a package has no default for is a constant of its code, and is compared where the package is run. Each
test needs its package (`tox run -e peers`).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
from typing import Any

import pytest

from conformance.cases.dialects import dialect_rows
from conformance.implementations.registry import missing_modules
from conformance.witnesses.fetch import WitnessError, folder
from conformance.witnesses.loading import load

ROWS = dialect_rows()
SINGLE_PASS = {
    "norm_eps": "rms_norm_eps", "iterations": "hc_sinkhorn_iters", "eps": "hc_eps", "pre_eps": "hc_eps",
}  # fmt: skip
HUNYUAN = {"norm_eps": "rms_norm_eps", "pre_eps": "hc_eps", "post_eps": "hc_eps", "post_scale": "hc_magnitude"}
LIGER = {
    "norm_eps": "rms_eps", "iterations": "tmax", "eps": "sinkhorn_eps", "pre_eps": "pre_eps", "post_scale": "post_mult",
}  # fmt: skip


def installed(name):
    """Skips where what a registered implementation imports isn't there."""
    missing = missing_modules(name)
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def needed(name, adapter) -> Any:
    """The adapter of a registered implementation; skips where that, or the package that it loads, isn't there."""
    installed(name)
    module = importlib.import_module(f"conformance.adapters.{adapter}")
    fetched(module.PACKAGE)
    return module


def fetched(package):
    try:
        return folder(package)
    except WitnessError as error:
        pytest.skip(str(error))


def same(dialect, defaults):
    assert {k: ROWS[dialect][k] for k in defaults} == defaults


def attributes(configuration, names):
    return {parameter: getattr(configuration, name) for parameter, name in names.items()}


def arguments(function, names):
    """Defaults of a function's arguments."""
    known = inspect.signature(function).parameters
    return {parameter: known[name].default for parameter, name in names.items()}


@pytest.mark.parametrize("name, dialect, module, configuration, names", [
    ("deepseek-v4", "deepseek-v4-transformers", "deepseek_v4", "DeepseekV4Config", SINGLE_PASS),
    ("deepseek-v4", "deepseek-v4", "deepseek_v4", "DeepseekV4Config", SINGLE_PASS),
    ("glm-5", "glm-5", "glm5_next", "Glm5NextTextConfig", SINGLE_PASS),
    ("hunyuan-v4", "hunyuan-v4", "hy_v4", "HYV4Config", HUNYUAN),
])  # fmt: skip
def test_transformers(name, dialect, module, configuration, names):
    installed(f"transformers-{name}")
    found = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    same(dialect, attributes(getattr(found, configuration)(), names))


def test_liger_kernel():
    if importlib.util.find_spec("triton") and not os.path.exists("/dev/nvidia0"):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    installed("liger-kernel")
    module = importlib.import_module("liger_kernel.transformers.mhc")
    same("liger", arguments(module.LigerMHC.__init__, LIGER))


def test_tile_kernels():
    adapter = needed("tile-kernels", "tile_kernels_adapter")
    same("deepseek-v4", arguments(load(adapter.PACKAGE, adapter.MODULE).sinkhorn_normalize_ref, {"eps": "eps"}))


@pytest.mark.parametrize(
    "dialect, model", [("deepseek-v4", "deepseek_v4/cpu"), ("deepseek-v4.1", "deepseek_v41/nvidia")]
)
def test_vllm(dialect, model):
    """Its models hand one number over that no configuration has."""
    source = (fetched("vllm-tpu==0.32.0") / "vllm" / "models" / model / "model.py").read_text()
    same(dialect, {"post_scale": float(re.findall(r"self\.hc_post_alpha = (\S+)", source)[0])})


# Its configuration sets a name that the installed transformers calls by another.
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
def test_nemo_automodel():
    adapter = needed("nemo-automodel", "nemo_automodel_adapter")
    configuration = load(adapter.PACKAGE, adapter.CONFIG, adapter.NEEDED).DeepseekV41TextConfig()
    same("deepseek-v4.1", attributes(configuration, SINGLE_PASS))


def test_mlx_lm():
    adapter = needed("mlx-lm", "mlx_lm_adapter")
    same("deepseek-v4.1", attributes(load(adapter.PACKAGE, adapter.MODULE, adapter.NEEDED).ModelArgs(), SINGLE_PASS))


def test_mlx_vlm():
    adapter = needed("mlx-vlm", "mlx_vlm_adapter")
    configuration = load(adapter.PACKAGE, adapter.CONFIG, adapter.NEEDED, adapter.ABSENT).ModelConfig()
    assert configuration.mhc_h_res_clamp_min == -configuration.mhc_h_res_clamp_max
    names = {k: v for k, v in SINGLE_PASS.items() if k != "pre_eps"} | {"logit_limit": "mhc_h_res_clamp_max"}
    same("xing-4", attributes(configuration, names))


def test_fla_core():
    adapter = needed("fla-core", "fla_adapter")
    same("paper", arguments(load(adapter.PACKAGE, adapter.MODULE).naive_sinkhorn, {"iterations": "num_iters"}))


@pytest.mark.parametrize("version, dialect", [("0.2.2", "maxtext-v1"), ("0.2.5", "maxtext"), ("0.2.5", "mhc-lite")])
def test_maxtext(version, dialect):
    text = (fetched(f"maxtext=={version}") / "maxtext" / "configs" / "base.yml").read_text()
    names = {"norm_eps": "normalization_layer_epsilon", "iterations": "sinkhorn_iterations"}
    if ROWS[dialect]["residual"] != "sinkhorn":
        del names["iterations"]
    same(dialect, {k: float(re.findall(rf"^{name}: (\S+)", text, re.M)[0]) for k, name in names.items()})
