"""The schema, `conformance.cases.dialects.check` and both configurations take the same rows and refuse the same.

A row is whole where every parameter is stated. A configuration gives defaults for some that are absent or null, so it
takes a row as it stands where it gives back the same parameters.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

pytest.importorskip("hypothesis", reason="hypothesis, of the extra 'regenerate', is not installed")

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from conformance.cases import rules as reading
from conformance.cases.dialects import SILENT, DialectError, check, check_sizes, completed, dialect_names, dialect_rows
from conformance.cases.dialects import configuration as configuration_of
from conformance.cases.rules import domains, rules
from conformance.files.places import fixtures
from conformance.porter.errors import PortError
from conformance.porter.layouts import layout_named
from conformance.porter.port import Options, port
from tests.conformance.cases.rows import WILD, changed, sound, value_of
from tests.conformance.porter.porter_data import LAYOUTS, random_sites, sizes, write_canonical

SIZES = {"streams": 4, "dim": 8}
JUDGES = ["schema", "torch_impl", "jax_impl"]


def examples(count: int) -> Any:
    phases = (Phase.generate, Phase.shrink)
    return settings(deadline=None, derandomize=True, max_examples=count, database=None, phases=phases)


def refused(call: Callable[[], Any]) -> bool:
    """Whether a call raises ValueError; anything else that it raises is a mistake."""
    try:
        call()
    except ValueError:
        return True
    return False


def accepts(judge: str) -> Callable[[dict[str, Any]], bool]:
    """How the schema or an implementation's configuration judges a row."""
    if judge == "schema":
        return lambda row: validator().is_valid(
            {"dialects": {"row": {"summary": "x", "evidence": {"ran": "x"}, "parameters": sourced(row)}}}
        )
    config = configuration(judge)

    def accepted(row: dict[str, Any]) -> bool:
        try:
            return config.from_parameters({**row, **SIZES}).parameters() == {**row, **SIZES}
        except ValueError:
            return False

    return accepted


def configuration(framework: str) -> Any:
    pytest.importorskip(framework.removesuffix("_impl"), reason=f"{framework} needs its framework, not installed here")
    return importlib.import_module(f"{framework}.config").MHCConfig


def sourced(row: dict[str, Any]) -> dict[str, Any]:
    return {name: {"value": value, "source": "a test"} for name, value in row.items()}


@functools.cache
def validator(definition: str = "") -> Any:
    """Of the whole schema, or of one of its definitions."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads((fixtures() / "dialects.schema.json").read_text())
    # JSON has one kind of number, neither NaN nor infinity; Python reads 2.0 and NaN, and no loop runs 2.0 times.
    kinds = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine_many({
        "integer": lambda _, value: type(value) is int,
        "number": lambda _, value: type(value) is int or (type(value) is float and math.isfinite(value)),
    })  # fmt: skip
    made = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=kinds)
    return made({"$ref": f"#/$defs/{definition}", "$defs": schema["$defs"]} if definition else schema)


@pytest.mark.parametrize("judge", JUDGES)
def test_every_published_row_is_accepted(judge):
    accepted = accepts(judge)
    assert [name for name, row in dialect_rows().items() if not accepted(row)] == []


@pytest.mark.parametrize("judge", JUDGES)
def test_all_accept_every_sound_row(judge):
    accepted = accepts(judge)

    @given(row=sound())
    @examples(300)
    def run(row: dict[str, Any]) -> None:
        check(row, "row")
        assert accepted(row)

    run()


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("wild", [False, True], ids=["of its domain", "any value"])
def test_all_accept_and_refuse_the_same_rows(judge, wild):
    accepted, seen = accepts(judge), Counter[bool]()

    @given(row=changed(wild))
    @examples(400)
    def run(row: dict[str, Any]) -> None:
        expected = not refused(lambda: check(row, "row"))
        assert accepted(row) == expected, (judge, row)
        seen[expected] += 1

    run()
    assert min(seen[True], seen[False]) > 30, seen


def values_of(name: str) -> list[Any]:
    """Values of a parameter: the smallest set that every rule between parameters shows on."""
    domain = domains()[name]
    if domain.kind == "choice":
        return [*domain.choices, *([None] if domain.nullable else [])]
    return [True, 1] if domain.kind == "boolean" else [0, 0.5, *((2, None) if domain.nullable else ())]


@pytest.mark.parametrize("judge", JUDGES)
def test_each_rule_is_one_for_all_where_no_other_hides_it(judge):
    """Every two parameters of a row of each kind take every value: each rule is broken alone, at each parameter."""
    accepted, alone = accepts(judge), Counter[str]()
    for name in ("paper", "maxtext", "mhc-lite", "deepseek-v4.1", "hunyuan-v4"):
        for first, second in itertools.combinations(domains(), 2):
            for a, b in itertools.product(values_of(first), values_of(second)):
                row = {**dialect_rows()[name], first: a, second: b}
                expected = not refused(lambda row=row: check(row, "row"))
                assert accepted(row) == expected, (name, first, a, second, b)
                if all(domain.holds(row[key]) for key, domain in domains().items()):
                    faults = [rule.said(key) for rule in rules() if (key := rule.broken(row)) is not None]
                    alone.update(faults if len(faults) == 1 else ())
    texts = {rule.said(key) for rule in rules() for key in {*rule.then, *rule.otherwise}}
    assert {text for text in texts if not alone[text]} == set()


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("name", dialect_names())
def test_each_parameter_of_a_published_row_may_take_the_same_values(judge, name):
    accepted, row = accepts(judge), dialect_rows()[name]
    for parameter, domain in domains().items():
        for value in (*WILD, *domain.choices, 1e-6, 3, 10_000):
            other = {**row, parameter: value}
            expected = not refused(lambda other=other: check(other, "row"))
            assert accepted(other) == expected, (parameter, value)
        without = {key: kept for key, kept in row.items() if key != parameter}
        assert refused(lambda without=without: check(without, "row")) and not accepted(without), parameter
    assert not accepted({**row, "gard": "none"}) and refused(lambda: check({**row, "gard": "none"}, "row"))


@pytest.mark.parametrize("framework", ["torch_impl", "jax_impl"])
def test_an_older_file_means_the_same_to_all(framework):
    """Whatever a file leaves unsaid: the implementations state the rule of `completed` themselves."""
    configuration(framework)
    metadata = importlib.import_module(f"{framework}.metadata")

    @given(row=sound(), kept=st.sets(st.sampled_from(list(domains()))))
    @examples(200)
    def run(row: dict[str, Any], kept: set[str]) -> None:
        stated = {name: value for name, value in row.items() if name in kept}
        found = metadata.stated_parameters("file", {"parameters": json.dumps(stated)})
        assert found == completed(stated)

    run()
    assert metadata.SILENT == SILENT


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("name", ["paper", "mhc-lite", "hunyuan-v4"])
def test_sizes_are_the_same_for_all(judge, name):
    row = dialect_rows()[name]
    kind = "permuted_sizes" if row["residual"] == "permutations" else "sizes"
    config: Any = None if judge == "schema" else configuration(judge)

    def accepted(asked: dict[str, Any]) -> bool:
        if config is None:
            return validator(kind).is_valid(asked)
        return not refused(lambda: config.from_parameters({**row, **asked}))

    for streams in (*WILD, 2, 5, 6, 12):
        for dim in (*WILD, 7):
            found = refused(lambda s=streams, d=dim: check_sizes(s, d, row["residual"], "row"))
            assert accepted({"streams": streams, "dim": dim}) != found, (streams, dim)


def test_what_breaks_a_rule_is_named():
    for rule in rules():
        assert rule.text and {*rule.when, *rule.then, *rule.otherwise} <= set(domains())
    row = dialect_rows()["deepseek-v4"]
    for changes, said in (
        ({"order": None}, "row: order belongs to residual=sinkhorn and must be given for it, got order=null"),
        ({"guard": "none"}, "row: eps must be 0 with guard=none and positive with any other, got eps=1e-06"),
        (
            {"matrix": "activation"},
            "row: matrix=activation needs coefficients=activation and residual=sinkhorn, got coefficients='float32'",
        ),
    ):
        with pytest.raises(DialectError) as raised:
            check({**row, **changes}, "row")
        assert str(raised.value) == said


FLAT = tuple(name for name in LAYOUTS if name != "maxtext")
MODELS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "residual": st.sampled_from(["sinkhorn", "sinkhorn", "permutations", "identity"]),
        "streams": st.integers(1, 5),
        "dim": st.sampled_from([1, 3, 8]),
        "layers": st.integers(1, 2),
        "norm": st.booleans(),
        "head": st.booleans(),
    }
)


@st.composite
def told(draw: st.DrawFn, residual: str) -> str | dict[str, Any] | None:
    """A target's dialect: none, a whole row, or a published one with changes, which may be no row."""
    form = draw(st.integers(0, 3))
    if form == 0:
        return None
    if form == 1:
        return draw(sound(residual=draw(st.sampled_from([residual, residual, "sinkhorn"]))))
    names = [name for name, row in dialect_rows().items() if row["residual"] == residual]
    changes = ""
    for name in draw(st.lists(st.sampled_from(list(domains())), max_size=3, unique=True)):
        value = draw(value_of(domains()[name]))
        changes += f",{name}={'null' if value is None else str(value).lower()}"
    return draw(st.sampled_from(names)) + changes


def frameworks() -> list[Any]:
    """Those that are installed."""
    found = [name for name in ("torch_impl", "jax_impl") if importlib.util.find_spec(name.removesuffix("_impl"))]
    if not found:
        pytest.skip("neither framework is installed")
    return [importlib.import_module(name) for name in found]


def assert_taken(path: Path, sites: dict[str, Any], packages: list[Any]) -> None:
    """What the file states is a whole configuration for each, and its weights load under it."""
    with safe_open(path, framework="numpy") as file:
        stated = json.loads(file.metadata()["parameters"])
    check({name: value for name, value in stated.items() if name not in SIZES}, "written")
    assert (stated["streams"], stated["dim"]) == sizes(sites)
    for package in packages:
        config = package.MHCConfig.from_parameters(stated)
        assert config.parameters() == stated
        for site in sites:
            if site != "head":
                package.load_weights(path, config, f"{site}.")


def test_both_configurations_take_what_the_porter_writes():
    """From any layout, under any dialect that a port is told."""
    packages, done = frameworks(), Counter[str]()

    @given(model=MODELS, through=st.sampled_from([None, *FLAT]), data=st.data())
    @examples(200)
    def run(model: dict[str, Any], through: str | None, data: st.DataObject) -> None:
        sites = random_sites(**model)
        row = data.draw(sound(residual=model["residual"], norm=model["norm"]), label="source")
        target = data.draw(told(model["residual"]), label="target")
        with tempfile.TemporaryDirectory() as home:
            folder = Path(home)
            (folder / "row.json").write_text(json.dumps(row))
            source = write_canonical(folder / "source.safetensors", sites, str(folder / "row.json"))
            if isinstance(target, dict):
                (folder / "target.json").write_text(json.dumps(target))
                target = str(folder / "target.json")
            held: dict[str, Any] = {"allow_approximate": True, "to_dialect": target}
            try:
                if through:
                    port(source, folder / "through.safetensors", Options(to=through, **held))
                    source = folder / "through.safetensors"
                port(source, folder / "written.safetensors", Options(to="canonical", **held))
            except PortError:
                done["refused"] += 1
                return
            done["written"] += 1
            assert_taken(folder / "written.safetensors", sites, packages)

    run()
    assert done["written"] > 60 and done["refused"] > 10, done


@pytest.mark.parametrize("layout, model_type", [("deepseek", "deepseek_v4"), ("transformers", "deepseek_v4")])
def test_both_configurations_take_what_a_config_json_sets(layout, model_type):
    row = layout_named(layout).models[model_type]
    keys = [key for key, names in configuration_of(row).keys.items() if names != ("streams",)]
    packages, done = frameworks(), Counter[str]()
    values = st.one_of(st.sampled_from([1e-6, 1e-5, 1, 20]), st.sampled_from([v for v in WILD if v is not None]))

    @given(changes=st.dictionaries(st.sampled_from(sorted(keys)), values, max_size=2))
    @examples(100)
    def run(changes: dict[str, Any]) -> None:
        sites = random_sites(seed=1, streams=2, dim=3, layers=1, head=True)
        with tempfile.TemporaryDirectory() as home:
            folder = Path(home)
            source = write_canonical(folder / "source.safetensors", sites, "deepseek-v4")
            port(source, folder / "model", Options(to=layout, to_dialect="deepseek-v4"))
            config = {"model_type": model_type, "hc_mult": 2, "num_hidden_layers": 1, **changes}
            (folder / "model" / "config.json").write_text(json.dumps(config))
            try:
                port(folder / "model", folder / "written.safetensors", Options(to="canonical"))
            except PortError:
                done["refused"] += 1
                return
            done["written"] += 1
            assert_taken(folder / "written.safetensors", sites, packages)

    run()
    assert min(done["written"], done["refused"]) > 15, done


def test_a_rule_that_cannot_be_read_is_not_passed_over(monkeypatch):
    said = {"description": "", "if": {"properties": {"mix": {"properties": {"value": {"minimum": 1}}}}}}
    for rule in (
        {"if": said["if"], "then": said["if"]},
        {**said, "then": {"required": ["mix"]}},
        {**said, "then": {"properties": {"mix": {"properties": {"value": {}}, "type": "object"}}}},
        {**said, "then": said["if"], "anyOf": []},
    ):
        monkeypatch.setattr(reading, "schema", lambda rule=rule: {"$defs": {"rules": {"allOf": [rule]}}})
        with pytest.raises(NotImplementedError, match=r"a rule of dialects.schema.json must"):
            reading.rules.__wrapped__()
    with pytest.raises(NotImplementedError, match=r"minimum in a rule of dialects.schema.json isn't known here"):
        reading.allows({"minimum": 1}, 2)
