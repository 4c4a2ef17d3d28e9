"""Parameters that a file's metadata leaves open aren't filled in, and unknown ones aren't dropped."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from conformance.porter import dialects
from conformance.porter.port import Options, port
from tests.conformance.porter.porter_data import differences, random_sites, read_sites, write_canonical
from tests.conformance.porter.small_checkpoint import call, refuses

STREAMS, DIM = 4, 8
V4 = "deepseek-v4"


def metadata(path):
    with safe_open(path, "numpy") as file:
        return dict(file.metadata() or {})


def restated(path, target, change, key="parameters", without=""):
    """The file with changed parameters in its metadata, and without tensors of a name."""
    header = metadata(path)
    if key == "mhc_port":
        note = json.loads(header[key])
        change(note["parameters"])
        header[key] = json.dumps(note)
    else:
        stated = json.loads(header[key])
        change(stated)
        header[key] = json.dumps(stated)
    tensors = {k: v for k, v in load_file(path).items() if not (without and without in k)}
    save_file(tensors, target, metadata=header)
    return target


@pytest.fixture
def canonical(tmp_path):
    return write_canonical(tmp_path / "source.safetensors", random_sites(1, STREAMS, DIM, head=True), V4)


@pytest.fixture
def ported(tmp_path, canonical):
    """The same in DeepSeek's layout, with a port's note."""
    port(canonical, tmp_path / "ported.safetensors", Options(to="deepseek"))
    return tmp_path / "ported.safetensors"


def test_a_whole_statement_is_one(tmp_path, canonical, ported):
    for source in (canonical, ported):
        report = port(source, tmp_path / "out.safetensors", Options(to="canonical", overwrite=True))
        assert (report.reason, report.assumed, report.source_told_by) == ("exact", False, dialects.FROM_METADATA)
        assert differences(read_sites(report.written), random_sites(1, STREAMS, DIM, head=True)) == []


LEFT_OPEN = ["guard", "order", "norm_eps", "residual", "mix", "reduce", "post_scale", "iterations"]


@pytest.mark.parametrize("which", ["canonical", "ported"])
@pytest.mark.parametrize("name", LEFT_OPEN)
def test_a_parameter_that_the_metadata_leaves_open_is_not_filled_in_as_a_fact(tmp_path, request, which, name):
    """Those that came later have a meaning where they are left out (`dialects.SILENT`); these were always there."""
    key = "mhc_port" if which == "ported" else "parameters"
    source = restated(request.getfixturevalue(which), tmp_path / "s.safetensors", lambda p: p.pop(name), key)
    arguments = (source, tmp_path / "out.safetensors", "--to", "canonical")
    refuses(tmp_path, "port", *arguments, saying=("--dialect",), status=6)
    with_dialect = port(*arguments[:2], Options(to="canonical", dialect=V4))
    assert with_dialect.reason == "exact" and not with_dialect.assumed


def test_metadata_that_says_nothing_is_no_statement(tmp_path, canonical):
    for number, said in enumerate([{}, {"parameters": "{}"}, {"parameters": '{"streams": 4, "dim": 8}'}]):
        source = tmp_path / f"{number}.safetensors"
        save_file(load_file(canonical), source, metadata={"format": "mhc-canonical/1", **said})
        arguments = (source, tmp_path / "out.safetensors", "--to", "canonical")
        refuses(tmp_path, "port", *arguments, saying=("--dialect",), status=6)


@pytest.mark.parametrize("which", ["canonical", "ported"])
def test_a_parameter_that_nobody_knows_leaves_the_function_unknown(tmp_path, request, which):
    """A later version of this project may have more of them."""
    key = "mhc_port" if which == "ported" else "parameters"
    source = restated(request.getfixturevalue(which), tmp_path / "s.safetensors", lambda p: p.update(gate_power=2), key)
    for more in ((), ("--assume",), ("--allow-partial",)):
        arguments = (source, tmp_path / "out.safetensors", "--to", "canonical", *more)
        refuses(tmp_path, "port", *arguments, saying=("gate_power", "--dialect"), status=6)
    assert "not known" in call("inspect", source).stdout
    assert port(source, tmp_path / "o.safetensors", Options(to="canonical", dialect=V4)).reason == "exact"


@pytest.mark.parametrize("form", ["mhc-canonical/2", "mhc-canonical/1.1", "another"])
def test_a_format_that_nobody_knows_is_not_read_as_this_one(tmp_path, canonical, form):
    source = tmp_path / "s.safetensors"
    save_file(load_file(canonical), source, metadata={**metadata(canonical), "format": form})
    done = call("port", source, tmp_path / "out.safetensors", "--to", "canonical")
    assert done.exit_code in (2, 6) and form in done.stderr, f"{done.exit_code}: {done.output}"


@pytest.mark.parametrize("change", [{"streams": 2, "dim": 16}, {"streams": 8, "dim": 4}, {"dim": 16}, {"streams": 5}])
def test_sizes_that_contradict_the_tensors_are_named(tmp_path, canonical, change):
    source = restated(canonical, tmp_path / "s.safetensors", lambda p: p.update(change))
    arguments = (source, tmp_path / "out.safetensors", "--to", "canonical")
    refuses(tmp_path, "port", *arguments, saying=("s.safetensors", "n = 4, C = 8"), status=2)


@pytest.mark.parametrize("which", ["canonical", "transformer-engine", "note"])
def test_norm_weights_that_are_stated_and_all_gone_are_missing(tmp_path, which):
    """With any one of them missing the others tell; with all of them gone the statement does."""
    source = write_canonical(
        tmp_path / "source.safetensors", random_sites(2, STREAMS, DIM, norm=True), "maxtext,reduce=none"
    )
    if which == "transformer-engine":
        port(source, tmp_path / "te.safetensors", Options(to="transformer-engine", to_dialect="maxtext,reduce=none"))
        source = tmp_path / "te.safetensors"
    elif which == "note":
        port(source, tmp_path / "again.safetensors", Options(to="canonical"))
        source = tmp_path / "again.safetensors"
    bare = restated(source, tmp_path / "s.safetensors", lambda p: None, "mhc_port" if which != "canonical" else
                    "parameters", without="norm")  # fmt: skip
    arguments = (bare, tmp_path / "out.safetensors", "--to", "canonical")
    refuses(tmp_path, "port", *arguments, saying=("norm weight",), status=7)
    partial = port(*arguments[:2], Options(to="canonical", allow_partial=True))
    assert partial.verdict == "partial" and "norm weight" in partial.reason, partial.reason
