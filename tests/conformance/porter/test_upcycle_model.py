"""An upcycled model has all tensors of the plain one bit for bit, its sites beside them, and appears whole or not."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from conformance.cases.dialects import dialect_names, parse
from conformance.cli import app
from conformance.porter.errors import PortError
from conformance.porter.inspection import inspect
from conformance.porter.layouts import layouts
from conformance.porter.port import Options, port
from conformance.porter.storage import into
from conformance.porter.storage.shards import SafetensorsCheckpoint
from conformance.porter.upcycling import copying
from conformance.porter.upcycling.upcycle import UpcycleOptions, UpcycleRefused, upcycle
from tests.conformance.porter import plain_model
from tests.conformance.porter.plain_model import DIM, LAYERS, build


def call(*arguments):
    return CliRunner().invoke(app, ["upcycle", *(str(a) for a in arguments)])


def content(directory):
    """The name and a hash of every file, and of what is behind a link."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


@pytest.fixture
def source(tmp_path):
    return build(tmp_path / "plain")


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_the_models_tensors_are_copied_bit_for_bit(tmp_path, shards):
    source = build(tmp_path / "plain", shards)
    before = content(source)
    done = call(source, tmp_path / "out", "--read-back")
    assert done.exit_code == 0 and "exact to rounding: only roundings differ" in done.stdout, done.output
    assert content(source) == before
    after = content(tmp_path / "out")
    weights = [name for name in before if name.endswith(".safetensors")]
    copies = ["model-00001-of-00001.safetensors"] if shards == 1 else weights
    assert [after[name] for name in copies] == [before[name] for name in weights]
    assert after["tokenizer.json"] == before["tokenizer.json"] and "model.safetensors" not in after
    with SafetensorsCheckpoint(tmp_path / "out") as checkpoint:
        for name, value in plain_model.tensors().items():
            if value.dtype != np.int64:  # the porter reads no whole numbers
                assert checkpoint.read(name).tobytes() == value.tobytes()
        sites = {name for name in checkpoint.tensors if name not in plain_model.tensors()}
        assert len(sites) == 2 * LAYERS * 9 + 3 and checkpoint.metadata["total_size"] == sum(
            tensor.nbytes for tensor in checkpoint.tensors.values()
        )


@pytest.mark.parametrize("layout", sorted(layouts()))
def test_every_layout_takes_the_sites_and_a_port_knows_them(source, tmp_path, layout):
    table = layouts()[layout]
    dialect = {"canonical": "deepseek-v4", "maxtext": "maxtext,reduce=head"}.get(layout, table.dialect)
    dialect += "" if table.head else ",reduce=mean"
    target = tmp_path / ("sites.gguf" if layout == "gguf" else "out")
    report = upcycle(source, target, UpcycleOptions(to=layout, dialect=dialect, noise=0.1, read_back=True))
    assert report.change < 1e-7 and report.spread > 0.01 and report.whole == (layout not in ("gguf", "maxtext"))
    inspected = inspect(target)
    assert inspected.layout == layout and not inspected.problem
    ported = port(target, tmp_path / "ported.safetensors", Options(to="canonical"))
    weights = load_file(tmp_path / "ported.safetensors")
    expected = parse(dialect).parameters
    stated = parse(ported.source_dialect).parameters
    assert {k: v for k, v in stated.items() if k not in ("norm_eps", "head_norm_eps", "norm_weight")} == {
        k: v for k, v in expected.items() if k not in ("norm_eps", "head_norm_eps", "norm_weight")
    }
    sigmoid = {
        gate: 1 / (1 + np.exp(-weights[f"layers.1.ffn.{gate}_beta"].astype(np.float64))) for gate in ("pre", "post")
    }
    assert np.sum(sigmoid["pre"] + expected["pre_eps"]) == pytest.approx(1, abs=1e-5)
    assert np.mean(expected["post_scale"] * sigmoid["post"] + expected["post_eps"]) == pytest.approx(1, abs=1e-5)
    assert all(value.std() / value.mean() == pytest.approx(0.1, rel=0.1) for value in sigmoid.values())


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_file_gets_the_sites_alone(source, tmp_path, ending):
    report = upcycle(source, tmp_path / f"sites{ending}", UpcycleOptions(to="deepseek"))
    assert not report.whole and report.settings["hc_mult"] == 4 and "hc_head_fn" in report.tensors
    assert len(report.tensors) == 3 * (2 * LAYERS + 1)


def test_a_file_is_a_source_too(tmp_path):
    source = build(tmp_path / "plain", shards=1)
    upcycle(source / "model.safetensors", tmp_path / "out", UpcycleOptions())
    assert "tokenizer.json" not in content(tmp_path / "out") and inspect(tmp_path / "out").layout == "canonical"


def test_small_shards_bound_the_memory(source, tmp_path):
    report = upcycle(source, tmp_path / "out", UpcycleOptions(shard_bytes=4000))
    shards = sorted((tmp_path / "out").glob("model-mhc-*.safetensors"))
    assert len(shards) == 2 * LAYERS and report.nbytes == sum(
        value.nbytes for shard in shards for value in load_file(shard).values()
    )
    whole = upcycle(source, tmp_path / "one", UpcycleOptions())
    assert whole.tensors == report.tensors


def test_the_configuration_gets_the_keys_of_the_dialects_software(source, tmp_path):
    done = call(source, tmp_path / "out", "--to", "transformers", "--streams", 2)
    assert done.exit_code == 0 and "set      hc_mult: 2 in config.json (done)" in done.stdout
    before, after = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "out"))
    assert after == {**before, "hc_mult": 2, "hc_eps": 1e-6, "hc_sinkhorn_iters": 20}
    assert after["rms_norm_eps"] == 1e-5 and "norm_eps=1e-05" in done.stdout
    plain = call(source, tmp_path / "canonical")
    assert plain.exit_code == 0 and json.loads((tmp_path / "canonical" / "config.json").read_text()) == before


def test_the_keys_of_a_nested_configuration_stand_in_its_language_models_part(tmp_path):
    part = {"model_type": "llama", "num_hidden_layers": LAYERS, "hidden_size": DIM, "rms_norm_eps": 1e-6}
    source = build(tmp_path / "plain", num_hidden_layers=None, hidden_size=None, rms_norm_eps=None, text_config=part)
    upcycle(source, tmp_path / "out", UpcycleOptions(to="deepseek"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["text_config"] == {**part, "hc_mult": 4, "hc_eps": 1e-6, "hc_sinkhorn_iters": 20}
    assert "hc_mult" not in written


def test_the_eps_of_all_norms_is_the_models(tmp_path):
    """One key of MaxText's sets the eps of the model's own norms and of the sites."""
    source = build(tmp_path / "plain", rms_norm_eps=3e-6)
    report = upcycle(source, tmp_path / "out", UpcycleOptions(to="maxtext", dialect="maxtext,reduce=head"))
    assert report.settings["normalization_layer_epsilon"] == 3e-6 and "norm_eps=3e-06" in report.dialect
    given = UpcycleOptions(to="maxtext", dialect="maxtext,reduce=head,norm_eps=1e-4", overwrite=True)
    assert upcycle(source, tmp_path / "given", given).settings["normalization_layer_epsilon"] == 1e-4


def test_a_port_trusts_the_note_for_the_upcycled_model_alone(source, tmp_path):
    upcycle(source, tmp_path / "out", UpcycleOptions(to="deepseek"))
    assert not inspect(tmp_path / "out").problem
    place = tmp_path / "out" / "config.json"
    config = json.loads(place.read_text())
    place.write_text(json.dumps({**config, "model_type": "mystery"}))
    assert inspect(tmp_path / "out").problem == "model_type mystery is not known"
    place.write_text(json.dumps({**config, "hc_sinkhorn_iters": 5}))
    assert "a port noted iterations = 20" in inspect(tmp_path / "out").problem
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('\\"model_type\\": \\"llama\\"', '\\"model_type\\": []'))
    with pytest.raises(PortError, match="isn't what this project writes"):
        inspect(tmp_path / "out")


def test_the_sites_are_read_back_if_the_user_wants_that(source, tmp_path, monkeypatch):
    compared: list[int] = []
    monkeypatch.setattr(into, "compare", lambda path, kind, tensors: compared.append(len(tensors)))
    upcycle(source, tmp_path / "out", UpcycleOptions())
    assert not compared
    report = upcycle(source, tmp_path / "again", UpcycleOptions(read_back=True))
    assert sum(compared) == len(report.tensors)


def test_the_streams_of_the_configuration_are_taken(tmp_path):
    source = build(tmp_path / "plain", hc_mult=3)
    assert upcycle(source, tmp_path / "out", UpcycleOptions(to="deepseek")).streams == 3
    done = call(source, tmp_path / "other", "--to", "deepseek", "--streams", 2)
    assert done.exit_code == 2 and "states 3 streams, and --streams 2" in done.stderr


@pytest.mark.parametrize("dialect", dialect_names())
def test_a_sum_is_refused_and_everything_else_is_written(source, tmp_path, dialect):
    options = UpcycleOptions(dialect=dialect)
    if parse(dialect).parameters["reduce"] != "sum":
        assert upcycle(source, tmp_path / "out", options).verdict == "exact to rounding"
        return
    with pytest.raises(UpcycleRefused, match="by a factor of 4 before its last norm") as refused:
        upcycle(source, tmp_path / "out", options)
    assert refused.value.status == 4 and "reduce=mean" in refused.value.report.reason
    assert not list(tmp_path.glob("*out*"))
    allowed = call(source, tmp_path / "out", "--dialect", dialect, "--allow-approximate")
    assert allowed.exit_code == 0 and "verdict  approximate: the sum over 4 streams" in allowed.stdout
    assert call(source, tmp_path / "mean", "--dialect", f"{dialect},reduce=mean").exit_code == 0


def test_a_dry_run_prints_the_tensors_and_writes_nothing(source, tmp_path):
    done = call(source, tmp_path / "out", "--dry-run")
    assert done.exit_code == 0 and not (tmp_path / "out").exists()
    planned = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    report = json.loads(call(source, tmp_path / "out", "--json").stdout)
    assert sorted(planned) == sorted(report["tensors"]) and report["written"] == str(tmp_path / "out")
    assert report["pre"] == 0.25 and report["factor"] == 1.0 and report["change"] < 1e-12


def test_files_of_other_formats_are_left_behind(source, tmp_path):
    (source / "pytorch_model.bin").write_bytes(b"old")
    (source / "original").mkdir()
    save_file({"layers.0.wq": np.zeros(1)}, source / "consolidated.safetensors")
    os.mkfifo(source / "pipe")
    done = call(source, tmp_path / "out")
    assert "note     not copied: consolidated.safetensors, original, pipe, pytorch_model.bin" in done.stdout
    assert not {"pytorch_model.bin", "original", "pipe"} & set(content(tmp_path / "out"))


def test_layers_beyond_those_that_are_counted_get_no_site(tmp_path):
    source = build(tmp_path / "plain", values=plain_model.tensors(layers=LAYERS + 1))
    report = upcycle(source, tmp_path / "out", UpcycleOptions())
    assert report.notes == ["the layers 2 to 2 of model.layers are beyond those that are counted: no site"]
    assert not any(name.startswith("layers.2") for name in report.tensors)


def test_a_cache_of_links_becomes_files(source, tmp_path):
    links = tmp_path / "snapshot"
    links.mkdir()
    for path in source.iterdir():
        (links / path.name).symlink_to(path)
    upcycle(links, tmp_path / "out", UpcycleOptions())
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert content(tmp_path / "out").items() >= {k: v for k, v in content(source).items() if "-of-" in k}.items()


def test_only_what_upcycle_has_written_is_replaced(source, tmp_path):
    target = tmp_path / "out"
    assert call(source, target).exit_code == 0
    first = content(target)
    assert "exists; --overwrite replaces it" in call(source, target, "--seed", 1).stderr
    assert call(source, target, "--seed", 1, "--overwrite").exit_code == 0 and content(target) != first
    (target / "notes.txt").write_text("mine")
    assert "has notes.txt in it, which would be lost" in call(source, target, "--overwrite").stderr
    other = build(tmp_path / "other")
    assert "wasn't written by upcycle" in call(source, other, "--overwrite").stderr
    assert "the source is never written to" in call(source, source / "out").stderr


def test_nothing_is_left_where_writing_fails(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    for module, name in ((copying, "write_index"), (into, "save_shard")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            done = call(source, tmp_path / "out")
        assert done.exit_code == 2 and "No space left on device" in done.stderr and not done.stdout
        assert sorted(p.name for p in tmp_path.iterdir()) == ["plain"]


def test_a_file_that_changes_while_it_is_copied_is_refused(source, tmp_path, monkeypatch):
    real = os.read

    def read(descriptor, length):
        block = real(descriptor, length)
        if block:
            os.utime(descriptor, (0, 0))
        return block

    monkeypatch.setattr(copying.os, "read", read)
    with pytest.raises(Exception, match="was changed while it was copied"):
        upcycle(source, tmp_path / "out", UpcycleOptions())
    assert not (tmp_path / "out").exists()


def test_a_wrong_derivation_is_not_written(source, tmp_path, monkeypatch):
    from conformance.porter.upcycling.constants import Constants

    real = Constants.site

    def spoilt(self, site):
        weights = real(self, site)
        return {**weights, "post_beta": weights["post_beta"] + np.float32(1e-3)}

    monkeypatch.setattr(Constants, "site", spoilt)
    done = call(source, tmp_path / "out")
    assert done.exit_code == 1 and "a mistake of this program, nothing was written" in done.stderr
    assert not (tmp_path / "out").exists()
