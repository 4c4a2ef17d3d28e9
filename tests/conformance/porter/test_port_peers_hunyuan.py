"""The porter reads Hunyuan V4's files from transformers, which loads the porter's, through canonical and GGUF files."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("triton") and not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # importing the model imports triton, which another test needs so

from conformance.porter.errors import PortError
from conformance.porter.inspection import inspect
from conformance.porter.port import Options, port
from tests.conformance.porter.porter_data import differences, read_sites

torch = pytest.importorskip("torch", reason="needs the package torch")
files = pytest.importorskip("safetensors.torch", reason="needs the package torch")
load_file, save_file = files.load_file, files.save_file
modelling = pytest.importorskip("transformers.models.hy_v4.modeling_hy_v4", reason="needs transformers with hy_v4")
transformers = pytest.importorskip("transformers")

STREAMS, DIM, LAYERS = 4, 16, 3
SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=DIM, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=LAYERS,
    num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    n_routed_experts=4, num_experts_per_tok=2, hc_mult=STREAMS, index_n_heads=2, index_head_dim=16, index_topk=4,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
CLASSES = ("HYV4ForCausalLM", "HYV4Model")


def build(name: str, directory: Path, seed: int = 0, **changes: Any) -> Any:
    """A random model, written by ``save_pretrained`` in several shards."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = getattr(modelling, name)(transformers.HYV4Config(**{**SIZES, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "_hc." in key or "hc_head." in key:
                value.copy_(torch.randn(value.shape, generator=generator) * (0.3 if key.endswith("fn") else 1.0))
    model.save_pretrained(directory, max_shard_size="8KB")
    return model


def load(name: str, directory: Path) -> Any:
    model, loading = getattr(modelling, name).from_pretrained(directory, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def ours(model: Any) -> dict[str, Any]:
    return {k: v for k, v in model.state_dict().items() if "_hc." in k or "hc_head." in k}


def result(model: Any) -> np.ndarray:
    with torch.no_grad():
        outputs = model(input_ids=torch.arange(3, 10)[None])
    return (outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state).numpy()


def assert_same(first: Any, other: Any) -> None:
    assert ours(first).keys() == ours(other).keys()
    assert all(torch.equal(value, ours(other)[key]) for key, value in ours(first).items())


@pytest.mark.parametrize("name", CLASSES)
def test_what_save_pretrained_writes_is_read(tmp_path, name):
    """It writes `hc_pre` in another place than the released files have it, and reads both."""
    model = build(name, tmp_path / "model")
    inspection = inspect(tmp_path / "model")
    assert (inspection.layout, inspection.dialect, inspection.residual) == ("hunyuan", "hunyuan-v4", "identity")
    assert "config.json" in inspection.told_by and inspection.head and inspection.sites == 2 * LAYERS + 1
    sites, lead = read_sites(tmp_path / "model"), "model." if name == CLASSES[0] else ""
    fn = ours(model)[f"{lead}layers.1.ffn_hc.fn"].numpy()
    assert np.array_equal(sites["layers.1.ffn"]["pre_alpha"], fn[:STREAMS].T)
    assert np.array_equal(sites["layers.1.ffn"]["post_alpha"], fn[STREAMS:].T)
    assert np.array_equal(sites["head"]["head_fn"], ours(model)[f"{lead}hc_head.hc_fn"].numpy().T)


def test_eps_and_magnitude_of_the_config_are_the_dialect_s(tmp_path):
    build(CLASSES[0], tmp_path / "model", hc_eps=3e-6, hc_magnitude=1.5, rms_norm_eps=2e-4)
    assert inspect(tmp_path / "model").dialect == (
        "hunyuan-v4,norm_eps=0.0002,pre_eps=3e-06,post_scale=1.5,post_eps=3e-06"
    )


@pytest.mark.parametrize("by", ["canonical", "gguf"])
def test_the_way_there_and_back_gives_the_model_s_own_bits(tmp_path, by):
    if by == "gguf":
        pytest.importorskip("gguf", reason="gguf, of the extra 'gguf', is not installed")
    model = build(CLASSES[0], tmp_path / "model")
    between = tmp_path / ("there.gguf" if by == "gguf" else "there.safetensors")
    there = port(tmp_path / "model", between, Options(to=by))
    back = port(between, tmp_path / "back.safetensors", Options(to="hunyuan"))
    assert (there.verdict, back.verdict, back.target_dialect) == ("exact", "exact", "hunyuan-v4")
    other = build(CLASSES[0], tmp_path / "other", seed=5)
    (shard,) = [p for p in (tmp_path / "other").glob("*.index.json")]
    content = json.loads(shard.read_text())["weight_map"]
    rest = {k: v for f in set(content.values()) for k, v in load_file(tmp_path / "other" / f).items() if "hc_" not in k}
    for path in (tmp_path / "other").glob("model*"):
        path.unlink()
    whole = {**rest, **load_file(tmp_path / "back.safetensors")}
    save_file(whole, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    assert_same(load(CLASSES[0], tmp_path / "other"), model)
    assert not torch.equal(ours(other)["model.hc_head.hc_fn"], ours(model)["model.hc_head.hc_fn"])


@pytest.mark.parametrize("name", CLASSES)
def test_a_port_into_a_model_keeps_the_names_that_are_there(tmp_path, name):
    model = build(name, tmp_path / "model")
    build(name, tmp_path / "other", seed=5)
    before = set(json.loads((tmp_path / "other" / "model.safetensors.index.json").read_text())["weight_map"])
    port(tmp_path / "model", tmp_path / "there.safetensors", Options(to="canonical"))
    port(tmp_path / "there.safetensors", None, Options(to="hunyuan", into=tmp_path / "other"))
    index = json.loads((tmp_path / "other" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == before
    assert_same(load(name, tmp_path / "other"), model)


def test_a_model_computes_what_it_did_once_its_tensors_have_been_to_gguf_and_back(tmp_path):
    pytest.importorskip("gguf", reason="gguf, of the extra 'gguf', is not installed")
    model = build(CLASSES[0], tmp_path / "model")
    port(tmp_path / "model", tmp_path / "there.gguf", Options(to="gguf"))
    with torch.no_grad():
        for value in ours(model).values():
            value.zero_()
    model.save_pretrained(tmp_path / "spoilt", max_shard_size="8KB")
    wrong = result(load(CLASSES[0], tmp_path / "spoilt"))
    port(tmp_path / "there.gguf", None, Options(to="hunyuan", into=tmp_path / "spoilt"))
    right = result(load(CLASSES[0], tmp_path / "model"))
    assert np.array_equal(result(load(CLASSES[0], tmp_path / "spoilt")), right) and not np.array_equal(wrong, right)


def test_hunyuan_has_no_place_in_a_layout_of_sinkhorn(tmp_path):
    build(CLASSES[0], tmp_path / "model")
    for layout in ("transformers", "deepseek", "mlx", "xing"):
        with pytest.raises(PortError, match="no place for residual=identity"):
            port(tmp_path / "model", tmp_path / "there.safetensors", Options(to=layout))
    assert differences(read_sites(tmp_path / "model"), read_sites(tmp_path / "model", "hunyuan")) == []
