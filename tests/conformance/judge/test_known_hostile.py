"""Lists of known results that are nearly right are read, or refused in one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

import conformance
from conformance.cli.app import app
from conformance.files.places import CaseError
from conformance.judge.item import Outcome
from conformance.judge.known import judge, load_known
from conformance.judge.rule import Check
from tests.conformance.files.mutations import mutations, refused

CONTENT = json.loads(Path(conformance.__file__).with_name("known_results.json").read_text())
CONTENT["entries"] = CONTENT["entries"][:3]
OUTCOME = Outcome(
    "mlx-mhc", "smoke-transformer-engine", "residual_matrix", "float32-float32", "float32", "transformer-engine",
    [Check("d/logits", "failed", 2.0)],
)  # fmt: skip


def test_a_list_that_is_nearly_right(tmp_path):
    path, count = tmp_path / "known.json", 0
    for text in mutations(CONTENT, 400):
        path.write_bytes(text)
        count += refused(lambda: judge([OUTCOME], load_known(path)), CaseError, str(path))
    assert count > 250


def test_run_refuses_it_in_one_line(tmp_path):
    path = tmp_path / "known.json"
    for text, said in (
        (b'{"format": "mhc-conformance-known/1", "entries": [{"implementation": 3}]}', "entries[0].implementation"),
        (b'{"format": "mhc-conformance-known/2", "entries": []}', "expected format 'mhc-conformance-known/1'"),
        (b"[" * 9999, "nested too deeply"),
    ):
        path.write_bytes(text)
        done = CliRunner().invoke(app, ["run", "--known", str(path)])
        assert done.exit_code == 2 and done.output.count("\n") == 1
        assert f"{path}: " in done.output and said in done.output
