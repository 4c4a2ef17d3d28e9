"""All parts of a configuration are read, with every key of hyper-connections and every count of layers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from conformance.cases import dialects as rows
from conformance.porter import configuration, parts
from conformance.porter.errors import PortError
from conformance.porter.port import Options, port
from tests.conformance.porter.layout_rows import bodies, deepseek
from tests.conformance.porter.misread import DIM, STREAMS, V4, sites, write_model
from tests.conformance.porter.small_checkpoint import call, refuses

MAXTEXT = rows.configuration("maxtext")


def source(folder, config, layers=3):
    return write_model(folder, deepseek(sites(layers, True), STREAMS, DIM), config)


def told(tmp_path, config, *options):
    return call("port", source(tmp_path / "source", config), tmp_path / "o.safetensors", "--to", "canonical", *options)


@pytest.mark.parametrize("part", parts.TEXT)
def test_whatever_the_part_of_the_language_model_is_called_it_is_read(tmp_path, part):
    inner = {"model_type": "deepseek_v4", "hc_sinkhorn_iters": 5}
    config = {key: value for key, value in V4.items() if key != "hc_sinkhorn_iters"}
    report = port(source(tmp_path / "s", {**config, part: inner}), tmp_path / "o.safetensors", Options(to="canonical"))
    assert report.source_dialect == "deepseek-v4,iterations=5"


@pytest.mark.parametrize(
    "more, word",
    [
        ({"llm_config": {"model_type": "deepseek_v41"}}, "deepseek_v41"),
        ({"text_config": {"model_type": "glm5_next_text"}}, "glm-5"),
        ({"model": {"hc_eps": 1e-2}}, "the part model"),
        ({"draft": {"deep": [{"mhc_eps": 1}]}}, "draft.deep.0"),
        ({"backbone_config": {"model_type": "deepseek_v4"}}, "backbone_config"),
        ({"text_config": [{"model_type": "deepseek_v41"}]}, "got list"),
        ({"text_config": "deepseek_v41"}, "got str"),
        ({"text_config": {"hc_eps": 1e-3}}, "hc_eps is 1e-06 outside and 0.001 inside"),
        ({"text_config": {"num_hidden_layers": 4}}, "num_hidden_layers is 3 outside and 4 inside"),
        ({"llm_config": {"text_config": {"hidden_size": 16}}}, "hidden_size is 8 outside and 16 inside"),
    ],
)
def test_a_part_that_is_not_understood_or_contradicts_leaves_the_function_unknown(tmp_path, more, word):
    made = source(tmp_path / "source", {**V4, **more})
    arguments = (made, tmp_path / "o.safetensors", "--to", "canonical")
    for option in ((), ("--assume",), ("--allow-approximate",)):
        refuses(tmp_path, "port", *arguments, *option, saying=(word, "--dialect"), status=6)
    assert "not known" in call("inspect", made).stdout
    status = (
        7 if "num_hidden_layers" in word else 2 if "hidden_size" in word else 0
    )  # the tensors are as stated outside
    assert call("port", *arguments, "--dialect", "deepseek-v4").exit_code == status


@pytest.mark.parametrize(
    "more",
    [
        {"text_config": {}, "rms_norm_eps": 1e-3},
        {"text_config": {"hc_eps": 1e-6}, "rms_norm_eps": 1e-3},
        {"text_config": {"rms_norm_eps": None}, "rms_norm_eps": 1e-3},
        {"llm_config": {"rms_norm_eps": 1e-3}, "rms_norm_eps": None},
        {"text_config": {"rms_norm_eps": "1e-3"}, "rms_norm_eps": 1e-3},
    ],
)
def test_what_only_the_whole_states_holds_for_its_part_too(tmp_path, more):
    report = port(source(tmp_path / "s", {**V4, **more}), tmp_path / "o.safetensors", Options(to="canonical"))
    assert (report.source_dialect, report.assumed) == ("deepseek-v4,norm_eps=0.001", False)


@pytest.mark.parametrize(
    "more",
    [
        {"vision_config": {"model_type": "qwen4_exp", "hc_eps": 1}, "audio_encoder": {"model_type": "x"}},
        {"quantization": {"bits": 4, "model.layers.0.attn_hc.fn": {"bits": 8}}},
        {"rope_scaling": {"type": "yarn"}, "compress_rates": {"a": 4}, "hcaptcha": 1, "cache_size": 3, "arch": "hc"},
    ],
)
def test_parts_of_other_senses_and_keys_that_only_look_alike_stop_nothing(tmp_path, more):
    assert told(tmp_path, {**V4, **more}).exit_code == 0


KEYS = ["mhc", "hc", "use_mhc", "enable_hc", "sinkhorn_iters", "num_sinkhorn_iterations", "single_pass", "mhc_eps",
        "hyperConnections", "hyper_connection_rate", "num_residual_streams", "hc-eps", "HC_EPS"]  # fmt: skip


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("key", KEYS)
def test_every_key_that_speaks_of_hyper_connections_is_one(tmp_path, key, inside):
    more = {key: {"eps": 1e-2}} if key in ("mhc", "hc") else {key: False}
    config = {**V4, "text_config": more} if inside else {**V4, **more}
    arguments = (source(tmp_path / "source", config), tmp_path / "o.safetensors", "--to", "canonical")
    refuses(tmp_path, "port", *arguments, saying=(key, "config.json", "--dialect"), status=6)


@pytest.mark.parametrize("name, value, there", [
    ("num_hidden_layers", "5", 7), ("n_layers", 5, 6), ("n_layers", "3", 0), ("num_hidden_layers", "3", 0),
    ("num_hidden_layers", "many", 6), ("num_hidden_layers", 3.5, 6), ("num_hidden_layers", [3], 6),
    ("num_nextn_predict_layers", -1, 6), ("hc_mult", "4", 0), ("hc_mult", "2", 2), ("hidden_size", "8", 0),
    ("hidden_size", "16", 2), ("hc_sinkhorn_iters", "20", 0), ("hc_mult", "4.0", 6), ("hc_mult", "four", 6),
])  # fmt: skip
def test_numbers_as_text_are_numbers_everywhere(tmp_path, name, value, there):
    done = told(tmp_path, {**V4, name: value})
    assert done.exit_code == there, done.output
    assert there or "verdict  exact" in done.stdout


def test_the_inference_configuration_s_count_of_layers_is_one(tmp_path):
    config = {key: value for key, value in V4.items() if key != "num_hidden_layers"}
    assert told(tmp_path, {**config, "n_layers": 3}).exit_code == 0
    refuses(tmp_path, "port", source(tmp_path / "more", {**config, "n_layers": 5}), tmp_path / "p.safetensors",
            "--to", "canonical", saying=("states 5 layers", "3 are there"), status=7)  # fmt: skip


def test_multi_token_prediction_that_is_stated_and_not_there_is_said(tmp_path):
    done = told(tmp_path, {**V4, "num_nextn_predict_layers": 1})
    assert done.exit_code == 0 and "note     config.json states multi-token prediction (1 layer)" in done.stdout
    assert "multi-token prediction" in call("inspect", tmp_path / "source").stdout
    without = told_again(tmp_path, {**V4, "num_nextn_predict_layers": 0})
    assert "multi-token" not in without.stdout


def told_again(tmp_path, config):
    (tmp_path / "again").mkdir()
    return told(tmp_path / "again", config)


@pytest.mark.parametrize("name, text", [
    ("twice.yml", "mhc_expansion_rate: 4\nmhc_expansion_rate: 2\n"), ("twice.json", '{"hc_mult": 4, "hc_mult": 2}'),
    ("deep.yml", "a:\n  b: 1\n  b: 2\n"),
])  # fmt: skip
def test_a_key_that_is_given_twice_is_refused(tmp_path, name, text):
    pytest.importorskip("yaml", reason="needs the package PyYAML")
    (tmp_path / name).write_text(text)
    with pytest.raises(PortError) as raised:
        configuration.read(tmp_path / name)
    assert name in str(raised.value) and "twice" in str(raised.value) and raised.value.status == 2


def test_a_switch_as_text_is_that_switch():
    assert configuration.contradicted({"enable_mhc_lite": "false"}, MAXTEXT) == ""
    assert configuration.contradicted({"enable_mhc_lite": "True"}, MAXTEXT) == "enable_mhc_lite is True"
    assert configuration.contradicted({"enable_mhc_lite": "maybe"}, MAXTEXT) == "enable_mhc_lite is maybe"


@pytest.mark.parametrize("value, number", [
    ("1e-6", 1e-6), ("1.e-05", 1e-5), (".5", 0.5), ("-3", -3), ("20", 20), ("true", True), ("False", False),
    ("1_0", "1_0"), ("nan", "nan"), ("inf", "inf"), ("\u0661", "\u0661"), ("", ""), ("e5", "e5"),
    ("9" * 5000, "9" * 5000), (None, None), ([1], [1]), (1.5, 1.5),
], ids=lambda value: str(value)[:8])  # fmt: skip
def test_a_text_is_a_number_only_where_it_is_written_as_one(value, number):
    found = parts.plain(value)
    assert found == number and type(found) is type(number)


@pytest.mark.parametrize("settings, layers, ahead, c", [
    ({"num_layers": 4, "hidden_size": 8, "mtp_num_layers": 1}, 4, 1, 8),
    ({"num_layers": 8, "hybrid_layer_pattern": "M-M-", "hidden_size": 8}, 0, 0, 8),
])  # fmt: skip
def test_megatron_s_own_counts_are_read_but_not_those_of_half_layers(settings, layers, ahead, c):
    megatron = rows.configuration("megatron")
    assert configuration.layers_stated(settings) == (layers, ahead)
    assert configuration.sizes_stated({**settings, "num_residual_streams": 4}, megatron) == {"n": 4, "C": c}


def test_maxtext_s_own_counts_are_read_unless_they_are_scaled():
    settings = {"base_num_decoder_layers": 9, "base_emb_dim": 64, "mhc_expansion_rate": 4}
    assert configuration.layers_stated(settings) == (9, 0)
    assert configuration.sizes_stated(settings, MAXTEXT) == {"n": 4, "C": 64}
    scaled = {**settings, "global_parameter_scale": 4}
    assert (configuration.layers_stated(scaled), configuration.sizes_stated(scaled, MAXTEXT)) == ((0, 0), {"n": 4})


def test_megatron_s_arguments_are_held_to_the_tensors(tmp_path):
    by_site = sites(3, False)
    tensors = {}
    for layer, kind, weights in bodies(by_site):
        prefix = f"decoder.layers.{layer}.{'self_attention' if kind == 'attention' else 'mlp'}_hyper_connection."
        tensors |= {
            f"{prefix}mapping_proj.weight": _joined(weights, "_alpha").T,
            f"{prefix}bias": _joined(weights, "_beta"),
            **{f"{prefix}alpha_{part}": weights[f"{part}_alpha_scale"] for part in ("pre", "post", "res")},
        }
    made = write_model(tmp_path / "source", tensors)
    for number, (settings, status, said) in enumerate([
        ({"num_layers": 5}, 7, "states 5 layers"), ({"hidden_size": 16}, 2, "C = 16"), ({"num_layers": 3}, 0, ""),
    ]):  # fmt: skip
        config = tmp_path / f"{number}.json"
        config.write_text(json.dumps({"num_residual_streams": 4, **settings}))
        done = call(
            "port", made, tmp_path / f"{number}.safetensors", "--to", "canonical", "--assume", "--config", config
        )
        assert done.exit_code == status and said in done.output, done.output


def _joined(weights, ending):
    import numpy as np

    flat = [weights[f"{part}{ending}"] for part in ("pre", "post", "res")]
    return np.concatenate([value.reshape(-1) if ending == "_beta" else value for value in flat], -1)


@pytest.mark.parametrize("version", ["0.2.2", "0.2.5"])
def test_maxtext_s_own_configurations_have_nothing_unknown(version):
    pytest.importorskip("yaml", reason="needs the package PyYAML")
    place = Path(os.environ.get("MHC_WITNESSES", "/nowhere")) / f"maxtext=={version}" / "maxtext" / "configs"
    if not place.is_dir():
        pytest.skip(f"maxtext {version} isn't under MHC_WITNESSES")
    for path in [place / "base.yml", *(place / "models").glob("deepseek*.yml")]:
        config = configuration.read(path)
        assert configuration.unknown_keys(config, MAXTEXT) == [], path
        assert configuration.unclear(config, MAXTEXT) == "", path
        assert configuration.contradicted(config, MAXTEXT) == "", path


def test_hyper_connections_are_spoken_of_by_no_other_model_of_transformers():
    """But for Qwen4's gated residual, which is another function, and SuperGlue's matching of images."""
    library = pytest.importorskip("transformers", reason="needs the package transformers")
    speaking = set()
    for kind in ("llama", "qwen3", "deepseek_v3", "gpt_oss", "mamba2", "glm4_moe", "gemma3", "mixtral", "t5"):
        if kind in library.CONFIG_MAPPING:
            config = library.CONFIG_MAPPING[kind]().to_dict()
            speaking |= {key for part in parts.of_language(config) for key in part if parts.OURS.search(key)}
    assert speaking == set()
