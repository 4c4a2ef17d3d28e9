"""Every dialect is accepted, every combination that no layer can have is refused; the same in both packages."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re

import pytest

from tests.parity.signatures import PACKAGES, ROOT
from tests.parity.tables import DIALECTS

INVALID = [
    ({"streams": 0}, "streams must be an integer of at least 1"),
    ({"streams": True}, "streams"),
    ({"dim": 0}, "dim must be"),
    ({"dim": 2.0}, "dim must be"),
    ({"iterations": 0}, "iterations must be"),
    ({"iterations": 10_001}, "iterations must be at most 10000, got 10001"),
    ({"guard": "maybe", "eps": 1e-6}, "guard must be one of none, add, denominator, clip"),
    ({"order": "diagonal"}, "order must be one of"),
    ({"softmax": "both"}, "softmax must be one of rows, columns, none"),
    ({"residual": "cayley"}, "residual must be one of"),
    ({"norm_eps_position": "after"}, "norm_eps_position"),
    ({"mix": "sideways"}, "mix must be one of"),
    ({"reduce": "max"}, "reduce must be one of"),
    ({"coefficients": "int8"}, "coefficients must be one of"),
    ({"norm_weight": 1}, "norm_weight must be True or False"),
    ({"norm_eps": -1e-6}, "norm_eps must be a finite non-negative"),
    ({"pre_eps": float("nan")}, "pre_eps must be"),
    ({"post_eps": float("inf")}, "post_eps must be"),
    ({"post_eps": 10**400}, "post_eps must be a finite non-negative"),
    ({"post_scale": 0.0}, "post_scale must be a finite positive"),
    ({"eps": 1e-6}, "eps must be 0 with guard 'none'"),
    ({"guard": "add"}, "eps must be 0 with guard 'none' and positive"),
    ({"residual": "permutations", "streams": 6}, "streams must be at most 5"),
    ({"residual": "permutations", "iterations": 20}, "iterations must be None"),
    ({"residual": "identity", "guard": "add", "eps": 1e-6}, "guard, eps must be None"),
    ({"mix": "identity"}, "mix='identity' goes with residual='identity'"),
    ({"residual": "identity", "mix": "in-out"}, "mix='identity' goes with"),
    ({"coefficients": "activation", "mixing": "float32"}, "mixing must be 'activation'"),
    (
        {"softmax": "none", "guard": "add", "eps": 1e-6},
        "guard='add' adds eps to a softmax, and softmax='none' has none",
    ),
    ({"residual": "identity", "softmax": "rows"}, "softmax must be None"),
    ({"residual": "identity", "logit_limit": 30.0}, "logit_limit must be None"),
    ({"logit_limit": 0}, "logit_limit must be a finite positive"),
    ({"head_norm_eps": -1.0}, "head_norm_eps must be a finite non-negative"),
    ({"matrix": "activation"}, "it goes with residual='sinkhorn' and coefficients='activation'"),
    ({"reduction": "int8"}, "reduction must be one of float32, activation"),
    ({"pre_from": "next"}, "pre_from must be one of own, previous"),
    ({"reduce": "carried"}, "reduce='carried' goes with pre_from='previous' alone"),
    ({"pre_from": "previous", "reduce": "sum"}, "reduce='carried' goes with pre_from='previous' alone"),
    ({"pre_from": "previous", "coefficients": "activation"}, "coefficients must be 'float32' where pre_from"),
]


@pytest.mark.parametrize("changes, said", INVALID)
def test_an_invalid_combination_is_refused_by_name(backend, unchecked, changes, said):
    with pytest.raises(ValueError, match=said):
        backend.package.MHCConfig(**{"streams": 4, "dim": 8, **changes})


def test_defaults_are_the_paper(backend):
    assert backend.package.MHCConfig(streams=4, dim=8) == backend.package.MHCConfig.from_dialect(
        "paper", streams=4, dim=8
    )


def test_a_parameter_that_is_left_out_follows_from_the_others(backend):
    """The softmax is along the axis that comes first, and a single-pass stack reduces with what it carried."""
    for order, softmax in (("rows-first", "rows"), ("columns-first", "columns")):
        assert backend.package.MHCConfig(streams=4, dim=8, order=order).softmax == softmax
    assert backend.package.MHCConfig(streams=4, dim=8, pre_from="previous").reduce == "carried"
    assert backend.package.MHCConfig(streams=4, dim=8, coefficients="activation").mixing == "activation"
    assert backend.package.MHCConfig(streams=4, dim=8, residual="identity").mix == "identity"


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_is_a_configuration_and_survives_its_own_parameters(backend, name):
    config = backend.package.MHCConfig.from_dialect(name, streams=4, dim=8)
    assert backend.package.MHCConfig.from_parameters(config.parameters()) == config
    assert hash(config) == hash(backend.package.MHCConfig.from_parameters(config.parameters()))


def test_unknown_dialects_and_parameters_are_named(backend):
    with pytest.raises(ValueError, match=r"dialect must be one of paper.*got 'nobody'"):
        backend.package.MHCConfig.from_dialect("nobody", streams=4, dim=8)
    with pytest.raises(ValueError, match=r"unknown \['typo'\]"):
        backend.package.MHCConfig.from_dialect("paper", streams=4, dim=8, typo=1)


def test_both_packages_hold_the_same_text():
    """Tables, defaults, rules, properties and their documentation: neither file may be changed alone."""
    for module in ("config.py", "version.py"):
        texts = {package: (ROOT / package / module).read_text() for package in PACKAGES}
        assert texts["jax_impl"] == texts["torch_impl"], module
    texts = {p: (ROOT / p / "metadata.py").read_text().replace(f"from {p}.", "from ") for p in PACKAGES}
    assert texts["jax_impl"] == texts["torch_impl"], "metadata.py"


def test_every_parameter_is_documented_in_its_own_entry(backend):
    """A field's entry names the values that it may have, and its own None."""
    config = backend.package.MHCConfig
    text = inspect.getdoc(config) or ""
    arguments = text.partition("Args:\n")[2].partition("\n\n")[0]
    entries = dict(re.findall(r"^    (\w+): ((?:.*\n?)(?:^        .*\n?)*)", arguments, re.M))
    fields = {field.name: field for field in dataclasses.fields(config)}
    assert list(entries) == list(fields)
    choices = importlib.import_module(f"{backend.package.__name__}.config").CHOICES
    for name, entry in entries.items():
        said = " ".join(entry.split())
        missing = [value for value in choices.get(name, ()) if f'``"{value}"``' not in said]
        assert not missing, f"{name}: {missing} missing from {said!r}"
        if "None" in str(fields[name].type):
            assert "None" in said, name
