"""Tensors as TransformerEngine's mHC functions take them: x is [seq, batch, C, n], so the flat index is c*n + i."""

from conformance.porter.layout import Layout, Packed

LAYOUT = Layout(
    name="transformer-engine",
    summary=(
        "tensors as its functions take them, safetensors or `.pt`: `phi` with its flat axis dim first, "
        "`alpha`, `beta`, `norm_weight`"
    ),
    source="TransformerEngine, pytorch/triton/mhc.py; it has functions, no module: the prefixes are ours",
    dialect="transformer-engine",
    flat="dim-first",
    norm="optional",
    anchors=("phi",),
    company=True,
    paired=False,
    rows=(
        Packed("phi", ("pre_alpha", "post_alpha", "res_alpha"), "m k"),
        Packed("alpha", ("pre_alpha_scale", "post_alpha_scale", "res_alpha_scale"), "m"),
        Packed("beta", ("pre_beta", "post_beta", "res_beta"), "1 m"),
        Packed("norm_weight", ("mhc_norm.scale",), "k", optional=True),
    ),
    names={
        ("layers", "attention"): ("layers.{layer}.attention.", "{any}{layers}.{layer}.{attention}."),
        ("layers", "ffn"): ("layers.{layer}.ffn.", "{any}{layers}.{layer}.{ffn}."),
        ("mtp", "attention"): ("mtp.{layer}.attention.",),
        ("mtp", "ffn"): ("mtp.{layer}.ffn.",),
        ("", ""): ("",),
    },
)
