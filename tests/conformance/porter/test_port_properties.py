"""In every layout and container exact ports are bitwise, and no weight is off by more than the report says."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis", reason="hypothesis, of the extra 'regenerate', is not installed")

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from conformance.porter.port import Options, port
from conformance.porter.storage.stacks import Stacks
from tests.conformance.porter.porter_data import (
    DTYPES,
    HEADED,
    NORMED,
    ROUNDOFF,
    SINKHORN,
    differences,
    folded,
    largest_error,
    random_sites,
    rationals,
    read_sites,
    with_ones,
    write_canonical,
)

FLAT = tuple(layout for layout in SINKHORN if layout not in ("maxtext", "gguf"))
FORMS = ("there.safetensors", "there", "there.pt")
MODELS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "streams": st.integers(1, 5),
        "dim": st.sampled_from([1, 2, 3, 8, 17]),
        "layers": st.integers(1, 3),
        "dtype": st.sampled_from(list(DTYPES)),
        "norm": st.booleans(),
        "head": st.booleans(),
    }
)


def examples(count):
    phases = (Phase.generate, Phase.shrink)
    return settings(deadline=None, derandomize=True, max_examples=count, database=None, phases=phases)


@contextmanager
def directory():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def require_torch(form):
    if form.endswith(".pt"):
        pytest.importorskip("torch", reason="torch is not installed")


def fixed(model, norm):
    """One dialect for both sides: that of DeepSeek-V4 with what the model has of head and norm weight."""
    reduce = "head" if model["head"] else "none"
    return f"deepseek-v4,reduce={reduce},norm_weight={'true' if norm else 'false'}"


def assert_exact(*reports):
    assert {(r.verdict, r.rounding, *set(r.largest.values())) for r in reports} == {("exact", 0.0, 0.0)}


@pytest.mark.parametrize("form", FORMS)
@given(model=MODELS, layout=st.sampled_from(FLAT), shard_bytes=st.sampled_from([1, 100, 3000, 10**9]))
@examples(40)
def test_files_directories_and_state_dicts_keep_every_bit(form, model, layout, shard_bytes):
    require_torch(form)
    model = {**model, "norm": model["norm"] and layout in NORMED, "head": model["head"] and layout in HEADED}
    dialect, sites = fixed(model, model["norm"]), random_sites(**model)
    with directory() as home:
        source = write_canonical(home / "source.safetensors", sites, dialect)
        held: dict[str, Any] = {"dialect": dialect, "to_dialect": dialect}
        there = port(source, home / form, Options(to=layout, shard_bytes=shard_bytes, read_back=True, **held))
        if form == "there" and shard_bytes == 1:
            assert len(list(home.glob("there/*.safetensors"))) == len(there.tensors)
        again = port(home / form, home / "again.safetensors", Options(to="canonical", **held))
        assert_exact(there, again)
        assert differences(read_sites(home / form), sites) == []
        assert differences(read_sites(home / "again.safetensors"), sites) == []


@given(model=MODELS, residual=st.sampled_from(["sinkhorn", "identity"]))
@examples(40)
def test_a_gguf_file_keeps_every_bit_that_float32_has(model, residual):
    pytest.importorskip("gguf", reason="gguf, of the extra 'gguf', is not installed")
    model, wide = {**model, "norm": False}, model["dtype"] == "float64"
    dialect = fixed(model, False)
    if residual == "identity":
        dialect = f"hunyuan-v4,reduce={'head' if model['head'] else 'none'}"
    sites = random_sites(**model, residual=residual)
    with directory() as home:
        source = write_canonical(home / "source.safetensors", sites, dialect)
        options = Options(to="gguf", dialect=dialect, to_dialect=dialect, read_back=True)
        report = port(source, home / "there.gguf", options)
        read = read_sites(home / "there.gguf")
        assert_rounded_as_reported(report, read, rationals(sites), "float32", twice=False)
        narrowed = {site: {k: v.astype("float32") for k, v in weights.items()} for site, weights in sites.items()}
        assert differences(read, narrowed) == [] and (wide or report.verdict == "exact")


def stacks_for(layers):
    """Every kind of stack that so many layers fill."""
    choices = ["layers", "unscanned", "scanned_blocks"]
    if layers >= 2:
        choices += ["unscanned:1,moe_layers", "dense_layers:1,unscanned", "dense_layers:1,moe_layers"]
    if layers % 2 == 0:
        choices += ["scanned_blocks/2"]
    if layers >= 3 and layers % 2:
        choices += ["unscanned:1,scanned_blocks/2", "dense_layers:1,scanned_blocks/2"]
    return choices


@given(model=MODELS, axis=st.sampled_from([0, 1]), data=st.data())
@examples(60)
@pytest.mark.slow
def test_scanned_layers_keep_every_bit(model, axis, data):
    pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    model["layers"] = data.draw(st.integers(1, 5), label="layers")
    stacks = data.draw(st.sampled_from(stacks_for(model["layers"])), label="stacks")
    dialect, sites = fixed(model, True), random_sites(**model)
    with directory() as home:
        source = write_canonical(home / "source.safetensors", sites, dialect)
        held: dict[str, Any] = {"dialect": dialect, "to_dialect": dialect}
        options = Options(to="maxtext", stacks=Stacks.parse(stacks), scan_axis=axis, read_back=True, **held)
        there = port(source, home / "there", options)
        again = port(home / "there", home / "again.safetensors", Options(to="canonical", **held))
        assert_exact(there, again)
        expected = sites if model["norm"] else with_ones(sites)
        assert differences(read_sites(home / "there"), expected) == []
        assert differences(read_sites(home / "again.safetensors"), expected) == []


def assert_rounded_as_reported(report, actual, exact, dtype, twice):
    """The true error of every weight, in rationals, against the report's, which is a float64.

    Args:
        twice: a float64 product or quotient was rounded to a narrower dtype: 2**-53 comes to the measured rounding.
    """
    error = largest_error(actual, exact)
    allowed = report.rounding * (1 + 2.0**-50) + (2.0**-53 if twice else 0.0)
    assert error <= allowed, f"a weight is off by {float(error):.3g}, and the report says {report.rounding:.3g}"
    assert report.rounding <= ROUNDOFF[dtype]
    if error:
        assert report.verdict == "exact to rounding", report.reason
    else:
        assert (report.verdict, report.rounding) == ("exact", 0)


def assert_folds_within_the_report(model, source, home, sites, dtype=None):
    """The port of ``sites``, which have a norm weight, to one of DeepSeek's."""
    report = port(
        source, home / "folded.safetensors",
        Options(to="deepseek", dialect=fixed(model, True), to_dialect=fixed(model, False), dtype=dtype),
    )  # fmt: skip
    read, stored = read_sites(home / "folded.safetensors"), dtype or model["dtype"]
    assert {v.dtype for w in read.values() for v in w.values()} == {DTYPES[stored]}
    twice = model["dtype"] == "float64" != stored
    assert_rounded_as_reported(report, read, folded(sites), stored, twice)


@pytest.mark.parametrize("dtype", DTYPES)
@given(model=MODELS)
@examples(12)
def test_a_folded_norm_weight_rounds_no_more_than_reported(dtype, model):
    model = {**model, "norm": True, "layers": min(model["layers"], 2), "dtype": dtype}
    sites = random_sites(**model)
    with directory() as home:
        source = write_canonical(home / "source.safetensors", sites, fixed(model, True))
        assert_folds_within_the_report(model, source, home, sites)


@pytest.mark.parametrize("dtype", DTYPES)
@given(model=MODELS, narrow=st.sampled_from([None, *DTYPES]))
@examples(12)
def test_maxtext_to_deepseek_rounds_no_more_than_reported(dtype, model, narrow):
    pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    model = {**model, "norm": True, "layers": min(model["layers"], 2), "dtype": dtype}
    dialect, sites = fixed(model, True), random_sites(**model)
    with directory() as home:
        canonical = write_canonical(home / "source.safetensors", sites, dialect)
        port(canonical, home / "maxtext", Options(to="maxtext", dialect=dialect, to_dialect=dialect))
        assert_folds_within_the_report(model, home / "maxtext", home, sites, narrow)


@pytest.mark.parametrize("dtype", DTYPES)
@given(model=MODELS, layout=st.sampled_from(FLAT))
@examples(30)
def test_another_dtype_rounds_no_more_than_reported(dtype, model, layout):
    model = {**model, "norm": model["norm"] and layout in NORMED, "head": model["head"] and layout in HEADED}
    model["layers"] = min(model["layers"], 2)
    dialect, sites = fixed(model, model["norm"]), random_sites(**model)
    with directory() as home:
        source = write_canonical(home / "source.safetensors", sites, dialect)
        target = home / "target.safetensors"
        report = port(source, target, Options(to=layout, dialect=dialect, to_dialect=dialect, dtype=dtype))
        read = read_sites(target)
        assert {v.dtype for w in read.values() for v in w.values()} == {DTYPES[dtype]}
        assert_rounded_as_reported(report, read, rationals(sites), dtype, twice=False)
