"""A checkpoint with missing tensors, an unknown function or unknown names is never ported as exact."""

from __future__ import annotations

import fnmatch
import re
import string

import pytest

pytest.importorskip("hypothesis", reason="hypothesis, of the extra 'regenerate', is not installed")

from hypothesis import assume, given
from hypothesis import strategies as st

from conformance.cases import dialects as rows
from conformance.cli.port import prefixes
from conformance.porter.configuration import OTHERS
from conformance.porter.errors import PortError
from conformance.porter.layouts import layouts
from conformance.porter.port import Options, port
from conformance.porter.storage.stacks import Stacks
from tests.conformance.porter.layout_rows import deepseek, transformers
from tests.conformance.porter.misread import (
    DIM,
    MISREAD,
    STREAMS,
    V4,
    V41,
    glm5,
    sites,
    wrapped,
    write_file,
    write_model,
    write_tree,
)
from tests.conformance.porter.porter_data import HEADED, differences, random_sites, read_sites, write_canonical
from tests.conformance.porter.test_port_properties import directory, examples
from tests.conformance.porter.test_port_wrapped import FLAT, model_of, tensors_in

STATED = {
    "deepseek": (V4, lambda: deepseek(sites(3, True), STREAMS, DIM)),
    "transformers": (V4, lambda: transformers(sites(3, True), STREAMS, DIM)),
    "deepseek-v4.1": ({"model_type": "deepseek_v41", **V41}, lambda: deepseek(sites(3, False), STREAMS, DIM)),
    "glm-5": ({"model_type": "glm5_next", **V41}, lambda: glm5(sites(3, False))),
}
"""Whole models, and configurations that say what they are and how many layers they have."""


def ends(source, target, **options):
    """How a port ended: its verdict, or the status of the error."""
    try:
        report = port(source, target, Options(to="canonical", **options))
    except PortError as error:
        return error.status, str(error)
    return report.verdict, report.reason


def assert_not_called_whole(home, source, said):
    for options in ({}, {"assume": True}, {"dry_run": True}, {"allow_approximate": True}):
        status, reason = ends(source, home / "there.safetensors", **options)
        assert status in (2, 7), f"{said}, {options}: {status}, {reason}"
        assert not (home / "there.safetensors").exists()
    allowed = {"allow_partial": True, "allow_approximate": True, "assume": True}
    status, reason = ends(source, home / "there.safetensors", **allowed)
    assert status in (2, "partial"), f"{said}, allowed: {status}, {reason}"


@pytest.mark.parametrize("name", STATED)
@given(data=st.data())
@examples(60)
def test_without_some_of_its_tensors_a_stated_model_is_never_exact(name, data):
    config, made = STATED[name]
    whole = made()
    lost = data.draw(st.lists(st.sampled_from(sorted(whole)), min_size=1, max_size=len(whole), unique=True))
    with directory() as home:
        source = write_model(home / "source", {k: v for k, v in whole.items() if k not in lost}, config)
        assert_not_called_whole(home, source, f"without {', '.join(lost)}")


SITES_OF = {
    "a layer in the middle": r"layers\.1\.",
    "the first layer": r"layers\.0\.",
    "the last layer": r"layers\.2\.",
    "all but the first layer": r"layers\.[12]\.",
    "every attention site": r"attn",
    "every ffn site": r"ffn",
    "an attention site": r"layers\.1\..*attn",
    "the last ffn site": r"layers\.2\..*ffn",
    "the head": r"hc_head",
    "every layer": r"layers\.",
}


@pytest.mark.parametrize("lost", SITES_OF)
@pytest.mark.parametrize("name", STATED)
def test_whole_sites_that_are_missing_are_noticed_too(tmp_path, name, lost):
    """No tensor is half there: only what a model of its kind must have tells."""
    config, made = STATED[name]
    kept = {k: v for k, v in made().items() if not re.search(SITES_OF[lost], k)}
    if len(kept) == len(made()) or not kept:
        pytest.skip(f"a model of {name} has no such thing")
    source = write_model(tmp_path / "source", kept, config)
    assert_not_called_whole(tmp_path, source, lost)


@pytest.mark.parametrize("name", STATED)
def test_they_are_exact_as_they_are(tmp_path, name):
    config, made = STATED[name]
    source = write_model(tmp_path / "source", made(), config)
    assert ends(source, tmp_path / "there.safetensors") == ("exact", "exact")


KNOWN_KINDS = {kind for layout in layouts().values() for kind in layout.models}


@given(
    kind=st.one_of(
        st.text(min_size=1, max_size=20),
        st.builds(lambda base, more: base + more, st.sampled_from(sorted(KNOWN_KINDS)), st.text("_vt45.x", min_size=1)),
        st.builds(str.upper, st.sampled_from(sorted(KNOWN_KINDS))),
    ),
    inner=st.booleans(),
    names=st.sampled_from(["deepseek", "transformers"]),
)
@examples(80)
def test_any_model_type_that_nobody_knows_has_no_verdict(kind, inner, names):
    assume(kind not in KNOWN_KINDS and not any(kind.startswith(other) for other in OTHERS))
    known = "deepseek_v41"
    config = {"model_type": known, "text_config": {**V41, "model_type": kind}} if inner else {**V4, "model_type": kind}
    with directory() as home:
        source = write_model(home / "source", STATED[names][1](), config)
        for options in ({}, {"assume": True}, {"allow_partial": True, "allow_approximate": True}, {"dry_run": True}):
            status, reason = ends(source, home / "there.safetensors", **options)
            assert status == 6 and "is not known" in reason and "--dialect" in reason, f"{kind!r}: {status}, {reason}"
        if not inner:
            assert ends(source, home / "there.safetensors", dialect="deepseek-v4") == ("exact", "exact")


WORD = st.text(string.ascii_lowercase + "_", min_size=1, max_size=8)
KEYS = st.one_of(
    st.builds("hc_{}".format, WORD), st.builds("mhc_{}".format, WORD), st.builds("{}_mhc_{}".format, WORD, WORD),
    st.builds("{}_hyper_connection{}".format, WORD, WORD), st.builds("hyperconnection{}".format, WORD),
)  # fmt: skip


@pytest.mark.parametrize("name", STATED)
@given(key=KEYS, value=st.one_of(st.booleans(), st.integers(0, 3), st.floats(0, 1), WORD), inner=st.booleans())
@examples(40)
def test_any_key_of_hyper_connections_that_nobody_knows_has_no_verdict(name, key, value, inner):
    config, made = STATED[name]
    base = layouts()["transformers"].models[config["model_type"]]
    software = rows.configuration(base)
    assume(not any(fnmatch.fnmatchcase(key, pattern) for pattern in (*software.keys, *software.fixed, "mhc_port")))
    text = {"glm5_next": "glm5_next_text", "deepseek_v41": "deepseek_v41_text"}.get(config["model_type"])
    inside = {**config, key: value, "model_type": text}
    changed = {"model_type": config["model_type"], "text_config": inside} if inner and text else {**config, key: value}
    with directory() as home:
        source = write_model(home / "source", made(), changed)
        for options in ({}, {"assume": True}, {"allow_partial": True}):
            status, reason = ends(source, home / "there.safetensors", **options)
            assert status == 6 and key in reason, f"{key} = {value!r}: {status}, {reason}"
        assert ends(source, home / "there.safetensors", dialect=base)[0] == "exact"


OFFER = re.compile(r"--from (\S+)((?: --from-names '[^']+')+)")


def offered(message):
    """The options that an error proposes, as `port` takes them."""
    match = OFFER.search(message)
    assert match, f"nothing is proposed: {message}"
    return {"source_layout": match[1], "source_names": prefixes(re.findall(r"'([^']+)'", match[2]))}


LEAD = st.text(string.ascii_lowercase, min_size=3, max_size=8).filter(lambda word: word not in ("layer", "block"))
RENAMED = {
    "deepseek": lambda name, lead, word: name.replace("layers.", f"{lead}.{word}.").replace(
        "hc_head_", f"{lead}.hc_head_"
    ),
    "transformers": lambda name, lead, word: name.replace("model.layers.", f"{lead}.{word}.").replace(
        "model.hc_head.", f"{lead}.{word}_head."
    ),
    "canonical": lambda name, lead, word: re.sub(r"^layers\.(\d+)\.", rf"{lead}.{word}.\1.", name).replace(
        "head.head_", f"{lead}.collect.head_"
    ),
    "megatron": lambda name, lead, word: re.sub(
        r"decoder\.layers\.(\d+)\.(\w+)_hyper_connection", rf"{lead}.{word}.\1.\2_mixer", name
    ).replace("decoder.hc_head_", f"{lead}.{word}.hc_head_"),
    "liger": lambda name, lead, word: re.sub(r"^layers\.(\d+)\.", rf"{lead}.{word}.\1.", name),
    "mlx": lambda name, lead, word: name.replace("model.layers.", f"{lead}.{word}.").replace(
        "model.hc_head.", f"{lead}.{word}.hc_head."
    ),
    "xing": lambda name, lead, word: name.replace("model.layers.", f"{lead}.{word}."),
    "hunyuan": lambda name, lead, word: name.replace("model.layers.", f"{lead}.{word}.").replace(
        "model.hc_head.", f"{lead}.{word}."
    ),
    "paddlefleet": lambda name, lead, word: RENAMED["megatron"](name, lead, word),
    "transformer-engine": lambda name, lead, word: re.sub(
        r"^layers\.(\d+)\.(attention|ffn)", rf"{lead}.{word}.\1.\2_hc", name
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", RENAMED)
@given(lead=LEAD, word=LEAD, seed=st.integers(0, 2**32), layers=st.integers(1, 3))
@examples(25)
def test_names_that_no_layout_has_are_7_and_the_proposal_ports_them(layout, lead, word, seed, layers):
    drawn = {"seed": seed, "streams": 4, "dim": 8, "layers": layers, "norm": False, "head": layout in HEADED}
    tensors, dialect = model_of(layout, drawn)
    with directory() as home:
        plain = tensors_in(home, layout, tensors, dialect)
        renamed = {RENAMED[layout](name, lead, word): value for name, value in plain.items()}
        assert len(renamed) == len(plain) and not renamed.keys() & plain.keys()
        source = write_file(home / "renamed", renamed)
        for options in ({}, {"assume": True}, {"allow_partial": True}, {"dialect": dialect}):
            status, reason = ends(source, home / "there.safetensors", **options)
            assert status == 7 and any(name in reason for name in renamed), f"{options}: {status}, {reason}"
        options = offered(reason)
        ended = ends(source, home / "there.safetensors", dialect=dialect, to_dialect=dialect, **options)
        assert ended == ("exact", "exact"), f"{options}: {ended}"
        assert differences(read_sites(home / "there.safetensors"), tensors) == [], options


@given(lead=LEAD, word=LEAD, layers=st.integers(1, 3), head=st.booleans())
@examples(6)
def test_leaves_of_a_tree_under_names_that_no_layout_has_are_7_too(lead, word, layers, head):
    pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint, of the extra 'orbax', is not installed")
    drawn = {"seed": 4, "streams": 3, "dim": 4, "layers": layers, "norm": True, "head": head}
    tensors, dialect = model_of("maxtext", drawn)
    with directory() as home:
        plain = tensors_in(home, "maxtext", tensors, dialect, stacks=Stacks.parse("unscanned"))
        renamed = {
            re.sub(r"decoder/layers_(\d+)/", rf"{lead}/{word}_\1/", name).replace(
                "decoder/hc_head", f"{lead}/hc_head"
            ): v
            for name, v in plain.items()
        }
        source = write_tree(home / "renamed", renamed)
        for options in ({}, {"assume": True}, {"allow_partial": True}, {"dialect": dialect}):
            status, reason = ends(source, home / "there.safetensors", **options)
            assert status == 7 and any(name in reason for name in renamed), f"{options}: {status}, {reason}"
        options = offered(reason)
        ended = ends(source, home / "there.safetensors", dialect=dialect, to_dialect=dialect, **options)
        assert ended == ("exact", "exact"), f"{options}: {ended}"
        assert differences(read_sites(home / "there.safetensors"), tensors) == [], options


@pytest.mark.parametrize("layout", [name for name in FLAT if name in RENAMED])
def test_some_names_that_no_layout_has_are_counted_beside_those_that_are_known(tmp_path, layout):
    """A layer under another word: the rest is there, and would be exact."""
    drawn = {"seed": 1, "streams": 4, "dim": 8, "layers": 3, "norm": False, "head": layout in HEADED}
    tensors, dialect = model_of(layout, drawn)
    plain = tensors_in(tmp_path, layout, tensors, dialect)
    renamed = {
        RENAMED[layout](name, "tower", "storey") if re.search(r"layers\.2\.", name) else name: value
        for name, value in plain.items()
    }
    source = write_file(tmp_path / "renamed", renamed)
    assert_not_called_whole(tmp_path, source, layout)
    status, reason = ends(source, tmp_path / "a.safetensors", dialect=dialect, assume=True)
    assert status == 7 and "tower.storey.2" in reason, reason
    status, reason = ends(source, tmp_path / "a.safetensors", dialect=dialect, allow_partial=True)
    assert status == "partial" and re.match(r"partial: \d+ of \d+ tensors", reason), reason


def test_multi_token_prediction_that_a_layout_has_no_name_for_is_named(tmp_path):
    """DeepSeek's files have a layer and a head of it; transformers leaves them out."""
    tensors = {**deepseek(sites(3, True), STREAMS, DIM), **predicted(1)}
    config = {**V4, "num_nextn_predict_layers": 1}
    source = write_model(tmp_path / "source", tensors, config)
    kept = port(source, tmp_path / "kept.safetensors", Options(to="canonical"))
    assert kept.reason == "exact" and kept.ported_tensors == len(tensors) == 30
    for to in ("liger", "transformer-engine"):
        with pytest.raises(PortError) as raised:
            port(source, tmp_path / "out.safetensors", Options(to=to, to_dialect="deepseek-v4"))
        assert raised.value.status == 7 and "mtp.0.head" in str(raised.value), str(raised.value)
        allowed = Options(to=to, to_dialect="deepseek-v4", allow_partial=True, allow_approximate=True)
        report = port(source, tmp_path / f"{to}.safetensors", allowed)
        assert report.verdict == "partial" and "of 30 tensors" in report.reason, report.reason


def predicted(layers):
    """Hyper-connections of so many layers of multi-token prediction, each with a head."""
    one_layer = deepseek(random_sites(5, STREAMS, DIM, layers=1, head=True), STREAMS, DIM)
    tensors = {}
    for layer in range(layers):
        tensors |= wrapped(wrapped(one_layer, "layers.0", f"mtp.{layer}"), "hc_head_", f"mtp.{layer}.hc_head_")
    return tensors


@pytest.mark.parametrize(
    "layers, stated, lost, ended",
    [
        (1, 1, None, "exact"), (2, 2, None, "exact"), (0, 1, None, "exact"), (1, 1, r"mtp\.0\.hc_head", 7),
        (1, 1, r"mtp\.0\.hc_attn", 7), (1, 1, r"mtp\.0\.hc_ffn", 7), (2, 2, r"mtp\.1\.hc_head", 7),
        (2, 2, r"mtp\.0\.", 7), (2, 2, r"mtp\.1\.", 7),
    ],
)  # fmt: skip
def test_parts_of_multi_token_prediction_that_are_missing_are_noticed(tmp_path, layers, stated, lost, ended):
    """All of it may be missing: transformers leaves it out."""
    tensors = {**deepseek(sites(3, True), STREAMS, DIM), **predicted(layers)}
    kept = {name: value for name, value in tensors.items() if not (lost and re.search(lost, name))}
    source = write_model(tmp_path / "source", kept, {**V4, "num_nextn_predict_layers": stated})
    status, reason = ends(source, tmp_path / "there.safetensors")
    assert status == ended, f"{status}, {reason}"
    if ended == 7:
        assert_not_called_whole(tmp_path, source, lost)


@pytest.mark.parametrize("lost", ["every attention site", "every ffn site", "every layer", "the head"])
@pytest.mark.parametrize("name", ["deepseek", "transformers"])
def test_a_model_type_alone_says_what_a_model_must_have(tmp_path, name, lost):
    config, made = STATED[name]
    kept = {k: v for k, v in made().items() if not re.search(SITES_OF[lost], k)}
    bare = {"model_type": config["model_type"]}
    assert_not_called_whole(tmp_path, write_model(tmp_path / "source", kept, bare), lost)


@pytest.mark.parametrize("key, value", [("hc_mult", 2.0), ("hc_mult", "2"), ("hc_mult", True), ("hc_mult", 5),
                                        ("hidden_size", 16)])  # fmt: skip
def test_a_size_that_is_stated_otherwise_is_no_exact_port(tmp_path, key, value):
    config, made = STATED["deepseek"]
    source = write_model(tmp_path / "source", made(), {**config, key: value})
    status, reason = ends(source, tmp_path / "there.safetensors", assume=True)
    assert status in (2, 6), f"{key} = {value!r}: {status}, {reason}"
    assert "config.json" in reason, reason


@pytest.mark.parametrize("stated, there, status", [(3, 3, "exact"), (3, 4, "exact"), (3, 2, 7), (3, 5, 7), (2, 4, 7)])
def test_layers_of_multi_token_prediction_may_count_as_layers(tmp_path, stated, there, status):
    """GLM-5 numbers it as the layer after the last."""
    config = {"model_type": "glm5_next", **V41, "num_hidden_layers": stated, "num_nextn_predict_layers": 1}
    source = write_model(tmp_path / "source", glm5(sites(there, False)), config)
    assert ends(source, tmp_path / "there.safetensors")[0] == status


def test_a_canonical_file_without_its_head_lacks_it(tmp_path):
    """Its metadata is a statement as a config.json is."""
    source = write_canonical(tmp_path / "source.safetensors", sites(3, False), "deepseek-v4")
    status, reason = ends(source, tmp_path / "a.safetensors")
    assert status == 7 and "head is missing" in reason
    partial = port(source, tmp_path / "partial.safetensors", Options(to="canonical", allow_partial=True))
    assert partial.verdict == "partial" and "the head is missing" in partial.reason
    assert ends(tmp_path / "partial.safetensors", tmp_path / "b.safetensors")[0] == 7, "still partial"
    none = "deepseek-v4,reduce=none"
    assert ends(source, tmp_path / "c.safetensors", dialect=none) == ("exact", "exact")


def test_the_cases_are_stated_or_assumed_as_they_should():
    assert {name for name, case in MISREAD.items() if not case.assumed} == {
        "deepseek-v4.1", "deepseek-v4.1-text-config", "glm-5", "deepseek-v4"
    }  # fmt: skip
