"""What the porter writes, against the layouts as docs/mathematics.md describes them, written out by hand here.

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
from tests.conformance.porter.porter_data import differences, random_sites, read_sites, write_canonical

SIZES = [(1, 3), (2, 3), (3, 2), (4, 5), (5, 1), (3, 1)]
SHORT = {"attention": "attn", "ffn": "ffn"}
LONG = {"attention": "self_attention", "ffn": "mlp"}
MAXTEXT = {"attention": "mhc_attention", "ffn": "mhc_mlp"}


def bodies(sites):
    for site, weights in sites.items():
        if site != "head":
            _, layer, kind = site.split(".")
            yield int(layer), kind, weights


def stacked_rows(weights):
    """fn ``[2n + n², n*C]``, base ``[2n + n²]``, scale ``[3]``: rows pre, post, then res in (i, j) order."""
    n = len(weights["pre_beta"])
    rows, base = [], []
    for part in ("pre", "post"):
        for i in range(n):
            rows.append(weights[f"{part}_alpha"][:, i])
            base.append(weights[f"{part}_beta"][i])
    for i in range(n):
        for j in range(n):
            rows.append(weights["res_alpha"][:, i * n + j])
            base.append(weights["res_beta"][i, j])
    scale = [weights[f"{part}_alpha_scale"][0] for part in ("pre", "post", "res")]
    return np.array(rows), np.array(base), np.array(scale)


def dim_first(value, streams, dim):
    """Entry i*C + c of the first axis, the stream i's feature c, at c*n + i."""
    moved = np.empty_like(value)
    for i in range(streams):
        for c in range(dim):
            moved[c * streams + i] = value[i * dim + c]
    return moved


def head_rows(sites, prefix):
    if "head" not in sites:
        return {}
    head = sites["head"]
    return {f"{prefix}fn": head["head_fn"].T, f"{prefix}base": head["head_base"], f"{prefix}scale": head["head_scale"]}


def deepseek(sites, streams, dim):
    tensors = head_rows(sites, "hc_head_")
    for layer, kind, weights in bodies(sites):
        for name, value in zip(("fn", "base", "scale"), stacked_rows(weights), strict=True):
            tensors[f"layers.{layer}.hc_{SHORT[kind]}_{name}"] = value
    return tensors


def transformers(sites, streams, dim):
    tensors = head_rows(sites, "model.hc_head.hc_")
    for layer, kind, weights in bodies(sites):
        for name, value in zip(("fn", "base", "scale"), stacked_rows(weights), strict=True):
            tensors[f"model.layers.{layer}.{SHORT[kind]}_hc.{name}"] = value
    return tensors


def mlx(sites, streams, dim):
    return {name.replace("hc_head.hc_", "hc_head."): v for name, v in transformers(sites, streams, dim).items()}


def xing(sites, streams, dim):
    return {name.replace("_hc.", "_hc.hc_"): v for name, v in transformers(sites, streams, dim).items()}


def hunyuan_rows(weights):
    """fn ``[2n, n*C]``, base ``[2n]``, scale ``[2]``: rows pre, then post."""
    n = len(weights["pre_beta"])
    rows = [weights[f"{part}_alpha"][:, i] for part in ("pre", "post") for i in range(n)]
    base = [weights[f"{part}_beta"][i] for part in ("pre", "post") for i in range(n)]
    return np.array(rows), np.array(base), np.array([weights[f"{part}_alpha_scale"][0] for part in ("pre", "post")])


HUNYUAN = {
    "released": ("model.layers.{}.hc_{}_layer.hc_pre.hc_", ("attn", "mlp"), "model.hc_head.hc_head_"),
    "modules": ("model.layers.{}.{}_hc.", ("attn", "ffn"), "model.hc_head.hc_"),
    "saved": ("model.layers.{}.hc_pre.hc_{}_layer.hc_", ("attn", "mlp"), "model.hc_pre.hc_head.hc_head_"),
    "saved base model": ("layers.{}.hc_pre.hc_{}_layer.hc_", ("attn", "mlp"), "hc_head.hc_pre.hc_head_"),
    "base model": ("layers.{}.{}_hc.", ("attn", "ffn"), "hc_head.hc_"),
}


def hunyuan(sites, names="released"):
    """Under the released names; those of transformers' modules; those that its ``save_pretrained`` writes."""
    prefix, (attention, ffn), head = HUNYUAN[names]
    tensors = head_rows(sites, head)
    for layer, kind, weights in bodies(sites):
        place = prefix.format(layer, {"attention": attention, "ffn": ffn}[kind])
        tensors |= {f"{place}{n}": v for n, v in zip(("fn", "base", "scale"), hunyuan_rows(weights), strict=True)}
    return tensors


def gguf(sites):
    """In NumPy's order of axes: GGUF's own is the reverse."""
    tensors = {f"{name}.weight": value for name, value in head_rows(sites, "output_hc_").items()}
    for layer, kind, weights in bodies(sites):
        rows = stacked_rows(weights) if "res_alpha" in weights else hunyuan_rows(weights)
        for name, value in zip(("fn", "base", "scale"), rows, strict=True):
            tensors[f"blk.{layer}.hc_{SHORT[kind]}_{name}.weight"] = value
    return tensors


def liger(sites, streams, dim):
    tensors = {}
    for layer, kind, weights in bodies(sites):
        fn, base, scale = stacked_rows(weights)
        prefix = f"layers.{layer}.{kind}."
        tensors |= {f"{prefix}phi": fn.T, f"{prefix}b": base}
        tensors |= {f"{prefix}alpha_{part}": np.array(s) for part, s in zip(("pre", "post", "res"), scale, strict=True)}
    return tensors


def megatron(sites, streams, dim):
    tensors = head_rows(sites, "decoder.hc_head_")
    for layer, kind, weights in bodies(sites):
        fn, base, scale = stacked_rows(weights)
        prefix = f"decoder.layers.{layer}.{LONG[kind]}_hyper_connection."
        tensors |= {f"{prefix}mapping_proj.weight": fn, f"{prefix}bias": base}
        tensors |= {
            f"{prefix}alpha_{part}": np.array([s]) for part, s in zip(("pre", "post", "res"), scale, strict=True)
        }
    return tensors


def transformer_engine(sites, streams, dim):
    tensors = {}
    for layer, kind, weights in bodies(sites):
        fn, base, scale = stacked_rows(weights)
        prefix = f"layers.{layer}.{kind}."
        tensors |= {
            f"{prefix}phi": dim_first(fn.T, streams, dim).T, f"{prefix}alpha": scale, f"{prefix}beta": base[None],
        }  # fmt: skip
        if "mhc_norm.scale" in weights:
            tensors[f"{prefix}norm_weight"] = dim_first(weights["mhc_norm.scale"], streams, dim)
    return tensors


def canonical(sites, streams, dim):
    return {f"{site}.{name}": value for site, weights in sites.items() for name, value in weights.items()}


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


def restore(path):
    """The leaves of an Orbax checkpoint under their keys, joined by slashes."""
    orbax = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    leaves = {}

    def walk(node, name):
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, f"{name}{key}/")
            else:
                leaves[f"{name}{key}"] = np.asarray(value)

    walk(orbax.PyTreeCheckpointer().restore(path.resolve()), "")
    return leaves


def maxtext(sites, places, axis):
    """The tree; ``places`` says for each layer its folder and its index there, None where it stands alone."""
    folders = {}
    for layer, kind, weights in bodies(sites):
        folder, index = places[layer]
        for name, value in weights.items():
            path = f"params/params/decoder/{folder}/{MAXTEXT[kind]}/{name.replace('.', '/')}"
            folders.setdefault(path, {})[index] = value
    tensors = {}
    for path, layers in folders.items():
        if None in layers:
            tensors[path] = layers[None]
            continue
        some = layers[0]
        shape = (some.shape[0], len(layers), *some.shape[1:]) if axis else (len(layers), *some.shape)
        tensors[path] = np.empty(shape, some.dtype)
        for index, value in layers.items():
            if axis:
                tensors[path][:, index] = value
            else:
                tensors[path][index] = value
    if "head" in sites:
        head = {"hc_fn": "head_fn", "hc_base": "head_base", "hc_scale": "head_scale"}
        tensors |= {f"params/params/decoder/hc_head/{k}": sites["head"][v] for k, v in head.items()}
    return tensors


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
