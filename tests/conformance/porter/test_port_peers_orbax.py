"""Orbax restores the porter's trees under MaxText's names, and the porter reads Orbax' trees of such models."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conformance.porter.inspection import inspect
from conformance.porter.port import Options, port
from conformance.porter.storage.stacks import Stacks

jax = pytest.importorskip("jax", reason="needs the package jax")
ocp = pytest.importorskip("orbax.checkpoint", reason="needs the package orbax-checkpoint")

N, C, LAYERS = 3, 4, 7  # no two of 3, 4, 7, 9, 12 are the same, so that a wrong axis has a wrong length
SHAPES = {
    "mhc_norm/scale": (N * C,), "pre_alpha": (N * C, N), "pre_alpha_scale": (1,), "pre_beta": (N,),
    "post_alpha": (N * C, N), "post_alpha_scale": (1,), "post_beta": (N,), "res_alpha": (N * C, N * N),
    "res_alpha_scale": (1,), "res_beta": (N, N),
}  # fmt: skip
HEAD = {"hc_fn": (N * C, N), "hc_base": (N,), "hc_scale": (1,)}
KINDS = {"attention": "mhc_attention", "ffn": "mhc_mlp"}
DECODER = "params/params/decoder"


def value(seed, shape, dtype=np.float32):
    """Of order 1, and never near 0: norm weights are folded on some ways."""
    drawn = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    return (drawn + np.sign(drawn) / 2).astype(dtype)


def sites(layers=LAYERS, dtype=np.float32):
    """For each (layer, kind) its leaves under MaxText's names."""
    return {
        (layer, kind): {
            name: value([layer, len(kind), k], shape, dtype) for k, (name, shape) in enumerate(SHAPES.items())
        }
        for layer in range(layers)
        for kind in KINDS
    }


def head(dtype=np.float32):
    return {f"{DECODER}/hc_head/{name}": value([99, k], shape, dtype) for k, (name, shape) in enumerate(HEAD.items())}


def stacked(by_site, places, axis=1):
    """Leaves as MaxText lays them: ``places`` gives for each layer its stack and its index there, None for alone."""
    leaves = {}
    for (layer, kind), site in by_site.items():
        where, _ = places[layer]
        for name in site:
            mates = [by_site[other, kind][name] for other, (place, _) in enumerate(places) if place == where]
            whole = np.stack(mates, axis) if places[layer][1] is not None else mates[0]
            leaves[f"{DECODER}/{where}/{KINDS[kind]}/{name}"] = whole
    return leaves


SCANNED = [("layers", k) for k in range(LAYERS)]
UNSCANNED = [(f"layers_{k}", None) for k in range(LAYERS)]
DEEPSEEK = UNSCANNED[:3] + [(f"scanned_blocks/layers_{k % 2}", k // 2) for k in range(LAYERS - 3)]
DENSE_AND_MOE = [("dense_layers", k) for k in range(3)] + [("moe_layers", k) for k in range(LAYERS - 3)]
FORMS = {
    "layers": SCANNED, "unscanned": UNSCANNED, "unscanned:3,scanned_blocks/2": DEEPSEEK,
    "dense_layers:3,moe_layers": DENSE_AND_MOE,
}  # fmt: skip


def nested(leaves, separator="/"):
    tree = {}
    for name, leaf in leaves.items():
        *parents, last = name.split(separator)
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def flattened(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix[:-1]: np.asarray(tree)}
    return {k: v for key, node in tree.items() for k, v in flattened(node, f"{prefix}{key}/").items()}


def company():
    """The rest of a model."""
    return {
        f"{DECODER}/layers/self_attention/query/kernel": value([1], (C, LAYERS, 5)),
        f"{DECODER}/layers/mlp/wi_0/kernel": value([2], (C, LAYERS, 8)),
        f"{DECODER}/decoder_norm/scale": value([3], (C,)), f"{DECODER}/logits_dense/kernel": value([4], (C, 16)),
        "params/params/token_embedder/embedding": value([5], (16, C)),
    }  # fmt: skip


def canonical(by_site, with_head=True):
    """The tensors of the canonical file, made here and not by the porter."""
    tensors = {}
    for (layer, kind), site in by_site.items():
        tensors |= {f"layers.{layer}.{kind}.{name.replace('/', '.')}": leaf for name, leaf in site.items()}
    if with_head:
        names = {"hc_fn": "head_fn", "hc_base": "head_base", "hc_scale": "head_scale"}
        tensors |= {f"head.{names[name.rpartition('/')[2]]}": leaf for name, leaf in head().items()}
    return tensors


def same(first, second):
    assert set(first) == set(second)
    for name, leaf in first.items():
        assert first[name].dtype == second[name].dtype and leaf.shape == second[name].shape, name
        assert leaf.tobytes() == np.ascontiguousarray(second[name]).tobytes(), name


def read_by_porter(path, tmp_path, by_site, with_head=True):
    """The porter's own reading of the tree, as canonical tensors, is ``found``."""
    inspection = inspect(path)
    every = sorted({layer for layer, _ in by_site})
    assert (inspection.layout, inspection.streams, inspection.dim) == ("maxtext", N, C)
    assert inspection.layers == {"layers.attention": every, "layers.ffn": every} and inspection.head == with_head
    known = ("mhc_norm.scale is centred at", "left aside as an optimiser's")  # random norm weights; a train state
    assert inspection.assumed and all(any(word in line for word in known) for line in inspection.odd), inspection.odd
    assert port(path, tmp_path / "read.safetensors", Options(to="canonical", assume=True)).verdict == "exact"
    same(load_file(tmp_path / "read.safetensors"), canonical(by_site, with_head))


@pytest.mark.parametrize("how", ("PyTree", "Standard"))
@pytest.mark.parametrize("stacks", FORMS)
@pytest.mark.parametrize("axis", (0, 1))
def test_orbax_restores_exactly_maxtexts_tree(stacks, axis, how, tmp_path):
    """By a plain call, without a target."""
    by_site = sites()
    save_file(canonical(by_site), tmp_path / "in.safetensors")
    options = Options(
        to="maxtext", to_dialect="maxtext", dialect="maxtext", stacks=Stacks.parse(stacks), scan_axis=axis
    )
    port(tmp_path / "in.safetensors", tmp_path / "tree", options)
    checkpointer = {"PyTree": ocp.PyTreeCheckpointer, "Standard": ocp.StandardCheckpointer}[how]()
    same(flattened(checkpointer.restore(tmp_path / "tree")), {**stacked(by_site, FORMS[stacks], axis), **head()})


def test_a_restore_onto_arrays_of_the_model_works(tmp_path):
    """As MaxText loads parameters: with abstract arrays of their shapes, sharded, in another dtype."""
    by_site = sites()
    save_file(canonical(by_site), tmp_path / "in.safetensors")
    port(tmp_path / "in.safetensors", tmp_path / "tree", Options(to="maxtext", dialect="maxtext"))
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaves = {**stacked(by_site, SCANNED), **head()}
    wanted = {k: jax.ShapeDtypeStruct(v.shape, jax.numpy.bfloat16, sharding=placed) for k, v in leaves.items()}
    restored = ocp.StandardCheckpointer().restore(tmp_path / "tree", nested(wanted))
    assert all(isinstance(v, jax.Array) for v in jax.tree.leaves(restored))
    same(flattened(restored), {k: np.asarray(jax.numpy.asarray(v, jax.numpy.bfloat16)) for k, v in leaves.items()})


@pytest.mark.parametrize("stacks", FORMS)
@pytest.mark.parametrize("axis", (0, 1))
def test_maxtexts_own_forms_are_read_with_the_right_numbers_and_written_back(stacks, axis, tmp_path):
    by_site = sites()
    leaves = {**stacked(by_site, FORMS[stacks], axis), **head()}
    ocp.PyTreeCheckpointer().save(tmp_path / "tree", nested({**leaves, **company()}))
    read_by_porter(tmp_path / "tree", tmp_path, by_site)
    told = inspect(tmp_path / "tree").stacked.replace(f":{LAYERS - 3}", "").replace(f":{LAYERS}", "")
    assert told == stacks
    options = Options(to="maxtext", dialect="maxtext", stacks=Stacks.parse(stacks), scan_axis=axis)
    port(tmp_path / "tree", tmp_path / "back", options)
    same(flattened(ocp.PyTreeCheckpointer().restore(tmp_path / "back")), leaves)


def test_layers_of_two_digits_are_in_numerical_order(tmp_path):
    by_site = sites(layers=13)
    places = [(f"layers_{k}", None) for k in range(3)]
    places += [(f"scanned_blocks/layers_{k % 2}", k // 2) for k in range(10)]
    for name, form in (("blocks", places), ("alone", [(f"layers_{k}", None) for k in range(13)])):
        ocp.PyTreeCheckpointer().save(tmp_path / name, nested({**stacked(by_site, form), **head()}))
        (tmp_path / f"{name} read").mkdir()
        read_by_porter(tmp_path / name, tmp_path / f"{name} read", by_site)


@pytest.mark.parametrize("arrays", ("numpy", "jax"))
@pytest.mark.parametrize("ocdbt", (True, False), ids=("ocdbt", "files"))
@pytest.mark.parametrize("zarr3", (True, False), ids=("zarr3", "zarr2"))
@pytest.mark.parametrize("compressed", (True, False), ids=("compressed", "plain"))
def test_every_storage_of_orbax_is_read(arrays, ocdbt, zarr3, compressed, tmp_path):
    by_site = sites()
    leaves = {**stacked(by_site, SCANNED), **head(), **company()}
    if arrays == "jax":
        leaves = {k: jax.numpy.asarray(v) for k, v in leaves.items()}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3, use_compression=compressed)
    ocp.Checkpointer(handler).save(tmp_path / "tree", ocp.args.PyTreeSave(nested(leaves)))
    read_by_porter(tmp_path / "tree", tmp_path, by_site)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float16"))
def test_narrow_leaves_keep_their_dtype_both_ways(dtype, tmp_path):
    leaves = {**stacked(sites(dtype=jax.numpy.dtype(dtype)), SCANNED), **head(jax.numpy.dtype(dtype))}
    (path,) = saved("StandardSave", tmp_path / "tree", nested(leaves))
    port(path, tmp_path / "c.safetensors", Options(to="canonical", dialect="maxtext"))
    port(tmp_path / "c.safetensors", tmp_path / "back", Options(to="maxtext"))
    same(flattened(ocp.PyTreeCheckpointer().restore(tmp_path / "back")), leaves)


def saved(how, path, tree):
    """Writes the tree in one of Orbax's ways; the directories under which a user may name it."""
    if how == "StandardSave":
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
        return [path]
    if how == "PyTreeSave":
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).save(path, ocp.args.PyTreeSave(tree))
        return [path]
    item, arguments = how.split(" ")
    save = {"PyTreeSave": ocp.args.PyTreeSave, "StandardSave": ocp.args.StandardSave}[arguments](tree)
    with contextlib.closing(ocp.CheckpointManager(path)) as manager:
        manager.save(0, args=save if item == "default" else ocp.args.Composite(**{item: save}))
        manager.wait_until_finished()
    return [path, path / "0", path / "0" / item]


@pytest.mark.parametrize("how", (
    "PyTreeSave", "StandardSave", "items PyTreeSave", "items StandardSave", "default PyTreeSave",
    "default StandardSave",
))  # fmt: skip
def test_every_way_of_saving_is_read_from_every_directory_above_it(how, tmp_path):
    by_site = sites()
    leaves = {k: jax.numpy.asarray(v) for k, v in {**stacked(by_site, SCANNED), **head(), **company()}.items()}
    wrong = []
    for index, path in enumerate(saved(how, tmp_path / "saved", nested(leaves))):
        (tmp_path / f"{index}").mkdir()
        try:
            read_by_porter(path, tmp_path / f"{index}", by_site)
        except Exception as error:
            wrong.append(f"{path.relative_to(tmp_path)}: {error}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("optimiser", ("chain", "bare"))
@pytest.mark.parametrize("stacks", FORMS)
def test_the_moments_of_a_train_state_are_not_the_weights(stacks, optimiser, tmp_path):
    """A training checkpoint holds the optimiser's moments under the same names, in ``opt_state``.

    Orbax keeps the state of an optax chain as a list, and a bare ``ScaleByAdamState``, as of MaxText's adam_pax, as a
    dict.
    """
    by_site = sites()
    leaves = {**stacked(by_site, FORMS[stacks]), **head()}
    moments = nested({k.removeprefix("params/"): np.full_like(v, 7) for k, v in leaves.items()})
    state = {"count": np.array(5, np.int32), "mu": moments, "nu": moments}
    tree = {**nested({**leaves, **company()}), "step": np.array(5, np.int32)}
    tree["opt_state"] = [state, {"count": np.array(5, np.int32)}] if optimiser == "chain" else state
    ocp.PyTreeCheckpointer().save(tmp_path / "tree", tree)
    read_by_porter(tmp_path / "tree", tmp_path, by_site)
