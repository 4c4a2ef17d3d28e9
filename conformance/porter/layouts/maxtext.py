"""MaxText's Orbax tree; `storage.stacks` splits and stacks scanned layers."""

from conformance.porter.layout import Layout, Packed
from conformance.porter.layouts import canonical

LAYOUT = Layout(
    name="maxtext",
    summary=(
        "an Orbax checkpoint, `params/params/decoder/layers/mhc_attention/pre_alpha`, scanned (`--stacks "
        "layers`) or not (`--stacks unscanned`)"
    ),
    source="MaxText (August 2026), layers/mhc.py and the checkpoint converters of DeepSeek-V4",
    dialect="maxtext",
    norm="always",
    residuals=frozenset({"sinkhorn", "permutations"}),
    containers=("orbax",),
    stacked=True,
    rows=tuple(Packed(row.name.replace(".", "/"), row.parts, row.axes) for row in canonical.LAYOUT.rows),
    head=(
        Packed("hc_fn", ("head_fn",), "k m"),
        Packed("hc_base", ("head_base",), "m"),
        Packed("hc_scale", ("head_scale",), "m"),
    ),
    names={
        ("layers", "attention"): (
            "params/params/decoder/layers_{layer}/mhc_attention/",
            "{any}decoder/layers_{layer}/mhc_attention/",
        ),
        ("layers", "ffn"): (
            "params/params/decoder/layers_{layer}/mhc_mlp/",
            "{any}decoder/layers_{layer}/mhc_mlp/",
        ),
        ("", "head"): ("params/params/decoder/hc_head/", "{any}decoder/hc_head/"),
    },
)
