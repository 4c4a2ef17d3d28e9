"""The target's own configuration is read, and states the dialect of the target."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("hypothesis", reason="hypothesis, of the extra 'regenerate', is not installed")

from hypothesis import given
from hypothesis import strategies as st

from conformance.cases import dialects as rows
from conformance.porter import configuration, dialects
from conformance.porter.layouts import layout_named
from conformance.porter.port import Options, port
from tests.conformance.porter.configured_model import needs_orbax, v4
from tests.conformance.porter.misread import sites
from tests.conformance.porter.porter_data import (
    LAYOUTS,
    NORMED,
    differences,
    random_sites,
    read_sites,
    with_ones,
    write_canonical,
)
from tests.conformance.porter.small_checkpoint import call, refuses
from tests.conformance.porter.test_port_properties import directory, examples


def yaml_file(path, **settings):
    path.write_text("base_config: base.yml\nmodel_name: deepseek4-284b\nemb_dim: 8\n" + "".join(
        f"{key}: {json.dumps(value).replace('1e-', '1.0e-')}\n" for key, value in settings.items()
    ))  # fmt: skip
    return path


def test_the_configuration_of_the_target_is_read(tmp_path):
    needs_orbax()
    pytest.importorskip("yaml", reason="needs the package PyYAML")
    source = v4(tmp_path / "source")
    own = yaml_file(tmp_path / "own.yml", mhc_expansion_rate=4, normalization_layer_epsilon=1e-5)
    arguments = (source, tmp_path / "tree", "--to", "maxtext", "--to-config")
    printed = refuses(tmp_path, "port", *arguments, own, saying=("approximate",), status=4)
    assert "the norm's eps 1e-06 becomes 1e-05" in printed and "own.yml" in printed
    fewer = yaml_file(tmp_path / "fewer.yml", normalization_layer_epsilon=1e-6, sinkhorn_iterations=3)
    printed = refuses(tmp_path, "port", *arguments, fewer, saying=("approximate",), status=4)
    assert "Sinkhorn's iterations 20 becomes 3" in printed and "the norm's eps" not in printed
    same = yaml_file(tmp_path / "same.yml", mhc_expansion_rate=4, normalization_layer_epsilon=1e-6)
    done = call("port", *arguments, same)
    assert done.exit_code == 0 and "verdict  exact to rounding" in done.stdout, done.output
    assert differences(read_sites(tmp_path / "tree"), with_ones(sites(3, True))) == []


@pytest.mark.parametrize(
    "settings, word, statuses",
    [
        ({"mhc_expansion_rate": 2, "normalization_layer_epsilon": 1e-6}, "n = 2", (2,)),
        ({"enable_mhc_lite": True, "normalization_layer_epsilon": 1e-6}, "enable_mhc_lite", (2, 5, 6)),
        ({"mhc_new_gate": True, "normalization_layer_epsilon": 1e-6}, "mhc_new_gate", (6,)),
        ({"normalization_layer_epsilon": -1.0}, "norm_eps", (6,)),
        ({"sinkhorn_iterations": "many"}, "iterations", (6,)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_target_s_configuration_of_another_function_is_never_exact(tmp_path, settings, word, statuses):
    needs_orbax()
    pytest.importorskip("yaml", reason="needs the package PyYAML")
    source, config = v4(tmp_path / "source"), yaml_file(tmp_path / "other.yml", **settings)
    done = call("port", source, tmp_path / "tree", "--to", "maxtext", "--to-config", config)
    assert done.exit_code in statuses and word in done.output, f"{done.exit_code}: {done.output}"
    assert not (tmp_path / "tree").exists()


def test_a_number_without_a_dot_is_one_in_yaml_too(tmp_path):
    needs_orbax()
    pytest.importorskip("yaml", reason="needs the package PyYAML")
    (tmp_path / "own.yml").write_text("normalization_layer_epsilon: 1e-6\nsinkhorn_iterations: 20\n")
    options = Options(to="maxtext", to_config=tmp_path / "own.yml")
    assert port(v4(tmp_path / "source"), tmp_path / "tree", options).verdict == "exact to rounding"


@pytest.mark.parametrize("content", ["[1, 2]", "a: [", "\tb: 1", "just words"])
@pytest.mark.parametrize("option", ["--config", "--to-config"])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path, option, content):
    pytest.importorskip("yaml", reason="needs the package PyYAML")
    source = v4(tmp_path / "source")
    (tmp_path / "bad.yml").write_text(content)
    arguments = (source, tmp_path / "out.safetensors", "--to", "deepseek", option)
    refuses(tmp_path, "port", *arguments, tmp_path / "bad.yml", saying=("bad.yml",))
    refuses(tmp_path, "port", *arguments, tmp_path / "gone.yml", saying=("gone.yml",))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"rms_norm_eps": 1e-5}, "the norm's eps 1e-06 becomes 1e-05"),
        ({"hc_eps": 1e-5}, "Sinkhorn's eps 1e-06 becomes 1e-05"),
        ({"hc_sinkhorn_iters": 4}, "Sinkhorn's iterations 20 becomes 4"),
        ({"model_type": "deepseek_v41", "head": False}, "the previous site's"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_directory_that_takes_the_tensors_says_what_they_will_compute(tmp_path, changes, reason):
    source, into = v4(tmp_path / "source", "deepseek"), v4(tmp_path / "into", "deepseek", **changes)
    arguments = (source, "--into", into, "--to", "deepseek")
    printed = refuses(tmp_path, "port", *arguments, saying=("approximate",), status=4)
    assert reason in printed and "from its config.json" in printed, printed
    done = call("port", *arguments, "--allow-approximate")
    assert done.exit_code == 0 and reason in done.stdout, done.output


def test_a_directory_with_the_same_configuration_takes_them_exactly(tmp_path):
    source = v4(tmp_path / "source", "deepseek", rms_norm_eps=1e-5, hc_sinkhorn_iters=7)
    into = v4(tmp_path / "into", "deepseek", rms_norm_eps=1e-5, hc_sinkhorn_iters=7)
    report = port(source, None, Options(to="deepseek", into=into))
    assert report.reason == "exact" and report.told_by == dialects.FROM_CONFIG, (report.reason, report.told_by)
    assert differences(read_sites(into), sites(3, True)) == []


@pytest.mark.parametrize(
    "changes, word",
    [({"model_type": "deepseek_v5"}, "model_type deepseek_v5 is not known"), ({"hc_new": 1}, "hc_new"),
     ({"hc_eps": -1}, "eps"), ({"model_type": "qwen4_exp"}, "qwen4_exp")],
)  # fmt: skip
def test_a_directory_of_a_model_that_nobody_knows_takes_nothing_unless_told(tmp_path, changes, word):
    source, into = v4(tmp_path / "source", "deepseek"), v4(tmp_path / "into", "deepseek", **changes)
    arguments = (source, "--into", into, "--to", "deepseek")
    for more in ((), ("--assume",), ("--allow-approximate",)):
        status = 5 if "qwen" in word else 6
        refuses(tmp_path, "port", *arguments, *more, saying=("target", word), status=status)
    if "qwen" not in word:
        assert call("port", *arguments, "--to-dialect", "deepseek-v4").exit_code == 0


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "canonical"])
@given(
    row=st.sampled_from(sorted(rows.dialect_names())),
    eps=st.sampled_from([1e-6, 1e-5, 3e-4]), sinkhorn_eps=st.sampled_from([1e-6, 1e-5]), iterations=st.integers(1, 30),
)  # fmt: skip
@examples(25)
def test_a_target_with_the_settings_that_are_printed_computes_what_the_verdict_is_about(
    layout, row, eps, sinkhorn_eps, iterations
):
    """The settings, read as a configuration of the target's software, give the parameters of the verdict."""
    p = dialects.parse(row)
    if p["residual"] not in layout_named(layout).residuals:
        return
    change = {"norm_eps": eps}
    if p["residual"] == "sinkhorn":
        change |= {"iterations": iterations} | ({"eps": sinkhorn_eps} if p["guard"] != "none" else {})
    reduce = p["reduce"] if p["reduce"] != "head" else "none"
    text = ",".join([row, *(f"{key}={value}" for key, value in change.items()), f"reduce={reduce}"])
    norm = p["norm_weight"] and layout in NORMED
    with directory() as home:
        by_site = random_sites(1, 3, 2, layers=1, residual=p["residual"], norm=norm)
        source = write_canonical(home / "source.safetensors", by_site, text)
        target = home / ("out" if layout in ("maxtext",) else "out.gguf" if layout == "gguf" else "out.safetensors")
        report = port(source, target, Options(to=layout, dry_run=True, allow_approximate=True))
        base, *_ = report.target_dialect.split(",")
        software = rows.configuration(base)
        if report.settings_place != software.place:
            return  # set as another row of the same layout, and described as the nearest one
        stated = {k: v for k, v in configuration.values(report.settings, software).items() if k != "streams"}
        target = dialects.parse(report.target_dialect)
        wanted = {**dialects.parse(base), **stated}
        apart = {k: (wanted[k], v) for k, v in target.items() if wanted[k] != v and k not in ("reduce", "norm_weight")}
        assert not apart, f"{text} to {report.target_dialect} with {report.settings}: {apart}"
        carried = {name for names in software.keys.values() for name in names}
        if {"norm_eps"} <= carried:
            assert target["norm_eps"] == eps, report.target_dialect
        if {"iterations"} <= carried and p["residual"] == "sinkhorn":
            assert target["iterations"] == iterations, report.target_dialect
