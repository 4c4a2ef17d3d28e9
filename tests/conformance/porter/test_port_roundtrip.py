"""Weights come back from every pair of layouts with the same bits, and every report says so."""

from __future__ import annotations

import itertools

import pytest
from safetensors.numpy import save_file

from conformance.porter.port import Options, port
from tests.conformance.porter.porter_data import (
    HEADED,
    IDENTITY,
    NORMED,
    SINKHORN,
    differences,
    random_sites,
    read_sites,
    read_tensors,
    with_ones,
    write_canonical,
)

PAIRS = list(itertools.product(SINKHORN, SINKHORN))
DIM = 3


def place(directory, name, layout):
    return directory / {"maxtext": name, "gguf": f"{name}.gguf"}.get(layout, f"{name}.safetensors")


def there_and_back(directory, source, first, second, dialect):
    """canonical -> first -> second -> first; the reports and the two checkpoints in the layout ``first``.

    The same dialect is said to hold on both sides of every port.
    """
    reports, paths = [], [source]
    for name, layout in (("first", first), ("second", second), ("again", first)):
        paths.append(place(directory, name, layout))
        reports.append(port(paths[-2], paths[-1], Options(to=layout, dialect=dialect, to_dialect=dialect)))
    return reports, paths[1], paths[3]


def assert_all_exact(reports):
    for report in reports:
        said = f"{report.source_layout} to {report.target_layout}: {report.reason}"
        assert report.verdict == "exact" and report.reason.startswith("exact"), said
        assert report.rounding == 0 and set(report.largest.values()) == {0.0}, (said, report.largest)


def require(*layouts):
    if "gguf" in layouts:
        pytest.importorskip("gguf", reason="gguf, of the extra 'gguf', is not installed")
    if "maxtext" in layouts:
        pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("first, second", PAIRS)
def test_a_layout_comes_back_bit_for_bit_by_way_of_any_other(tmp_path, first, second, streams):
    require(first, second)
    head = {first, second} <= HEADED
    sites = random_sites(100 * streams + len(first + second), streams, DIM, layers=2, head=head)
    dialect = f"deepseek-v4,reduce={'head' if head else 'none'}"
    source = write_canonical(tmp_path / "source.safetensors", sites, dialect)
    reports, before, after = there_and_back(tmp_path, source, first, second, dialect)
    assert_all_exact(reports)
    assert [r.left_out for r in reports] == [[], [], []] and all(r.sites == 4 + head for r in reports)
    assert differences(read_tensors(after), read_tensors(before)) == []
    assert differences(read_sites(after), with_ones(sites) if first == "maxtext" else sites) == []


@pytest.mark.parametrize("first, second", [pair for pair in PAIRS if set(pair) <= NORMED])
def test_a_norm_weight_comes_back_bit_for_bit(tmp_path, first, second):
    require(first, second)
    for streams in (1, 2, 3, 4, 5):
        directory = tmp_path / str(streams)
        directory.mkdir()
        sites = random_sites(streams, streams, DIM, layers=3, norm=True)
        source = write_canonical(directory / "source.safetensors", sites, "maxtext")
        reports, before, after = there_and_back(directory, source, first, second, "maxtext")
        assert_all_exact(reports)
        assert differences(read_tensors(after), read_tensors(before)) == []
        assert differences(read_sites(after), sites) == []


@pytest.mark.parametrize(
    "first, second, dialect",
    [
        *((*pair, "mhc-lite") for pair in itertools.product(("canonical", "maxtext"), repeat=2)),
        *((*pair, "hunyuan-v4") for pair in itertools.product(IDENTITY, repeat=2)),
    ],
)
def test_other_residual_matrices_come_back_bit_for_bit(tmp_path, first, second, dialect):
    require(first, second)
    residual, norm = {"mhc-lite": ("permutations", True), "hunyuan-v4": ("identity", False)}[dialect]
    for streams in (1, 2, 3, 4, 5):
        directory = tmp_path / str(streams)
        directory.mkdir()
        sites = random_sites(streams, streams, DIM, residual=residual, norm=norm, head=not norm)
        source = write_canonical(directory / "source.safetensors", sites, dialect)
        reports, before, after = there_and_back(directory, source, first, second, dialect)
        assert_all_exact(reports)
        assert differences(read_tensors(after), read_tensors(before)) == []
        assert differences(read_sites(after), sites) == []


@pytest.mark.parametrize(
    "layout, prefix",
    [
        ("canonical", "layers.0.attention."),
        ("liger", "layers.0.attention."),
        ("megatron", "decoder.layers.0.self_attention_hyper_connection."),
        ("transformer-engine", "layers.0.attention."),
    ],
)
def test_a_module_on_its_own_comes_back_bit_for_bit(tmp_path, layout, prefix):
    sites = random_sites(7, 4, DIM, layers=1, kinds=("attention",))
    model, alone, back = (tmp_path / f"{name}.safetensors" for name in ("model", "alone", "back"))
    source = write_canonical(tmp_path / "source.safetensors", sites)
    there = port(source, model, Options(to=layout, dialect="paper", to_dialect="paper"))
    save_file({name.removeprefix(prefix): value for name, value in read_tensors(model).items()}, alone)
    again = port(alone, back, Options(to="canonical", dialect="paper", to_dialect="paper"))
    assert_all_exact([there, again])
    assert differences(read_sites(back), {"site": sites["layers.0.attention"]}) == []


@pytest.mark.parametrize(
    "dialect", ["liger", "megatron", "transformer-engine", "glm-5", "maxtext-v1,order=columns-first"]
)
def test_what_is_held_fixed_may_be_any_dialect(tmp_path, dialect):
    sites = random_sites(3, 4, DIM)
    source = write_canonical(tmp_path / "source.safetensors", sites, dialect)
    for layout in SINKHORN:
        if layout == "maxtext":
            continue
        require(layout)
        directory = tmp_path / layout
        directory.mkdir()
        held = dialect if layout in NORMED else f"{dialect},norm_weight=false"
        report = port(source, place(directory, "there", layout), Options(to=layout, dialect=held, to_dialect=held))
        back = Options(to="canonical", dialect=held, to_dialect=f"{dialect},norm_weight=false")
        again = port(place(directory, "there", layout), directory / "again.safetensors", back)
        assert_all_exact([report, again])
        assert differences(read_sites(directory / "again.safetensors"), sites) == []
