"""mlx-lm and mlx-vlm load the files that the porter writes for them, and the porter reads their files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from conformance.porter.inspection import inspect
from conformance.porter.port import Options, port
from conformance.witnesses.fetch import WitnessError
from conformance.witnesses.loading import load
from tests.conformance.porter.porter_data import differences, random_sites, read_sites, write_canonical

mx = pytest.importorskip("mlx.core", reason="needs the package mlx")
mlx_utils = pytest.importorskip("mlx.utils", reason="needs the package mlx")

STREAMS, DIM, LAYERS = 4, 8, 2
LM, VLM = "mlx-lm==0.32.2", "mlx-vlm==0.7.10"
V41: dict[str, Any] = dict(
    vocab_size=16, hidden_size=DIM, num_hidden_layers=LAYERS, num_attention_heads=2, head_dim=8, q_lora_rank=8,
    qk_rope_head_dim=4, o_groups=1, o_lora_rank=4, moe_intermediate_size=8, n_routed_experts=2, num_experts_per_tok=1,
    compress_ratios=(0, 0), hc_mult=STREAMS,
)  # fmt: skip
V4: dict[str, Any] = dict(
    vocab_size=16, hidden_size=DIM, moe_intermediate_size=8, num_hidden_layers=LAYERS, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, q_lora_rank=8, o_lora_rank=4, o_groups=1, qk_rope_head_dim=4,
    n_routed_experts=2, num_experts_per_tok=1, index_n_heads=2, index_head_dim=8, index_topk=4, sliding_window=8,
    compress_ratios=[0] * (LAYERS + 1), hc_mult=STREAMS,
)  # fmt: skip
XING: dict[str, Any] = dict(
    vocab_size=16, hidden_size=DIM, intermediate_size=8, moe_intermediate_size=8, num_hidden_layers=LAYERS,
    num_attention_heads=2, num_key_value_heads=2, n_routed_experts=2, n_shared_experts=1, num_experts_per_tok=1,
    q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4, n_group=1, topk_group=1,
    first_k_dense_replace=LAYERS, rope_scaling=None, hc_mult=STREAMS,
)  # fmt: skip


def witness(package: str, family: str, needed: tuple[str, ...]) -> Any:
    lead = f"{package.partition('==')[0].replace('-', '_')}.models."
    try:
        return load(package, lead + family, tuple(lead + name for name in needed), ("PIL",))
    except WitnessError as error:
        pytest.skip(str(error))


def v41() -> Any:
    module = witness(LM, "deepseek_v41", ("base", "pipeline", "activations", "rope_utils", "switch_layers"))
    return module.Model(module.ModelArgs(**V41))


def xing() -> Any:
    needed = ("base", "cache", "pipeline", "mlp", "rope_utils", "switch_layers", "activations", "mla", "linear",
              "xing4_0.config", "deepseek_v3.config", "deepseek_v3.language")  # fmt: skip
    language = witness(VLM, "xing4_0.language", needed)
    config = witness(VLM, "xing4_0.config", needed)
    return language.LanguageModel(config.ModelConfig(**XING))


def v4() -> Any:
    own = tuple(f"deepseek_v4.{name}" for name in ("config", "hisa_kernel", "hyper_connection", "language"))
    needed = ("activations", "base", "cache", "fast_ops", "linear", "mla", "pipeline", "switch_layers", *own)
    language = witness(VLM, "deepseek_v4.language", needed)
    config = witness(VLM, "deepseek_v4.config", needed)
    return language.LanguageModel(config.ModelConfig(**V4))


def held(model: Any) -> dict[str, np.ndarray]:
    """The hyper-connections of a model, under its own names."""
    parameters = mlx_utils.tree_flatten(model.parameters())
    return {name: np.array(value) for name, value in parameters if "_hc." in name or "hc_head." in name}


def loaded(model: Any, path: Path) -> dict[str, np.ndarray]:
    """The same once the model has renamed and taken a file's tensors; nothing in the file may be left over."""
    tensors = model.sanitize(dict(mx.load(str(path)).items()))
    names = {name for name, _ in mlx_utils.tree_flatten(model.parameters())}
    assert set(tensors) <= names, set(tensors) - names
    model.load_weights(list(tensors.items()), strict=False)
    return held(model)


def saved(model: Any, directory: Path, model_type: str) -> Path:
    """Every parameter of a model in a file, as mlx-lm's ``save`` writes it, and a ``config.json``."""
    directory.mkdir()
    tensors = dict(mlx_utils.tree_flatten(model.parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), tensors, metadata={"format": "mlx"})
    config = {"model_type": model_type, "hc_mult": STREAMS, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
              "rms_norm_eps": 1e-20 if model_type == "deepseek_v41" else 1e-6}  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


CASES = {
    "mlx-lm's V4.1": (v41, "mlx", "deepseek-v4.1", "deepseek_v41", False),
    "mlx-vlm's V4": (v4, "mlx", "deepseek-v4", "deepseek_v4", True),
    "mlx-vlm's Xing-4": (xing, "xing", "xing-4", "xing4_0", False),
}


@pytest.mark.parametrize("make, layout, dialect, model_type, head", CASES.values(), ids=CASES)
def test_the_model_loads_the_port_and_its_arrays_are_ours_bit_for_bit(
    tmp_path, make, layout, dialect, model_type, head
):
    model = make()
    sites = random_sites(1, STREAMS, DIM, layers=LAYERS, head=head)
    source = write_canonical(tmp_path / "source.safetensors", sites, dialect)
    report = port(source, tmp_path / "port.safetensors", Options(to=layout))
    assert (report.verdict, report.target_dialect) == ("exact", dialect)
    arrays = loaded(model, tmp_path / "port.safetensors")
    assert differences(arrays, load_file(tmp_path / "port.safetensors")) == []
    fn = {"mlx": "model.layers.1.ffn_hc.fn", "xing": "model.layers.1.ffn_hc.hc_fn"}[layout]
    assert len(arrays) == 6 * LAYERS + 3 * head
    assert np.array_equal(arrays[fn][0], sites["layers.1.ffn"]["pre_alpha"][:, 0])


@pytest.mark.parametrize("make, layout, dialect, model_type, head", CASES.values(), ids=CASES)
def test_what_the_model_writes_is_read_and_comes_back_bit_for_bit(tmp_path, make, layout, dialect, model_type, head):
    model = make()
    sites = random_sites(2, STREAMS, DIM, layers=LAYERS, head=head)
    source = write_canonical(tmp_path / "source.safetensors", sites, dialect)
    port(source, tmp_path / "port.safetensors", Options(to=layout))
    before = loaded(model, tmp_path / "port.safetensors")
    directory = saved(model, tmp_path / "model", model_type)
    inspection = inspect(directory)
    assert (inspection.sites, inspection.tensors, inspection.head) == (2 * LAYERS + head, 6 * LAYERS + 3 * head, head)
    assert inspection.dialect in (dialect, f"{dialect}-transformers") and "config.json" in inspection.told_by
    assert differences(read_sites(directory), sites) == []
    port(directory, tmp_path / "canonical.safetensors", Options(to="canonical"))
    again = port(tmp_path / "canonical.safetensors", tmp_path / "back.safetensors", Options(to=layout))
    assert again.verdict == "exact"
    assert differences(loaded(make(), tmp_path / "back.safetensors"), before) == []


def test_mlx_lm_renames_the_released_names_to_those_of_its_layout(tmp_path):
    sites = random_sites(3, STREAMS, DIM, layers=LAYERS)
    source = write_canonical(tmp_path / "source.safetensors", sites, "deepseek-v4.1")
    for layout in ("deepseek", "mlx"):
        report = port(source, tmp_path / f"{layout}.safetensors", Options(to=layout))
        assert (report.verdict, report.target_dialect) == ("exact", "deepseek-v4.1")
    renamed = loaded(v41(), tmp_path / "deepseek.safetensors")
    assert differences(renamed, load_file(tmp_path / "mlx.safetensors")) == []


def test_what_another_use_of_the_package_stood_in_for_is_loaded_anew(monkeypatch):
    """The suite's adapters need less of a package than its models do, in whatever order they come."""
    for name in [name for name in sys.modules if name.split(".")[0] == "mlx_lm"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        load(LM, "mlx_lm.models.deepseek_v41", ("mlx_lm.models.base", "mlx_lm.models.pipeline"), ("PIL",))
    except WitnessError as error:
        pytest.skip(str(error))
    assert len(held(v41())) == 6 * LAYERS
