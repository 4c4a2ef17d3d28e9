"""State dicts of ``LigerMHC``, on their own or inside a model."""

from conformance.porter.layout import Layout, Packed

LAYOUT = Layout(
    name="liger",
    summary=("state dicts of `LigerMHC`, safetensors or `.pt`: `phi`, `b`, `alpha_pre`, `alpha_post`, `alpha_res`"),
    source="liger-kernel 0.8.5, transformers/mhc.py",
    dialect="liger",
    anchors=("phi",),
    company=True,
    paired=False,
    rows=(
        Packed("phi", ("pre_alpha", "post_alpha", "res_alpha"), "k m"),
        Packed("b", ("pre_beta", "post_beta", "res_beta"), "m"),
        Packed("alpha_pre", ("pre_alpha_scale",), ""),
        Packed("alpha_post", ("post_alpha_scale",), ""),
        Packed("alpha_res", ("res_alpha_scale",), ""),
    ),
    names={
        ("layers", "attention"): ("layers.{layer}.attention.", "{any}{layers}.{layer}.{attention}."),
        ("layers", "ffn"): ("layers.{layer}.ffn.", "{any}{layers}.{layer}.{ffn}."),
        ("mtp", "attention"): ("mtp.{layer}.attention.",),
        ("mtp", "ffn"): ("mtp.{layer}.ffn.",),
        ("", ""): ("",),
    },
)
