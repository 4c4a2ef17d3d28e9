"""Megatron's hybrid stacks have the two sites of a layer in two sub-layers, and a lost one is reported."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from conformance.porter.errors import INCOMPLETE, PortError
from conformance.porter.port import Options, port
from conformance.porter.storage.opening import open_checkpoint
from conformance.porter.understanding import understand
from tests.conformance.porter.porter_data import differences, random_sites, read_sites, write_canonical

STREAMS, DIM = 4, 8
ROWS = ("mapping_proj.weight", "bias", "alpha_pre", "alpha_post", "alpha_res")
LAST = ("self_attention", "mlp")


def source(folder, layers=3):
    """Sites, and Megatron's own file of them."""
    sites = random_sites(7, STREAMS, DIM, layers=layers)
    path = write_canonical(folder / "canonical.safetensors", sites, "megatron")
    port(path, folder / "paired.safetensors", Options(to="megatron"))
    from safetensors.numpy import load_file

    return sites, load_file(folder / "paired.safetensors")


def hybrid(paired, modules=LAST, lead="decoder."):
    """The same in a hybrid stack: sub-layers 2i and 2i + 1 are the sites of layer i."""
    tensors = {}
    for name, value in paired.items():
        _, _, layer, site, row = name.split(".", 4)
        number = 2 * int(layer) + (site == "mlp_hyper_connection")
        tensors[f"{lead}layers.{number}.hyper_connection.{row}"] = value
        inner = f"{lead}layers.{number}.inner_layer."
        tensors[f"{inner}{modules[number % 2]}.weight"] = np.ones((2, 2), np.float32)
        tensors[f"{inner}norm.weight"] = np.ones(2, np.float32)
    return tensors


def without(tensors, *numbers, inner=False):
    """The tensors that are left if sub-layers lose their hyper-connections, or (``inner``) everything."""
    lost = tuple(f"decoder.layers.{k}." + ("" if inner else "hyper_connection.") for k in numbers)
    return {name: value for name, value in tensors.items() if not name.startswith(lost)}


def ported(folder, tensors, **options):
    save_file(tensors, folder / "hybrid.safetensors")
    out = folder / "out.safetensors"
    return port(folder / "hybrid.safetensors", out, Options(to="canonical", dialect="megatron", **options)), out


@pytest.mark.parametrize("modules", [LAST, ("mixer", "mlp"), ("self_attention.core", "mlp.experts.local_experts.0")])
def test_attention_a_mixer_an_mlp_and_experts_are_paired(tmp_path, modules):
    sites, paired = source(tmp_path)
    report, out = ported(tmp_path, hybrid(paired, modules))
    assert report.verdict == "exact" and differences(read_sites(out), sites) == []


@pytest.mark.parametrize("inner", [False, True], ids=["their hyper-connections", "everything"])
@pytest.mark.parametrize(
    "numbers, saying",
    [((2, 3), "layers 1 are missing"), ((1, 2), "have no"), ((0,), "layers 0 have no attention"),
     ((3,), "layers 1 have no ffn"), ((0, 1), "layers 0 are missing")],
)  # fmt: skip
def test_sub_layers_that_lost_something_are_missing(tmp_path, numbers, saying, inner):
    tensors = without(hybrid(source(tmp_path)[1]), *numbers, inner=inner)
    with pytest.raises(PortError, match=saying) as error:
        ported(tmp_path, tensors)
    assert error.value.status == INCOMPLETE and not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("numbers, saying", [((4, 5), "2 sub-layers"), ((0, 2, 4), "3 sub-layers"), ((5,), "layers 2")])
def test_a_sub_layer_without_a_hyper_connection_shows_also_where_no_number_is_left_out(tmp_path, numbers, saying):
    tensors = without(hybrid(source(tmp_path)[1]), *numbers)
    with pytest.raises(PortError, match=saying) as error:
        ported(tmp_path, tensors)
    assert error.value.status == INCOMPLETE
    report, _ = ported(tmp_path, tensors, allow_partial=True)
    assert report.verdict == "partial" and f"decoder.layers.{numbers[0]}" in report.reason


def test_a_tensor_that_is_missing_is_named_as_the_file_would(tmp_path):
    tensors = hybrid(source(tmp_path)[1])
    del tensors["decoder.layers.2.hyper_connection.bias"]
    with pytest.raises(PortError, match=r"lacks decoder\.layers\.2\.hyper_connection\.bias$"):
        ported(tmp_path, tensors)


@pytest.mark.parametrize("modules", [("mlp", "self_attention"), LAST[:1] * 2])
def test_other_turns_are_refused_with_their_pattern(tmp_path, modules):
    pattern = {"mlp": r"-\*-\*-\*", "self_attention": r"\*\*\*\*\*\*"}[modules[0]]
    with pytest.raises(PortError, match=pattern):
        ported(tmp_path, hybrid(source(tmp_path)[1], modules))


def test_a_whole_layer_under_one_hyper_connection_is_neither_site(tmp_path):
    tensors = hybrid(source(tmp_path)[1])
    tensors["decoder.layers.2.inner_layer.mlp.weight"] = np.ones((2, 2), np.float32)
    with pytest.raises(PortError, match="belong to no site") as error:
        ported(tmp_path, tensors)
    assert error.value.status == INCOMPLETE


def test_the_stack_of_a_layer_of_multi_token_prediction_is_numbered_on_its_own(tmp_path):
    _, paired = source(tmp_path)
    ahead = {name: value + 1 for name, value in paired.items() if ".layers.0." in name}
    tensors = {**hybrid(paired), **hybrid(ahead, lead="mtp.layers.0.mtp_model_layer.")}
    save_file(tensors, tmp_path / "hybrid.safetensors")
    read = read_sites(tmp_path / "hybrid.safetensors")
    assert sorted(site for site in read if site.startswith("mtp")) == ["mtp.0.attention", "mtp.0.ffn"]
    assert np.array_equal(read["mtp.0.ffn"]["pre_beta"], read["layers.0.ffn"]["pre_beta"] + 1)
    assert sorted({site.split(".")[1] for site in read if site.startswith("layers")}) == ["0", "1", "2"]


def test_wrappers_stay_in_the_names_that_are_shown(tmp_path):
    """They tell an averaged model from the one beside it."""
    tensors = hybrid(source(tmp_path)[1])
    tensors = {
        name.replace("decoder.", "ema_model.decoder.") if ".0.hyper" in name else
        name.replace("hyper_connection.", "_orig_mod.hyper_connection."): value
        for name, value in tensors.items()
    }  # fmt: skip
    save_file(tensors, tmp_path / "hybrid.safetensors")
    with open_checkpoint(tmp_path / "hybrid.safetensors") as checkpoint:
        shown = [name for name in checkpoint.tensors if name.endswith(".bias")]
    assert sorted(shown) == [
        "decoder.layers.0._orig_mod.mlp_hyper_connection.bias",
        "decoder.layers.1._orig_mod.mlp_hyper_connection.bias",
        "decoder.layers.1._orig_mod.self_attention_hyper_connection.bias",
        "decoder.layers.2._orig_mod.mlp_hyper_connection.bias",
        "decoder.layers.2._orig_mod.self_attention_hyper_connection.bias",
        "ema_model.decoder.layers.0.self_attention_hyper_connection.bias",
    ]


@pytest.mark.parametrize("number", ["9" * 5000, "٢", "02"])
def test_odd_numbers_are_no_layers_and_no_traceback(tmp_path, number):
    tensors = hybrid(source(tmp_path)[1])
    if number == "02":  # the same sub-layer once more
        tensors |= {name.replace(".2.", ".02."): value for name, value in tensors.items() if ".2." in name}
    else:
        tensors = {name.replace("layers.2.", f"layers.{number}."): value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "hybrid.safetensors")
    with pytest.raises(PortError), open_checkpoint(tmp_path / "hybrid.safetensors") as checkpoint:
        understand(checkpoint, dialect="megatron").check_whole(False)
