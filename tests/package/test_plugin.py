"""pytest's option ``--mhc-impl``: where names come from, and which runs may not be green."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conformance.implementations.asked import asked, separated

ROOT = Path(__file__).parents[2]
HONEST, OFF = "tests.conformance.strangers:Honest", "tests.conformance.strangers:SlightlyOff"
SMOKE = "smoke-paper-2 and reduce"
REFUSES = """
from conformance.interface import Capabilities


class Refuses:
    name = "refuses"
    capabilities = Capabilities(stages=frozenset({"reduce"}), dialects=frozenset({"paper"}), gradients=True)

    def reduce(self, inputs, config, cotangents):
        raise NotImplementedError("no kernel")
"""


def golden(folder: Path, *arguments: str, variable: str = "", configuration: str = "") -> tuple[int, str]:
    """Exit status and output of the golden cases, run by name from a folder elsewhere."""
    (folder / "pyproject.toml").write_text(configuration or "[tool.pytest.ini_options]\n")
    (folder / "refusing.py").write_text(REFUSES)
    # The installed package brings the plugin, by its entry point, as in a stranger's project.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error"]
    done = subprocess.run(
        [*command, "--pyargs", "conformance.test_golden", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=240,
        env={**os.environ, "MHC_CONFORMANCE_IMPL": variable, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("jax", ["jax"]),
        ("jax,mine:Mine", ["jax", "mine:Mine"]),
        (" jax , ,torch,", ["jax", "torch"]),
        ("jax@data=2,tensor=2,torch", ["jax@data=2,tensor=2", "torch"]),
        ("exec:./harness --limits 1,2", ["exec:./harness --limits 1,2"]),
        ("", []),
    ],
)
def test_names_are_separated_by_commas(text, names):
    assert separated(text) == names


class Config:
    def __init__(self, option: list[str] | None, setting: list[str]):
        self.option, self.setting = option, setting

    def getoption(self, name: str, default: object) -> object:
        return self.option if name == "mhc_impl" else default

    def getini(self, name: str) -> list[str]:
        return {"mhc_impl": self.setting}[name]


@pytest.mark.parametrize(
    ("option", "variable", "setting", "names"),
    [
        (["a:A", "b:B,a:A"], "c:C", ["d:D"], ["a:A", "b:B"]),
        (None, "c:C", ["d:D"], ["c:C"]),
        (None, "", ["d:D", "e:E"], ["d:D", "e:E"]),
    ],
)
def test_the_command_line_goes_before_the_environment_before_the_setting(monkeypatch, option, variable, setting, names):
    monkeypatch.setenv("MHC_CONFORMANCE_IMPL", variable)
    assert asked(Config(option, setting)) == names


def test_ours_run_where_none_is_named(monkeypatch):
    monkeypatch.delenv("MHC_CONFORMANCE_IMPL", raising=False)
    monkeypatch.setattr("conformance.implementations.asked.missing_modules", lambda name: ["jax"] * (name == "jax"))
    assert asked(Config(None, [])) == ["torch"]


def test_an_honest_implementation_passes(tmp_path):
    status, said = golden(tmp_path, "--mhc-impl", HONEST, "-k", SMOKE)
    assert status == 0 and "1 passed" in said, said


def test_the_setting_of_a_project_names_it(tmp_path):
    setting = f'[tool.pytest.ini_options]\nmhc_impl = ["{HONEST}"]\n'
    status, said = golden(tmp_path, "-k", SMOKE, configuration=setting)
    assert status == 0 and "1 passed" in said, said


def test_the_variable_names_several(tmp_path):
    status, said = golden(tmp_path, "-k", SMOKE, variable=f"{HONEST},{OFF}")
    assert status == 1 and "1 failed, 1 passed" in said, said


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_name_that_cannot_be_loaded_is_one_usage_error(tmp_path, workers):
    status, said = golden(tmp_path, "--mhc-impl", "mine:Mine", *workers)
    assert status == pytest.ExitCode.USAGE_ERROR, said
    errors = [line for line in said.splitlines() if line.startswith("ERROR")]
    assert errors == ["ERROR: --mhc-impl mine:Mine: could not be set up: ModuleNotFoundError: No module named 'mine'"]
    assert "Traceback" not in said and "failed" not in said


def test_a_name_that_is_not_selected_is_not_loaded(tmp_path):
    status, said = golden(tmp_path, "--mhc-impl", f"{HONEST},mine:Mine", "-k", f"{SMOKE} and Honest")
    assert status == 0 and "1 passed" in said, said


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_a_run_without_a_claimed_case_fails(tmp_path, workers):
    status, said = golden(tmp_path, "--mhc-impl", HONEST, "-k", "smoke and head", *workers)
    assert status == pytest.ExitCode.TESTS_FAILED, said
    assert f"{HONEST}: all " in said and "commonest reason is: stage head not claimed" in said


def test_one_idle_implementation_fails_a_run_in_which_another_passes(tmp_path):
    status, said = golden(tmp_path, "--mhc-impl", f"{HONEST},refusing:Refuses", "-k", SMOKE)
    assert status == pytest.ExitCode.TESTS_FAILED and "1 passed, 1 skipped" in said, said
    assert "refusing:Refuses: all 1 golden cases were skipped" in said and "no kernel" in said
    assert f"{HONEST}: all" not in said


def test_no_implementation_at_all_is_a_usage_error(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.partition('.')[0] in ('jax', 'torch') else find(name, *a)\n"
    )
    status, said = golden(tmp_path, "-k", SMOKE)
    assert status == pytest.ExitCode.USAGE_ERROR and "expected --mhc-impl NAME" in said, said


def test_other_tests_are_left_alone_and_nothing_heavy_is_imported(tmp_path):
    (tmp_path / "test_mine.py").write_text(
        "import sys\n"
        "def test_it():\n"
        "    assert not {'numpy', 'jax', 'torch', 'conformance.implementations'} & set(sys.modules)\n"
        "import pytest\n"
        "def test_that(): pytest.skip('today')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "conformance.plugin", "-p", "no:cacheprovider", "--rootdir=."],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MHC_CONFORMANCE_IMPL": "mine:Mine", "PYTEST_PLUGINS": "",
             "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "1 passed, 1 skipped" in done.stdout, done.stdout
