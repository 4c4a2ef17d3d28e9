"""The tables that tests are parametrised over, read from the source: neither framework is needed to collect them."""

from __future__ import annotations

import ast
import json

from tests.parity.signatures import ROOT

DIALECTS = {
    name: {key: entry["value"] for key, entry in row["parameters"].items()}
    for name, row in json.loads((ROOT / "fixtures" / "dialects.json").read_text())["dialects"].items()
}
_TREE = ast.parse((ROOT / "jax_impl" / "config.py").read_text())  # both packages have this text (test_config)
CHOICES = next(
    ast.literal_eval(node.value)
    for node in _TREE.body
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CHOICES"
)
PARAMETERS = [
    field.target.id
    for node in _TREE.body
    if isinstance(node, ast.ClassDef)
    for field in node.body
    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.target.id != "_"
]
SINKHORN = [name for name, row in DIALECTS.items() if row["residual"] == "sinkhorn"]
