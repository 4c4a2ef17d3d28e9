"""The porter's tensors are those of the layouts, written out by hand in `layout_rows`.

The files are read by the libraries that they belong to, and not by the porter.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from conformance.porter.errors import Ambiguous, PortError
from conformance.porter.inspection import inspect
from conformance.porter.port import Options, port
from conformance.porter.storage.stacks import Stacks
from tests.conformance.porter.layout_rows import (
    HUNYUAN,
    canonical,
    deepseek,
    gguf,
    hunyuan,
    liger,
    maxtext,
    megatron,
    mlx,
    restore,
    transformer_engine,
    transformers,
    xing,
)
from tests.conformance.porter.porter_data import differences, random_sites, read_sites, write_canonical

SIZES = [(1, 3), (2, 3), (3, 2), (4, 5), (5, 1), (3, 1)]


EXPECTED = {
    "canonical": (canonical, True, True),
    "deepseek": (deepseek, False, True),
    "transformers": (transformers, False, True),
    "mlx": (mlx, False, True),
    "xing": (xing, False, False),
    "liger": (liger, False, False),
    "megatron": (megatron, False, True),
    "transformer-engine": (transformer_engine, True, False),
}


@pytest.mark.parametrize("streams, dim", SIZES)
@pytest.mark.parametrize("layout", EXPECTED)
def test_the_tensors_are_those_of_the_layout(tmp_path, layout, streams, dim):
    pack, norm, head = EXPECTED[layout]
    dialect = f"deepseek-v4,norm_weight={'true' if norm else 'false'},reduce={'head' if head else 'none'}"
    sites = random_sites(11, streams, dim, norm=norm, head=head)
    source = write_canonical(tmp_path / "source.safetensors", sites, dialect)
    options = Options(to=layout, dialect=dialect, to_dialect=dialect)
    port(source, tmp_path / "there.safetensors", options)
    expected = pack(sites, streams, dim)
    assert differences(load_file(tmp_path / "there.safetensors"), expected) == []
    port(source, tmp_path / "there", options)
    shards = [load_file(shard) for shard in (tmp_path / "there").glob("*.safetensors")]
    assert differences({k: v for shard in shards for k, v in shard.items()}, expected) == []


@pytest.mark.parametrize("streams, dim", SIZES)
@pytest.mark.parametrize("layout", EXPECTED)
def test_the_tensors_of_a_layout_are_read_as_what_they_are(tmp_path, layout, streams, dim):
    pack, norm, head = EXPECTED[layout]
    sites = random_sites(12, streams, dim, norm=norm, head=head)
    tensors = {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in pack(sites, streams, dim).items()}
    save_file(tensors, tmp_path / "theirs.safetensors")
    square = layout == "megatron" and dim == streams + 2  # a projection [m, n*C] that PaddleFleet's transpose could be
    if square:
        with pytest.raises(Ambiguous, match="megatron and paddlefleet"):
            read_sites(tmp_path / "theirs.safetensors")
    read = read_sites(tmp_path / "theirs.safetensors", layout if square else None)
    assert differences(read, sites) == []


@pytest.mark.parametrize("layout", EXPECTED)
def test_a_state_dict_has_the_same_tensors(tmp_path, layout):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pack, norm, head = EXPECTED[layout]
    dialect = f"deepseek-v4,norm_weight={'true' if norm else 'false'},reduce={'head' if head else 'none'}"
    sites = random_sites(13, 4, 3, norm=norm, head=head)
    source = write_canonical(tmp_path / "source.safetensors", sites, dialect)
    port(source, tmp_path / "there.pt", Options(to=layout, dialect=dialect, to_dialect=dialect))
    state = torch.load(tmp_path / "there.pt", weights_only=True)
    assert differences({name: value.numpy() for name, value in state.items()}, pack(sites, 4, 3)) == []


@pytest.mark.parametrize("layout, out_in", [("liger", liger), ("megatron", megatron)])
@pytest.mark.parametrize("streams, dim", SIZES)
def test_for_the_other_mix_the_residual_block_is_transposed(tmp_path, layout, out_in, streams, dim):
    sites = random_sites(14, streams, dim)
    source = write_canonical(tmp_path / "source.safetensors", sites, "paper,mix=in-out,softmax=rows,order=rows-first")
    report = port(source, tmp_path / "there.safetensors", Options(to=layout, to_dialect="paper"))
    assert (report.verdict, report.rounding) == ("exact", 0)
    turned = {}
    for site, weights in sites.items():
        alpha = np.empty_like(weights["res_alpha"])
        beta = np.empty_like(weights["res_beta"])
        for i in range(streams):
            for j in range(streams):
                alpha[:, j * streams + i] = weights["res_alpha"][:, i * streams + j]
                beta[j, i] = weights["res_beta"][i, j]
        turned[site] = {**weights, "res_alpha": alpha, "res_beta": beta}
    assert differences(load_file(tmp_path / "there.safetensors"), out_in(turned, streams, dim)) == []


def test_glm_has_the_names_of_mlx_vlm_s_language_model(tmp_path):
    """mlx-vlm's GLM-5 renames ``model.language_model.``, and nothing that starts with ``model.layers.``."""
    sites = random_sites(24, 4, 3)
    source = write_canonical(tmp_path / "source.safetensors", sites, "glm-5")
    assert port(source, tmp_path / "there.safetensors", Options(to="mlx")).target_dialect == "glm-5"
    expected = {f"language_model.{name}": value for name, value in mlx(sites, 4, 3).items()}
    assert differences(load_file(tmp_path / "there.safetensors"), expected) == []


@pytest.mark.parametrize("streams, dim", SIZES)
@pytest.mark.parametrize("head", [False, True])
def test_hunyuan_is_written_under_the_released_names(tmp_path, streams, dim, head):
    sites = random_sites(20, streams, dim, residual="identity", head=head)
    dialect = "hunyuan-v4" if head else "hunyuan-v4,reduce=none"
    source = write_canonical(tmp_path / "source.safetensors", sites, dialect)
    report = port(source, tmp_path / "there.safetensors", Options(to="hunyuan"))
    assert (report.verdict, report.target_dialect) == ("exact", dialect)
    assert differences(load_file(tmp_path / "there.safetensors"), hunyuan(sites)) == []


@pytest.mark.parametrize("streams, dim", SIZES)
@pytest.mark.parametrize("names", HUNYUAN)
def test_hunyuan_is_read_under_each_of_its_names(tmp_path, names, streams, dim):
    """fn ``[8, n*C]`` with a scale of two entries is four streams of Hunyuan, and not two of DeepSeek."""
    sites = random_sites(21, streams, dim, residual="identity", head=True)
    tensors = {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in hunyuan(sites, names).items()}
    save_file(tensors, tmp_path / "theirs.safetensors")
    inspection = inspect(tmp_path / "theirs.safetensors")
    assert (inspection.layout, inspection.streams, inspection.dim, inspection.residual) == (
        "hunyuan",
        streams,
        dim,
        "identity",
    )
    assert differences(read_sites(tmp_path / "theirs.safetensors"), sites) == []


def test_two_streams_of_deepseek_are_not_four_of_hunyuan(tmp_path):
    sites = random_sites(22, 2, 6, head=True)
    tensors = {k: np.ascontiguousarray(v).reshape(v.shape) for k, v in transformers(sites, 2, 6).items()}
    save_file(tensors, tmp_path / "theirs.safetensors")
    inspection = inspect(tmp_path / "theirs.safetensors")
    assert (inspection.layout, inspection.streams, inspection.dim, inspection.residual) == (
        "transformers",
        2,
        6,
        "sinkhorn",
    )
    tensors["model.layers.0.attn_hc.scale"] = np.ones(2, np.float32)
    save_file(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(PortError):
        inspect(tmp_path / "mixed.safetensors")


@pytest.mark.parametrize("streams, dim", SIZES)
@pytest.mark.parametrize("residual, dialect", [("sinkhorn", "deepseek-v4"), ("identity", "hunyuan-v4")])
def test_the_tensors_of_a_gguf_file_are_in_float32_with_their_axes_reversed(tmp_path, residual, dialect, streams, dim):
    package = pytest.importorskip("gguf", reason="gguf, of the extra 'gguf', is not installed")
    sites = random_sites(23, streams, dim, residual=residual, head=True)
    source = write_canonical(tmp_path / "source.safetensors", sites, dialect)
    port(source, tmp_path / "there.gguf", Options(to="gguf"))
    read = package.GGUFReader(tmp_path / "there.gguf").tensors
    assert differences({tensor.name: np.array(tensor.data) for tensor in read}, gguf(sites)) == []
    assert all(tensor.tensor_type == package.GGMLQuantizationType.F32 for tensor in read)
    rows = 2 * streams + (streams**2 if residual == "sinkhorn" else 0)
    first = next(tensor for tensor in read if tensor.name == "blk.0.hc_attn_fn.weight")
    assert first.shape.tolist() == [streams * dim, rows]


@pytest.mark.parametrize("layout", ["deepseek", "transformers"])
def test_a_layout_of_sinkhorn_has_no_place_without_a_residual_projection(tmp_path, layout):
    sites = random_sites(15, 4, 3, layers=1, residual="identity", head=True)
    source = write_canonical(tmp_path / "source.safetensors", sites, "hunyuan-v4")
    for dialect in (None, "hunyuan-v4"):
        with pytest.raises(PortError, match="no place for residual=identity") as caught:
            port(source, tmp_path / "there.safetensors", Options(to=layout, to_dialect=dialect))
        assert caught.value.status == 5


STACKS = {
    "layers": [("layers", k) for k in range(5)],
    "unscanned": [(f"layers_{k}", None) for k in range(5)],
    "dense_layers:2,moe_layers": [
        ("dense_layers", 0), ("dense_layers", 1), ("moe_layers", 0), ("moe_layers", 1), ("moe_layers", 2),
    ],
    "unscanned:1,scanned_blocks/2": [
        ("layers_0", None), ("scanned_blocks/layers_0", 0), ("scanned_blocks/layers_1", 0),
        ("scanned_blocks/layers_0", 1), ("scanned_blocks/layers_1", 1),
    ],
}  # fmt: skip


@pytest.mark.parametrize("streams, dim", [(1, 1), (2, 3), (4, 5), (5, 1)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("stacks", STACKS)
def test_maxtext_s_layers_are_stacked_along_the_axis(tmp_path, stacks, axis, streams, dim):
    pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    sites = random_sites(16, streams, dim, layers=5, norm=True, head=True)
    source = write_canonical(tmp_path / "source.safetensors", sites, "maxtext,reduce=head")
    port(source, tmp_path / "there", Options(to="maxtext", stacks=Stacks.parse(stacks), scan_axis=axis))
    leaves = restore(tmp_path / "there")
    assert differences(leaves, maxtext(sites, STACKS[stacks], axis)) == []
    if stacks == "layers" and axis == 1:  # the shapes that docs/mathematics.md and MaxText's converters name
        flat, prefix = streams * dim, "params/params/decoder/layers/mhc_mlp/"
        assert leaves[f"{prefix}mhc_norm/scale"].shape == (flat, 5)
        assert leaves[f"{prefix}pre_alpha"].shape == (flat, 5, streams)
        assert leaves[f"{prefix}res_alpha"].shape == (flat, 5, streams**2)
        assert leaves[f"{prefix}post_alpha_scale"].shape == (1, 5)
        assert leaves[f"{prefix}post_beta"].shape == (streams, 5)
        assert leaves[f"{prefix}res_beta"].shape == (streams, 5, streams)


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_permutations_keep_their_columns_in_maxtext(tmp_path, streams):
    pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    sites = random_sites(17, streams, 2, layers=3, residual="permutations", norm=True)
    source = write_canonical(tmp_path / "source.safetensors", sites, "mhc-lite")
    port(source, tmp_path / "there", Options(to="maxtext"))
    assert differences(restore(tmp_path / "there"), maxtext(sites, STACKS["layers"], 1)) == []


def test_a_missing_norm_weight_is_written_as_ones(tmp_path):
    sites = random_sites(18, 3, 4)
    source = write_canonical(tmp_path / "source.safetensors", sites, "transformer-engine")
    dialect = "transformer-engine,norm_weight=true"
    report = port(source, tmp_path / "there.safetensors", Options(to="transformer-engine", to_dialect=dialect))
    assert report.verdict == "exact"
    expected = transformer_engine(sites, 3, 4)
    for site in sites:
        expected[f"{site}.norm_weight"] = np.ones(12, np.float32)
    assert differences(load_file(tmp_path / "there.safetensors"), expected) == []


def test_a_canonical_file_says_its_dialect_and_sizes(tmp_path):
    sites = random_sites(19, 3, 4, norm=True)
    source = write_canonical(tmp_path / "source.safetensors", sites, "maxtext")
    port(source, tmp_path / "there.safetensors", Options(to="canonical"))
    with safe_open(tmp_path / "there.safetensors", "numpy") as written, safe_open(source, "numpy") as original:
        actual, expected = written.metadata(), original.metadata()
    assert actual["format"] == expected["format"]
    assert json.loads(actual["parameters"]) == json.loads(expected["parameters"])
