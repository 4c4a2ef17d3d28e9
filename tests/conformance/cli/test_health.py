"""The command `health`: what it prints and writes, its statuses, and what it says to a user's mistakes."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner, Result

from conformance import adapters
from conformance.cli import app
from tests.conformance.questions.health import models
from tests.package.test_command_line import call


def health(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["health", *map(str, arguments)])


@pytest.fixture
def healthy(tmp_path):
    return models.write(tmp_path / "healthy", models.healthy())


@pytest.fixture
def sick(tmp_path):
    return models.write(tmp_path / "sick", models.sick())


def test_a_healthy_model_is_summarised(healthy):
    done = health(healthy, "--strict")
    lines = done.output.splitlines()
    assert done.exit_code == 0 and lines[-1] == "no warnings"
    assert lines[0] == "dialect   deepseek-v4 (from its config.json); layout deepseek"
    assert "backward sums drift" in done.output and "composite layers, 6 sites: gain 1 forward, 1" in done.output
    rows = [line for line in lines if line.startswith("layers.")]
    assert len(rows) == 6 and all(len(row.split()) == 12 for row in rows)


@pytest.mark.parametrize(
    ("options", "status"), [((), 0), (("--strict",), 1), (("--json",), 0), (("--json", "--strict"), 1)]
)
def test_warnings_are_a_failure_only_where_they_are_asked_to_be(sick, options, status):
    assert health(sick, *options).exit_code == status


def test_a_warning_has_its_name_its_finding_its_threshold_and_its_reason(sick):
    lines = health(sick).output.splitlines()
    assert lines[-1] == "5 warnings: closed-gate, gain, not-converged, static, unlearned"
    found = next(k for k, line in enumerate(lines) if line.startswith("warning   closed-gate (layers): "))
    assert "layers.1.ffn post 2" in lines[found] and lines[found + 1].startswith(
        "          threshold 0.99: below 0.001"
    )
    assert sum(line.startswith("warning ") for line in lines) == 5


def test_many_sites_are_shown_in_part(tmp_path):
    path = models.write(tmp_path, models.healthy(30))
    lines = health(path).output.splitlines()
    rows = [line.split()[0] for line in lines if line.startswith("layers.")]
    assert len(rows) == 24 and rows[0] == "layers.0.attention" and rows[-1] == "layers.29.ffn"
    assert "36 of the 60 sites are left out here; --json and --html have all of them" in lines


def test_json_has_everything_by_name(sick):
    content = json.loads(health(sick, "--json").output)
    assert content["format"] == "mhc-conformance-health/1" and content["drifts"] == "backward"
    assert [warned["name"] for warned in content["warnings"]] == [
        "gain",
        "not-converged",
        "closed-gate",
        "unlearned",
        "static",
    ]
    assert content["thresholds"]["gain"] == 2.0 and len(content["stacks"][0]["composite"]) == 24


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "--activations", "x.npy"), "--activations and --model are two sources of the same streams"),
        (("--ids", "x.npy"), "--ids are what a model runs on: they go with --model"),
        (("--activations", "missing.npy"), "missing.npy: can't be read"),
        (("--dialect", "deepseek-v5"), "unknown dialect 'deepseek-v5'"),
        (("--tokens", "0"), "--tokens"),
        (("--from", "maxtxt"), "maxtxt"),
        (("--config", "missing.json"), "missing.json"),
    ],
)
def test_a_mistake_is_told_in_one_line(healthy, arguments, said):
    done = health(healthy, *arguments)
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


def test_a_checkpoint_that_is_none_is_told(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert health(tmp_path / "model.safetensors").exit_code == 2
    assert health(tmp_path / "missing").exit_code == 2


def test_a_dialect_that_nothing_says_is_an_assumption(tmp_path):
    path = models.write(tmp_path, models.healthy())
    (path / "config.json").unlink()
    assert "deepseek-v4, an assumption" in health(path).output
    assert "an assumption" not in health(path, "--dialect", "deepseek-v4").output


def test_a_page_that_cant_be_written_leaves_nothing(healthy, tmp_path):
    pytest.importorskip("plotly", reason="needs the extra report")
    done = health(healthy, "--html", tmp_path / "missing" / "page.html")
    assert done.exit_code == 2 and done.stderr.count("\n") == 1 and done.stdout == ""


def test_no_framework_is_imported(healthy):
    done = call("health", str(healthy), "--json")
    assert done.returncode == 0
    loaded = done.stderr.strip()
    assert "'jax'" not in loaded and "'torch'" not in loaded and "'flint'" not in loaded


def test_ids_that_are_none_are_told(healthy, tmp_path):
    pytest.importorskip("transformers", reason="needs the package transformers")
    pytest.importorskip("torch", reason="needs the extra torch")
    (tmp_path / "ids.npy").write_bytes(b"nothing")
    done = health(healthy, "--model", "--ids", tmp_path / "ids.npy")
    assert done.exit_code == 2 and "expected an array of integers" in done.stderr
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    assert health(healthy, "--model", "--ids", tmp_path / "objects.npy").exit_code == 2
    np.savez(tmp_path / "two.npz", np.ones(1), np.ones(1))
    assert "several arrays" in health(healthy, "--model", "--ids", tmp_path / "two.npz").stderr


def test_without_transformers_the_extra_is_named(healthy, monkeypatch):
    monkeypatch.delattr(adapters, "transformers_model", raising=False)
    monkeypatch.setitem(sys.modules, "conformance.adapters.transformers_model", None)
    done = health(healthy, "--model")
    assert done.exit_code == 3 and "pip install 'mhc-conformance[all]'" in done.stderr and done.stderr.count("\n") == 1


def test_without_plotly_the_extra_is_named(healthy, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "conformance.report.health_page", None)
    done = health(healthy, "--html", tmp_path / "page.html")
    assert done.exit_code == 3 and "pip install 'mhc-conformance[report]'" in done.stderr
    assert not (tmp_path / "page.html").exists()
