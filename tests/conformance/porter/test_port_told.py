"""A user, a configuration and a port's note may contradict each other, and a target may lack a setting."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import load_file, save_file

from conformance.porter import configuration, dialects
from conformance.porter.errors import PortError
from conformance.porter.inspection import inspect
from conformance.porter.port import Options, port
from tests.conformance.porter.layout_rows import deepseek
from tests.conformance.porter.misread import DIM, STREAMS, V4, glm5, sites, write_model
from tests.conformance.porter.porter_data import differences, random_sites, read_sites, write_canonical
from tests.conformance.porter.small_checkpoint import call, refuses

POWER = "deepseek-v4,post_scale=3"


def source(folder, **changes):
    return write_model(folder, deepseek(sites(3, True), STREAMS, DIM), {**V4, **changes})


@pytest.mark.parametrize("dialect, apart", [
    ("deepseek-v4.1", "pre_from"), ("paper", "order"), ("deepseek-v4,hc=1", None), ("maxtext-v1", "guard"),
    ("deepseek-v4,norm_eps=1e-3", "norm_eps"), ("deepseek-v4", None), ("deepseek-v4-transformers", None),
])  # fmt: skip
def test_what_a_configuration_says_otherwise_than_the_user_is_said(tmp_path, dialect, apart):
    if "hc=" in dialect:
        refuses(tmp_path, "port", source(tmp_path / "s"), tmp_path / "o", "--to", "deepseek", "--dialect", dialect,
                saying=("hc",))  # fmt: skip
        return
    named = dialect if dialect == "deepseek-v4.1" else f"{dialect},reduce=head"
    arguments = (source(tmp_path / "s"), tmp_path / "o.safetensors", "--to", "canonical", "--dialect", named)
    done = call("port", *arguments, "--allow-partial", "--allow-approximate")
    assert done.exit_code == 0, done.output
    said = "by its config.json it is deepseek-v4"
    assert (said in done.stdout and apart in done.stdout) if apart else said not in done.stdout


@pytest.mark.parametrize("change, word", [({"model_type": "deepseek_v5"}, "deepseek_v5"), ({"hc_foo": 1}, "hc_foo")])
def test_what_is_not_understood_beside_the_user_s_dialect_is_said(tmp_path, change, word):
    done = call("port", source(tmp_path / "s", **change), tmp_path / "o.safetensors", "--to", "canonical",
                "--dialect", "deepseek-v4")  # fmt: skip
    assert done.exit_code == 0 and word in done.stdout and "--dialect decides" in done.stdout, done.output


def test_metadata_that_says_otherwise_than_the_user_is_said(tmp_path):
    made = write_canonical(tmp_path / "s.safetensors", random_sites(1, STREAMS, DIM), "glm-5")
    done = call("port", made, tmp_path / "o.safetensors", "--to", "canonical", "--dialect", "deepseek-v4,reduce=mean")
    assert done.exit_code == 0 and "by its metadata it is glm-5" in done.stdout, done.output


@pytest.mark.parametrize("part", ["", "language_config"])
def test_a_model_of_another_function_is_none_whatever_dialect_is_named(tmp_path, part):
    other = {part: {"model_type": "qwen4_exp"}} if part else {"model_type": "qwen4_exp"}
    refuses(tmp_path, "port", source(tmp_path / "s", **other), tmp_path / "o.safetensors", "--to", "canonical",
            "--dialect", "deepseek-v4", saying=("qwen4_exp", "config.json"), status=5)  # fmt: skip


def test_a_configuration_is_read_by_the_keys_of_its_own_software(tmp_path):
    made = source(tmp_path / "s", hc_eps=1e-3)
    done = call(
        "port",
        made,
        tmp_path / "o.safetensors",
        "--to",
        "canonical",
        "--dialect",
        "maxtext,norm_weight=false,reduce=head",
    )
    assert "maxtext,norm_weight=False,norm_eps=1e-06,eps=0.001,pre_eps=0.001" in done.stdout, done.output
    assert "with norm_eps, eps, pre_eps from its config.json" in done.stdout
    wrong = source(tmp_path / "wrong", hc_mult=2)
    arguments = (
        wrong,
        tmp_path / "p.safetensors",
        "--to",
        "canonical",
        "--dialect",
        "maxtext,norm_weight=false,reduce=head",
    )
    refuses(tmp_path, "port", *arguments, saying=("n = 2", "n = 4"))  # fmt: skip


def ported(tmp_path, form, to, dialect=POWER):
    options = Options(to=to, dialect=dialect, to_dialect=dialect)
    return port(source(tmp_path / "source"), tmp_path / form, options), tmp_path / form


@pytest.mark.parametrize("form, to", [("there", "deepseek"), ("there.gguf", "gguf"), ("there.safetensors", "deepseek")])
@pytest.mark.parametrize("dialect, name, own", [
    (POWER, "post_scale", 2.0), ("deepseek-v4,pre_eps=1e-3", "pre_eps", 1e-6),
    ("deepseek-v4,mix=out-in", "mix", "in-out"),
])  # fmt: skip
def test_what_no_software_of_the_target_can_be_set_to_is_said_and_not_lost(tmp_path, form, to, dialect, name, own):
    """The next port must not take the software's own value for a fact: that would be another function, as exact."""
    if to == "gguf":
        pytest.importorskip("gguf", reason="gguf, of the extra of that name, is not installed")
    report, there = ported(tmp_path, form, to, dialect)
    assert report.verdict == "exact"
    assert any(f"sets {name}: the software of deepseek-v4 computes {name} = {own}" in note for note in report.notes)
    assert not (there / "config.json").exists()
    again = port(there, tmp_path / "again.safetensors", Options(to="canonical"))
    assert dialects.parse(again.source_dialect) == dialects.parse(dialect), (again.source_dialect, again.source_told_by)
    assert (again.reason, again.assumed) == ("exact", False)
    assert differences(read_sites(again.written), sites(3, True)) == []
    assert inspect(there).dialect == again.source_dialect


def test_what_the_software_can_be_set_to_is_no_note(tmp_path):
    report, there = ported(tmp_path, "there", "deepseek", "deepseek-v4,iterations=7,norm_eps=1e-5")
    assert not any("the software of" in note for note in report.notes)
    assert json.loads((there / "config.json").read_text())["hc_sinkhorn_iters"] == 7


def test_the_settings_of_a_target_are_those_of_its_own_software(tmp_path):
    options = Options(to="deepseek", to_dialect="maxtext,norm_weight=false,norm_eps=1e-6")
    report = port(source(tmp_path / "s"), tmp_path / "there", options)
    assert report.settings_place == "config.json" and "normalization_layer_epsilon" not in report.settings
    strange = Options(to="deepseek", to_dialect="xing-4", allow_approximate=True)
    report = port(source(tmp_path / "t"), tmp_path / "xing", strange)
    assert any("softmax" in note and "the software of glm-5 computes" in note for note in report.notes), report.notes


def with_note(path, target, config, change):
    """A directory with a port's note that says something else, and a config.json."""
    target.mkdir()
    (file,) = path.glob("*.safetensors")
    from safetensors import safe_open

    with safe_open(file, "numpy") as opened:
        note = json.loads(opened.metadata()["mhc_port"])
    note["parameters"] |= change
    save_file(load_file(file), target / "model.safetensors", metadata={"format": "pt", "mhc_port": json.dumps(note)})
    (target / "config.json").write_text(json.dumps(config))
    return target


OURS = {**V4, "mhc_port": "hyper-connections alone"}


@pytest.mark.parametrize("config, change, status, dialect", [
    (V4, {}, 0, "deepseek-v4"),
    (V4, {"post_scale": 3.0}, 6, "post_scale"),
    (V4, {"norm_eps": 1e-5}, 0, "deepseek-v4"),
    (OURS, {"post_scale": 3.0}, 0, "deepseek-v4,post_scale=3.0"),
    (OURS, {"post_scale": 3.0, "norm_eps": 1e-5}, 6, "post_scale"),
    ({**OURS, "norm_eps": 1e-5, "rms_norm_eps": None}, {}, 0, "deepseek-v4,norm_eps=1e-05"),
    ({"hc_eps": 1e-3}, {}, 6, "eps"),
    ({"model_type": "deepseek_v4"}, {"norm_eps": 1e-5}, 6, "norm_eps"),
])  # fmt: skip
def test_a_note_and_a_configuration_that_cannot_both_be_right_leave_the_function_unknown(
    tmp_path, config, change, status, dialect
):
    """The configuration is what the software runs; what it can't state, only the note can."""
    port(source(tmp_path / "source"), tmp_path / "there", Options(to="deepseek"))
    made = with_note(tmp_path / "there", tmp_path / "changed", config, change)
    done = call("port", made, tmp_path / "o.safetensors", "--to", "canonical")
    assert done.exit_code == status, done.output
    if status:
        assert dialect in done.stderr and "a port noted" in done.stderr, done.stderr
    else:
        assert inspect(made).dialect == dialect
    assert ("a port noted" in done.output) == bool(status or change == {"norm_eps": 1e-5} or "norm_eps" in config)


@pytest.mark.parametrize("note", ["x", "[]", "3", "null", '"x"', '{"lacking": 3}', '{"lacking": "abc"}',
    '{"parameters": [1]}', '{"parameters": "{}"}', '{"layout": ["x"]}', '{"source_row": {}}', '{"streams": "4"}',
    '{"assumed": "no"}', '{"format": 3}', "[" * 10000])  # fmt: skip
@pytest.mark.parametrize("config", [True, False])
def test_a_note_that_this_project_does_not_write_is_an_error_of_one_line(tmp_path, note, config):
    made = tmp_path / "s"
    made.mkdir()
    metadata = {"format": "pt", "mhc_port": note}
    tensors = load_file(source(tmp_path / "source") / "model.safetensors")
    save_file(tensors, made / "model.safetensors", metadata=metadata)
    if config:
        (made / "config.json").write_text(json.dumps(V4))
    for command in (("inspect", made), ("port", made, tmp_path / "o.safetensors", "--to", "canonical")):
        refuses(tmp_path, *command, saying=("mhc_port", "metadata"), status=2)


@pytest.mark.parametrize("parameters", ["x", "[]", "3", "null"])
def test_a_statement_that_this_project_does_not_write_is_an_error_of_one_line(tmp_path, parameters):
    path = write_canonical(tmp_path / "s.safetensors", random_sites(1, STREAMS, DIM), "glm-5")
    save_file(load_file(path), path, metadata={"format": "mhc-canonical/1", "parameters": parameters})
    refuses(tmp_path, "inspect", path, saying=("parameters in its metadata",), status=2)


def test_a_layout_without_a_place_for_the_matrix_names_those_that_have_one(tmp_path):
    made = write_canonical(
        tmp_path / "s.safetensors", random_sites(1, 4, 8, residual="identity", head=True), "hunyuan-v4"
    )
    refuses(tmp_path, "port", made, tmp_path / "o", "--to", "transformers", saying=("port --to hunyuan",), status=5)


def yaml_file(path, **settings):
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in settings.items()))
    return path


EVERY = {"mhc_expansion_rate", "normalization_layer_epsilon", "sinkhorn_iterations", "enable_mhc_lite"}
INHERITING = {"base_config": "base.yml", "model_name": "deepseek4-284b"}


@pytest.mark.parametrize("settings, open_keys", [
    ({**INHERITING, "mhc_expansion_rate": 4}, EVERY),
    (INHERITING, EVERY),
    ({"base_config": "base.yml", "mhc_expansion_rate": 4, "enable_mhc_lite": False},
     {"normalization_layer_epsilon", "sinkhorn_iterations"}),
    ({**INHERITING, "mhc_expansion_rate": 4, "override_model_config": True},
     {"normalization_layer_epsilon", "sinkhorn_iterations", "enable_mhc_lite"}),
    ({"mhc_expansion_rate": 4, "model_name": "default", "normalization_layer_epsilon": 1e-5}, set()),
])  # fmt: skip
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_what_a_target_s_configuration_leaves_to_other_files_must_be_set(tmp_path, settings, open_keys, eps):
    """MaxText's file of a model sets the eps that GLM-5 hasn't, and is read after the file that names it."""
    pytest.importorskip("yaml", reason="needs the package PyYAML")
    pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    config = {**V4, "model_type": "glm5_next", "rms_norm_eps": eps}
    made = write_model(tmp_path / "s", glm5(sites(3, False)), config)
    run = yaml_file(tmp_path / "run.yml", **settings)
    dialect = "maxtext,norm_eps=" + str(eps)
    plain = Options(to="maxtext", to_config=run, dry_run=True, allow_approximate=True)
    asked = Options(to="maxtext", to_config=run, to_dialect=dialect, dry_run=True, allow_approximate=True)
    for options in (plain, asked):
        report = port(made, tmp_path / "tree", options)
        if not open_keys:
            assert not any("files that aren't read" in note for note in report.notes)
            continue
        assert open_keys <= set(report.settings), (report.settings, options.to_dialect)
        assert report.settings.get("normalization_layer_epsilon") == eps
        assert report.settings.get("mhc_expansion_rate", 4) == 4 and not report.settings.get("enable_mhc_lite")
        assert report.verdict == "exact to rounding", report.reason
        assert any("files that aren't read" in note for note in report.notes)


def test_what_the_source_s_configuration_leaves_to_other_files_is_said(tmp_path):
    pytest.importorskip("yaml", reason="needs the package PyYAML")
    run = yaml_file(tmp_path / "run.yml", **INHERITING, mhc_expansion_rate=4)
    made = source(tmp_path / "s")
    done = call(
        "port", made, tmp_path / "o.safetensors", "--to", "canonical", "--config", run, "--dialect", "deepseek-v4"
    )
    assert "names files that aren't read (base_config base.yml, model_name deepseek4-284b)" in done.stdout, done.output


def test_nothing_that_a_row_s_software_is_set_to_lies_beyond_it():
    for name, row in dialects.known().items():
        assert configuration.beyond(row, name) == [], name
    assert configuration.beyond({**dialects.parse("xing-4"), "logit_limit": None}, "xing-4") == ["logit_limit"]
    assert configuration.settings({**dialects.parse("xing-4"), "logit_limit": None}, "xing-4") == {}
    assert configuration.beyond(dialects.parse("xing-4,logit_limit=10"), "xing-4") == []
    assert configuration.beyond(dialects.parse("xing-4,logit_limit=10"), "xing-4", ["hc_eps"]) == ["logit_limit"]


def test_an_error_of_a_configuration_says_which_part(tmp_path):
    with pytest.raises(PortError) as raised:
        port(source(tmp_path / "s", model={"hc_eps": 1}), tmp_path / "o.safetensors", Options(to="canonical"))
    assert "config.json: the part model has the key hc_eps" in str(raised.value)
