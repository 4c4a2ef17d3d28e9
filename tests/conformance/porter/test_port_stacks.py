"""MaxText's stacks are read layer by layer: a lost layer leaves a number out, and an unclear order is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conformance.porter.errors import INCOMPLETE, PortError
from conformance.porter.port import Options, port
from conformance.porter.storage import orbax_tree
from conformance.porter.storage.checkpoint import Checkpoint, Tensor
from conformance.porter.storage.stacks import Stacks, Unstacked
from tests.conformance.porter.porter_data import random_sites, write_canonical

KINDS = ("mhc_attention", "mhc_mlp")
DECODER = "params/params/decoder"


def tree(places, kinds=KINDS, lead=DECODER):
    """A tree with a gating scalar and a bias of each site; ``places`` are stacks with their depths (0 for alone)."""
    shapes = {}
    for place, depth in places.items():
        for kind in kinds:
            shapes[f"{lead}/{place}/{kind}/pre_alpha_scale"] = (1, depth) if depth else (1,)
            shapes[f"{lead}/{place}/{kind}/pre_beta"] = (4, depth) if depth else (4,)
    return shapes


def unstacked(shapes):
    tensors = {name: Tensor(name, shape, "float32", 4, Path("tree")) for name, shape in shapes.items()}
    return Unstacked(Checkpoint(Path("tree"), "orbax", tensors))


def shown(shapes):
    """The numbers of the layers that are shown."""
    names = [name.removeprefix(f"{DECODER}/layers_").split("/") for name in unstacked(shapes).tensors]
    return sorted({int(words[0]) for words in names})


ALONE = {f"layers_{k}": 0 for k in range(3)}


@pytest.mark.parametrize(
    "places, expected",
    [
        ({"scanned_blocks/layers_0": 2, "scanned_blocks/layers_1": 2}, [0, 1, 2, 3]),
        ({"scanned_blocks/layers_1": 2}, [1, 3]),
        ({"scanned_blocks/layers_0": 2, "scanned_blocks/layers_3": 2}, [0, 3, 4, 7]),
        ({**ALONE, "scanned_blocks/layers_1": 2}, [0, 1, 2, 4, 6]),
        ({"layers_1": 0, "layers_2": 0}, [1, 2]),
        ({"dense_layers_1": 0, "moe_layers_1": 0}, [1, 3]),
        ({"dense_layers_0": 0, "moe_layers_1": 0, "moe_layers_2": 0}, [0, 2, 3]),
        ({"dense_layers": 2, "moe_layers": 3}, [0, 1, 2, 3, 4]),
        ({"dense_layers": 2, "layers_2": 0, "scanned_blocks/layers_0": 2}, [0, 1, 2, 3, 4]),
        ({"layers_12": 0, "layers_2": 0}, [2, 12]),
    ],
)
def test_layers_have_the_numbers_that_their_places_say(places, expected):
    assert shown(tree(places)) == expected


@pytest.mark.parametrize(
    "places, saying",
    [
        ({"layers": 4, "layers_0": 0}, "nothing says which come first"),
        ({"layers": 4, "moe_layers": 2}, "nothing says which come first"),
        ({"layers": 4, "scanned_blocks/layers_0": 2}, "nothing says which come first"),
        ({"dense_layers": 2, "dense_layers_0": 0}, "nothing says which come first"),
        ({"moe_layers": 2, "moe_layers_7": 0}, "nothing says which come first"),
        ({"scanned_blocks/layers_0": 3, "scanned_blocks/layers_1": 2}, "layers_0 has 3, scanned_blocks/layers_1 has 2"),
    ],
)
def test_stacks_that_nothing_orders_are_refused(places, saying):
    with pytest.raises(PortError, match=saying) as error:
        unstacked(tree(places))
    assert error.value.status == 2


@pytest.mark.parametrize("stack", ["layers", "dense_layers", "scanned_blocks/layers_0"])
def test_stacks_of_different_depth_for_attention_and_mlp_are_refused(stack):
    shapes = tree({stack: 3}, KINDS[:1]) | tree({stack: 2}, KINDS[1:])
    with pytest.raises(PortError, match=f"{stack}/mhc_mlp/pre_alpha_scale must have 3 layers along axis 1"):
        unstacked(shapes)


@pytest.mark.parametrize("depth", [10**9, 100_001])
def test_more_layers_than_any_model_has_are_refused_at_once(depth):
    with pytest.raises(PortError, match="1 to 100000 layers"):
        unstacked(tree({"layers": depth}))


def test_two_models_of_one_tree_stay_two():
    """Attention of an averaged copy beside the MLPs of the raw model."""
    shapes = tree({"layers": 2}, KINDS[:1], f"ema_model/{DECODER}") | tree({"layers": 3}, KINDS[1:])
    names = {name.partition("decoder/")[0] + name.split("/")[-3] for name in unstacked(shapes).tensors}
    averaged = {f"ema_model/params/params/layers_{k}" for k in range(2)}
    assert names == averaged | {f"params/params/layers_{k}" for k in range(3)}


def test_wrappers_may_stand_in_another_order_in_each_stack():
    """A word that follows the number of a layer stands at the start of a stack's names, which have no number."""
    alone = tree({"layers_0": 0}, lead=f"_orig_mod/{DECODER}")
    alone = {name.replace("layers_0/", "layers_0/_checkpoint_wrapped_module/"): shape for name, shape in alone.items()}
    stack = tree({"moe_layers": 2}, lead=f"_checkpoint_wrapped_module/_orig_mod/{DECODER}")
    layers = {name.partition("/layers_")[2].split("/")[0] for name in unstacked(alone | stack).tensors}
    assert layers == {"0", "1", "2"}


@pytest.mark.parametrize("number", ["9" * 5000, "٢"])
def test_numbers_of_no_layer_are_left_as_they_are(number):
    name = f"{DECODER}/layers_{number}/mhc_mlp/pre_beta"
    assert list(unstacked({name: (4,)}).tensors) == [name]


def test_a_tensor_of_a_stack_is_named_as_the_tree_has_it():
    checkpoint = unstacked(tree({"scanned_blocks/layers_1": 2, "layers_0": 0}))
    assert (
        checkpoint.held(f"{DECODER}/layers_4/mhc_mlp/res_beta") == f"{DECODER}/scanned_blocks/layers_1/mhc_mlp/res_beta"
    )
    assert checkpoint.held(f"{DECODER}/layers_0/mhc_mlp/res_beta") == f"{DECODER}/layers_0/mhc_mlp/res_beta"


@pytest.mark.parametrize(
    "text", ["unscanned:2,layers", "layers:2,moe_layers", "moe_layers:1,dense_layers", "scanned_blocks/2:2,unscanned"]
)
def test_stacks_that_would_be_read_in_another_order_are_not_written(text):
    with pytest.raises(PortError, match="in this order"):
        Stacks.parse(text)


@pytest.mark.parametrize(
    "lost, saying",
    [("scanned_blocks/layers_0", "layers 0, 2 are missing"), ("scanned_blocks/layers_1", "")],
)
def test_a_tree_that_lost_a_phase_is_not_whole(tmp_path, lost, saying):
    """The last phase alone can't be told from a model of half as many layers: a configuration would say it."""
    pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    sites = random_sites(3, 2, 3, layers=4, norm=True, head=True)
    path = write_canonical(tmp_path / "source.safetensors", sites, "maxtext,reduce=head")
    port(path, tmp_path / "tree", Options(to="maxtext", stacks=Stacks.parse("scanned_blocks/2")))
    checkpoint = orbax_tree.OrbaxCheckpoint(tmp_path / "tree")
    checkpoint.prepare(checkpoint.tensors)
    kept = {name: np.array(checkpoint.read(name)) for name in checkpoint.tensors if lost not in name}
    orbax_tree.save(tmp_path / "lost", kept, {}, tmp_path / "lost")
    options = Options(to="canonical", dialect="maxtext,reduce=head")
    if not saying:
        assert port(tmp_path / "lost", tmp_path / "out.safetensors", options).layers == 2
        return
    with pytest.raises(PortError, match=saying) as error:
        port(tmp_path / "lost", tmp_path / "out.safetensors", options)
    assert error.value.status == INCOMPLETE
