"""The porter's commands print, ask and refuse as documented, and read only the parts of a checkpoint that they need."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from conformance.cases.dialects import dialect_rows
from conformance.cli import app
from conformance.oracle.build import Wish
from conformance.oracle.build import build as build_case
from conformance.oracle.evaluate import evaluate
from conformance.oracle.floats import Quick
from conformance.porter.convert import Converted
from conformance.porter.probe import Probes
from conformance.porter.site import SiteKey
from tests.conformance.porter import small_checkpoint
from tests.conformance.porter.small_checkpoint import build

V4 = "deepseek-v4,reduce=none"
PROGRAM = [sys.executable, "-m", "conformance.cli"]


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def source(tmp_path):
    return build(tmp_path / "source")


def test_a_dry_run_prints_the_tensors_and_writes_nothing(source, tmp_path):
    done = call("port", source, tmp_path / "out.safetensors", "--to", "canonical", "--dry-run")
    assert done.exit_code == 0 and "a dry run writes nothing" in done.stdout
    assert "layers.1.ffn.res_alpha [32, 16] float32" in done.stdout and "head.head_fn [32, 4] float32" in done.stdout
    assert not (tmp_path / "out.safetensors").exists()
    written = call("port", source, tmp_path / "out.safetensors", "--to", "canonical")
    assert written.exit_code == 0
    planned = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ") and "[" in line]
    assert planned == sorted(load_file(tmp_path / "out.safetensors"))


def test_a_line_a_site_with_v_and_everything_with_json(source, tmp_path):
    done = call("port", source, tmp_path / "a.safetensors", "--to", "canonical", "-v")
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  layers")] == [
        "layers.0.attention", "layers.0.ffn", "layers.1.attention", "layers.1.ffn"
    ]  # fmt: skip
    done = call("port", source, tmp_path / "b.safetensors", "--to", "canonical", "--json")
    report = json.loads(done.stdout)
    assert report["verdict"] == "exact" and report["largest"] == {"H": 0.0, "u": 0.0, "out": 0.0, "head": 0.0}
    assert set(report["deviations"]) == {
        "layers.0.attention",
        "layers.0.ffn",
        "layers.1.attention",
        "layers.1.ffn",
        "head",
    }


def test_the_target_s_metadata_says_what_was_measured(source, tmp_path):
    from safetensors import safe_open

    call("port", source, tmp_path / "a.safetensors", "--to", "liger", "--allow-approximate", "--seed", "5")
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        noted = json.loads(file.metadata()["mhc_port"])
    assert noted["verdict"] == "approximate" and noted["deviation"]["H"] > 0 and noted["left_out"] == ["head"]
    assert noted["probes"] == {"seed": 5, "tokens": 4} and noted["parameters"]["mix"] == "out-in"


def test_activations_of_the_user_are_probed_too(source, tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((3, 5, 4, 8)))
    done = call("port", source, tmp_path / "a.safetensors", "--to", "canonical", "--activations", tmp_path / "x.npy")
    assert done.exit_code == 0 and "on 19 probe tokens" in done.stdout
    np.save(tmp_path / "x.npy", np.zeros((3, 4, 7)))
    done = call("port", source, tmp_path / "b.safetensors", "--to", "canonical", "--activations", tmp_path / "x.npy")
    assert done.exit_code == 2 and "must end in [4, 8]" in done.stderr


def test_inspect_for_people_and_for_machines(source):
    done = call("inspect", source)
    assert "deepseek, safetensors in 3 files" in done.stdout and "n = 4, C = 8" in done.stdout
    inspection = json.loads(call("inspect", source, "--json").stdout)
    assert inspection["layout"] == "deepseek" and inspection["layers"] == {
        "layers.attention": [0, 1],
        "layers.ffn": [0, 1],
    }
    assert inspection["head"] and inspection["odd"] == [] and inspection["dialects"][0] == "deepseek-v4"
    assert inspection["bytes"] == sum(v.nbytes for v in small_checkpoint.weights().values())


def test_inspect_names_what_is_odd(tmp_path):
    tensors = {k: v for k, v in small_checkpoint.weights().items() if not k.startswith("hc_head")}
    tensors["layers.0.hc_attn_scale"][:] = 0
    tensors["layers.1.hc_ffn_fn"][3, 5] = np.inf
    tensors = {k: v for k, v in tensors.items() if not k.startswith("layers.1.hc_attn")}
    save_file(tensors, tmp_path / "odd.safetensors")
    odd = json.loads(call("inspect", tmp_path / "odd.safetensors", "--json").stdout)["odd"]
    assert any("the head is missing, and the dialect reduces the streams by one" in line for line in odd)
    assert any("layers.0.attention, pre_alpha_scale is 0" in line for line in odd)
    assert any("layers.1.ffn" in line and "1 of 128 values aren't finite" in line for line in odd)
    assert any("layers 1 have no attention site" in line for line in odd)


def both_layouts(folder: Path) -> Path:
    """Two layouts in one file."""
    tensors = {k: v for k, v in small_checkpoint.weights(layers=1).items() if "head" not in k}
    renamed = {
        f"model.{k}".replace("hc_attn_", "attn_hc.").replace("hc_ffn_", "ffn_hc."): v for k, v in tensors.items()
    }
    save_file({**tensors, **renamed}, folder / "both.safetensors")
    return folder / "both.safetensors"


def test_where_two_layouts_fit_a_terminal_is_asked(tmp_path):
    path = both_layouts(tmp_path)
    done = call("port", path, tmp_path / "out.safetensors", "--to", "canonical")
    assert (
        done.exit_code == 2 and "fits the layouts deepseek and transformers" in done.stderr and "--from" in done.stderr
    )
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "port", str(path), str(tmp_path / "out.safetensors"), "--to", "canonical", "--dialect", V4],
        stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, text=True,
    )  # fmt: skip
    os.close(terminal)
    os.write(controller, b"deepseek\n")
    printed, _ = process.communicate(timeout=60)
    os.close(controller)
    assert process.returncode == 0 and printed.lstrip().startswith("source   deepseek")  # the prompt ends in a blank
    assert "verdict  exact" in printed and "6 tensors hold the same sites for the layout transformers" in printed


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--to", "nothing"), "unknown layout 'nothing', expected one of canonical"),
        ((), "--to must name the target's layout: canonical"),
        (("--to", "canonical", "--dtype", "int8"), "unknown dtype 'int8'"),
        (("--to", "canonical", "--dialect", "nobody"), "unknown dialect 'nobody'"),
        (("--to", "canonical", "--dialect", "paper,iterations=x"), "iterations can't be 'x'"),
        (("--to", "canonical", "--dialect", "paper,guard=some"), "guard must be one of none, add"),
        (("--to", "canonical", "--dialect", "mhc-lite"), "the dialect has residual=permutations"),
        (("--to", "maxtext", "--stacks", "piles"), "stacks must be like layers"),
        (("--to", "liger", "--names", "attention=x."), "--names takes KIND=PREFIX"),
        (("--to", "deepseek", "--to-dialect", "maxtext"), "has no place for a norm weight"),
    ],
)
def test_usage_is_2_in_one_line(source, tmp_path, arguments, said):
    done = call("port", source, tmp_path / "out", *arguments)
    assert done.exit_code == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_config_that_contradicts_the_tensors_is_named(source, tmp_path):
    (source / "config.json").write_text(json.dumps({"model_type": "deepseek_v4", "hc_mult": 2}))
    done = call("port", source, tmp_path / "out", "--to", "transformers")
    assert done.exit_code == 2 and "config.json states n = 2, and the tensors have n = 4" in done.stderr


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel here has no accounting per process")
def test_only_headers_and_hyper_connections_are_read(tmp_path):
    """By the kernel's count, from a sparse file of 3 GB; the figures at scale are benchmarks/port_scale.py's."""
    source = build(tmp_path / "source", dim=256)
    path = source / small_checkpoint.S3
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    end = len(content) - 8 - length
    header["layers.9.ffn.experts.w1"] = {
        "dtype": "F8_E4M3",
        "shape": [3 * 10**9],
        "data_offsets": [end, end + 3 * 10**9],
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with path.open("rb+") as file:
        file.truncate(8 + len(text) + end + 3 * 10**9)
    index = json.loads((source / small_checkpoint.INDEX).read_text())
    index["weight_map"]["layers.9.ffn.experts.w1"] = small_checkpoint.S3
    (source / small_checkpoint.INDEX).write_text(json.dumps(index))
    program = (
        "import sys; from pathlib import Path; from conformance.porter.port import Options, port\n"
        "def read(): return int(open('/proc/self/io').read().split()[1])\n"
        "source, out = map(Path, sys.argv[1:])\n"
        "port(source, out / 'warm.safetensors', Options(to='canonical'))\n"
        "before = read(); port(source, out / 'a.safetensors', Options(to='canonical')); print(read() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(source), str(tmp_path)], capture_output=True, text=True)
    headers = sum(
        int.from_bytes(p.read_bytes()[:8], "little")
        for p in (source / small_checkpoint.S1, source / small_checkpoint.S2)
    )
    small = headers + len(text) + (source / small_checkpoint.INDEX).stat().st_size + 4096
    needed = sum(v.nbytes for v in small_checkpoint.weights(dim=256).values())
    assert needed <= int(done.stdout) <= 1.05 * needed + small, done.stderr


@pytest.mark.parametrize("dialect", dialect_rows())
def test_probes_compute_what_the_oracle_s_formulas_do(dialect):
    wish = Wish(
        "probe", "", "", dialect, "", 3, 5, (1, 7), stages=["coefficients", "pre"], variants=("float64-float64",)
    )
    case = build_case(wish)
    weights = {k: case.tensors[k] for k in case.stages["coefficients"]["weights"]}
    inputs = {"x": case.tensors["x"].astype(np.float64), **weights}
    true = {
        stage: evaluate(stage, inputs, case.cotangents[stage], case.parameters, {}, Quick())
        for stage in ("coefficients", "pre")
    }
    probes = Probes(inputs["x"].reshape(7, 3, 5), case.parameters, case.parameters)
    row = probes.project(SiteKey("layers", 0, "ffn"), weights, weights, Converted(dict(weights)))
    H = probes._matrices([row], "source")[0]
    expected = true["coefficients"]["H"].reshape(7, 3, 3)
    expected = expected.swapaxes(-1, -2) if case.parameters["mix"] == "out-in" else expected
    np.testing.assert_allclose(H, expected, rtol=0, atol=1e-13)
    pre = probes._gate(row.source["pre"], 1, case.parameters["pre_eps"])
    np.testing.assert_allclose((pre[:, :, None] * probes.x).sum(1), true["pre"]["u"].reshape(7, 5), rtol=1e-12)
