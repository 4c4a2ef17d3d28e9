"""Values that software takes from its configuration are carried to the target, and settings are printed."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("hypothesis", reason="hypothesis, of the extra 'regenerate', is not installed")

from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from conformance.cases import dialects as rows
from conformance.porter import configuration, dialects
from conformance.porter.errors import PortError
from conformance.porter.layouts import layout_named
from conformance.porter.port import Options, Refused, port
from tests.conformance.porter.configured_model import NAMES, needs_orbax, noted, v4
from tests.conformance.porter.misread import GLM5, MISREAD, V4, V41, glm5, sites, write_model
from tests.conformance.porter.porter_data import (
    differences,
    read_sites,
    read_tensors,
    with_ones,
    write_canonical,
)
from tests.conformance.porter.small_checkpoint import call, refuses
from tests.conformance.porter.test_port_configuration_target import yaml_file
from tests.conformance.porter.test_port_properties import directory, examples

LINE = "set      normalization_layer_epsilon: {} in MaxText's configuration (YAML or command line)"


@pytest.mark.parametrize("names", NAMES)
def test_deepseek_v4_to_maxtext_and_back_needs_no_option(tmp_path, names):
    """MaxText's own configurations of the model set the eps that its row doesn't have."""
    needs_orbax()
    source = v4(tmp_path / "source", names)
    done = call("port", source, tmp_path / "tree", "--to", "maxtext")
    assert done.exit_code == 0, done.stderr
    assert LINE.format("1e-06") in done.stdout.splitlines() and "verdict  exact to rounding" in done.stdout
    there = noted(tmp_path / "tree")
    assert there["settings"] == {"normalization_layer_epsilon": 1e-6}
    assert there["parameters"]["norm_eps"] == 1e-6 and there["parameters"]["reduce"] == "head"
    assert differences(read_sites(tmp_path / "tree"), with_ones(sites(3, True))) == []
    back = port(tmp_path / "tree", tmp_path / "back", Options(to=names))
    assert back.verdict == "exact" or back.verdict == "exact to rounding", back.reason
    assert (back.rounding, back.settings, back.assumed) == (0, {}, False)
    assert differences(read_tensors(tmp_path / "back"), read_tensors(source)) == []
    assert back.target_dialect == {"deepseek": "deepseek-v4", "transformers": "deepseek-v4-transformers"}[names]
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["model_type"] == "deepseek_v4" and config["rms_norm_eps"] == 1e-6


CONFIGURED = st.fixed_dictionaries(
    {"rms_norm_eps": st.sampled_from([1e-5, 1e-6, 1e-20, 0.25]), "hc_sinkhorn_iters": st.integers(1, 40)}
)
HEADED = ("deepseek", "transformers")


@pytest.mark.parametrize("names", [*HEADED, "glm-5"])
@given(set_there=CONFIGURED)
@examples(8)
def test_whatever_both_take_from_their_configuration_comes_back(names, set_there):
    """MaxText's head has an eps of its own, 1e-6, which nothing sets: a model with a head must have the same."""
    needs_orbax()
    if names in HEADED:
        set_there = {**set_there, "rms_norm_eps": 1e-6}
    eps, iterations = set_there["rms_norm_eps"], set_there["hc_sinkhorn_iters"]
    own = 1e-6 if names in HEADED else 1e-5
    with directory() as home:
        if names in HEADED:
            source = v4(home / "source", names, **set_there)
        else:
            source = write_model(home / "source", glm5(sites(3, False)), {**GLM5, **set_there})
        there = port(source, home / "tree", Options(to="maxtext"))
        expected = {"normalization_layer_epsilon": eps} if eps != 1e-5 else {}
        expected |= {"sinkhorn_iterations": iterations} if iterations != 20 else {}
        assert there.settings == expected and there.verdict == "exact to rounding", (there.settings, there.reason)
        back = port(home / "tree", home / "back", Options(to="deepseek" if names == "deepseek" else "transformers"))
        expected = {"rms_norm_eps": eps} if eps != own else {}
        expected |= {"hc_sinkhorn_iters": iterations} if iterations != 20 else {}
        assert back.settings == expected and back.settings_place == "config.json", back.settings
        assert back.verdict.startswith("exact") and back.rounding == 0, back.reason
        assert differences(read_sites(home / "back"), read_sites(source)) == []
        config = json.loads((home / "back" / "config.json").read_text())
        config = config.get("text_config", config)
        assert {key: config[key] for key in set_there} == set_there, "and the configuration that is written has it"
        again = port(home / "back", home / "again.safetensors", Options(to="canonical"))
        assert again.reason == "exact" and not again.assumed, again.reason


def test_an_eps_of_the_head_that_nothing_sets_is_approximate(tmp_path):
    needs_orbax()
    source = v4(tmp_path / "source", rms_norm_eps=1e-5)
    printed = refuses(tmp_path, "port", source, tmp_path / "tree", "--to", "maxtext", saying=("approximate",), status=4)
    assert "the head's norm eps 1e-05 becomes 1e-06" in printed, printed


def test_what_the_target_cannot_be_set_to_stays_approximate(tmp_path):
    needs_orbax()
    source = v4(tmp_path / "source", hc_eps=1e-5)
    arguments = (source, tmp_path / "tree", "--to", "maxtext")
    printed = refuses(tmp_path, "port", *arguments, saying=("approximate",), status=4)
    assert "Sinkhorn's eps 1e-05 becomes 1e-06" in printed and LINE.format("1e-06") in printed


def test_a_dialect_that_is_asked_for_is_taken_as_it_is(tmp_path):
    needs_orbax()
    source = v4(tmp_path / "source")
    with pytest.raises(Refused) as raised:
        port(source, tmp_path / "tree", Options(to="maxtext", to_dialect="maxtext"))
    assert raised.value.status == 4 and "the norm's eps 1e-06 becomes 1e-05" in raised.value.report.reason
    report = port(source, tmp_path / "tree", Options(to="maxtext", to_dialect="maxtext,norm_eps=1e-6"))
    assert report.verdict == "exact to rounding" and report.settings == {"normalization_layer_epsilon": 1e-6}


def test_glm_5_by_way_of_maxtext_has_its_own_names_and_its_own_eps(tmp_path):
    needs_orbax()
    case = MISREAD["glm-5"]
    source = case.write(tmp_path / "source", case.tensors())
    there = port(source, tmp_path / "tree", Options(to="maxtext"))
    assert there.verdict == "exact to rounding" and there.settings == {}, (there.reason, there.settings)
    assert any("factor of n" in note for note in there.notes), "a mean becomes a sum"
    back = port(tmp_path / "tree", tmp_path / "back", Options(to="transformers"))
    assert back.target_dialect == "glm-5" and back.settings == {}, (back.target_dialect, back.settings)
    assert all(name.startswith("model.language_model.layers.") for name in back.tensors), list(back.tensors)[:3]
    assert differences(read_sites(tmp_path / "back"), sites(3, False)) == []


@pytest.mark.parametrize("layout", ["canonical", "deepseek"])
def test_a_dialect_that_is_asked_for_implies_the_names_of_its_models(tmp_path, layout):
    """GLM-5 has a vision part, and its text part's names say so."""
    config = GLM5 if layout == "deepseek" else None
    if layout == "canonical":
        source = write_canonical(tmp_path / "source.safetensors", sites(3, False), "glm-5")
    else:
        source = write_model(tmp_path / "source", NAMES["deepseek"](sites(3, False)), config)
    for to_dialect in (None, "glm-5"):
        target = tmp_path / f"there {to_dialect}"
        report = port(source, target, Options(to="transformers", to_dialect=to_dialect))
        odd = [name for name in report.tensors if not name.startswith("model.language_model.layers.")]
        assert not odd and report.target_dialect == "glm-5", (odd[:1], report.target_dialect)
        config = json.loads((target / "config.json").read_text())
        assert config["model_type"] == "glm5_next", config
    report = port(source, tmp_path / "v4", Options(
        to="transformers", to_dialect="deepseek-v4-transformers", allow_approximate=True
    ))  # fmt: skip
    assert all(name.startswith("model.layers.") for name in report.tensors), list(report.tensors)[:2]


def test_the_source_s_configuration_may_be_maxtext_s(tmp_path):
    needs_orbax()
    pytest.importorskip("yaml", reason="needs the package PyYAML")
    case = MISREAD["nnx-list"]
    source = case.write(tmp_path / "source", case.tensors())
    config = yaml_file(tmp_path / "run.yml", mhc_expansion_rate=4, normalization_layer_epsilon=1e-6)
    options = Options(to="canonical", config=config, assume=True)
    report = port(source, tmp_path / "there.safetensors", options)
    assert report.source_dialect.startswith("maxtext,norm_eps=1e-06"), report.source_dialect
    with safe_open(tmp_path / "there.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["parameters"])["norm_eps"] == 1e-6
    wrong = yaml_file(tmp_path / "wrong.yml", mhc_expansion_rate=2)
    refuses(tmp_path, "port", source, tmp_path / "o.safetensors", "--to", "canonical", "--config", wrong,
            saying=("wrong.yml", "n = 2", "n = 4"))  # fmt: skip
    looked = call("inspect", source, "--config", config)
    assert "maxtext,norm_eps=1e-06" in looked.stdout, looked.output
    lite = yaml_file(tmp_path / "lite.yml", mhc_expansion_rate=4, enable_mhc_lite=True)
    refuses(tmp_path, "port", source, tmp_path / "o.safetensors", "--to", "canonical", "--assume", "--config", lite,
            saying=("permutations", "sinkhorn"))  # fmt: skip


def test_two_keys_that_set_one_value_differently_are_named(tmp_path):
    source = v4(tmp_path / "source", "deepseek", norm_eps=1e-5)
    arguments = (source, tmp_path / "out.safetensors", "--to", "canonical")
    refuses(tmp_path, "port", *arguments, saying=("rms_norm_eps and norm_eps", "1e-06", "1e-05"), status=6)


@pytest.mark.parametrize("form", ["there", "there.safetensors", "there.pt", "tree", "there.gguf"])
def test_an_assumption_stays_one_in_whatever_it_is_kept(tmp_path, form):
    """Also where a config.json is written beside it, which would say what the model is."""
    if form == "tree":
        needs_orbax()
    elif form == "there.pt":
        pytest.importorskip("torch", reason="torch is not installed")
    elif form == "there.gguf":
        pytest.importorskip("gguf", reason="gguf, of the extra of that name, is not installed")
    layout = {"tree": "maxtext", "there.gguf": "gguf"}.get(form, "transformers")
    source = write_model(tmp_path / "source", NAMES["transformers"](sites(3, True)))
    report = port(source, tmp_path / form, Options(to=layout, assume=True))
    assert report.assumed and "nothing says so" in report.reason
    with pytest.raises(PortError) as raised:
        again = port(tmp_path / form, tmp_path / "again.safetensors", Options(to="canonical"))
        raise AssertionError(f"what was assumed is a fact now: {again.reason}, {again.source_told_by}")
    assert raised.value.status == 6, str(raised.value)
    with pytest.raises(PortError) as raised:  # by one more way
        port(tmp_path / form, tmp_path / "more", Options(to="deepseek"))
    assert raised.value.status == 6, str(raised.value)
    looked = call("inspect", tmp_path / form)
    assert "an assumption" in looked.stdout and "nothing says so" in looked.stdout, looked.stdout


def test_the_released_inference_configuration_says_norm_eps(tmp_path):
    config = {key: value for key, value in V4.items() if key != "rms_norm_eps"}
    source = write_model(tmp_path / "source", NAMES["deepseek"](sites(3, True)), {**config, "norm_eps": 1e-5})
    report = port(source, tmp_path / "out.safetensors", Options(to="canonical"))
    assert report.source_dialect == "deepseek-v4,norm_eps=1e-05"


@pytest.mark.parametrize("kind", ["deepseek_v4", "glm5_next", "glm5_next_text", "hy_v4"])
def test_a_configuration_as_transformers_writes_it_has_nothing_unknown(kind):
    """All of its keys, of which most are of other parts; its values are those of the row."""
    transformers_library = pytest.importorskip("transformers", reason="needs the package transformers")
    made = transformers_library.CONFIG_MAPPING
    if kind not in made:
        pytest.skip(f"transformers {transformers_library.__version__} has no {kind}")
    config = made[kind]().to_dict()
    row = next(
        layout.models[kind] for layout in map(layout_named, ("transformers", "hunyuan")) if kind in layout.models
    )
    software = rows.configuration(row)
    assert configuration.unknown_keys(config, software) == []
    values = configuration.values(config, software)
    assert {k: v for k, v in values.items() if k != "streams"}.items() <= dialects.parse(row).items(), values
    assert values["streams"] == 4


def test_settings_inside_of_a_text_configuration_count(tmp_path):
    inner = {**V41, "model_type": "glm5_next_text", "rms_norm_eps": 1e-3, "hc_sinkhorn_iters": 5}
    config = {"model_type": "glm5_next", "text_config": inner}
    source = write_model(tmp_path / "source", glm5(sites(3, False)), config)
    report = port(source, tmp_path / "out.safetensors", Options(to="canonical"))
    assert report.source_dialect == "glm-5,norm_eps=0.001,iterations=5", report.source_dialect
