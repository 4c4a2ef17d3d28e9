"""Hunyuan V4's independent hyper-connections: H is the identity, so that fn has 2n rows and scale two entries."""

from conformance.porter.layout import Layout
from conformance.porter.layouts.deepseek import LAYOUT as DEEPSEEK
from conformance.porter.layouts.deepseek import ROWS

SITES = {
    "attention": ("hc_attn_layer.hc_pre.hc_", "hc_pre.hc_attn_layer.hc_", "attn_hc."),
    "ffn": ("hc_mlp_layer.hc_pre.hc_", "hc_pre.hc_mlp_layer.hc_", "ffn_hc."),
}
"""As released and in mlx-vlm; as ``save_pretrained`` of transformers writes it; as transformers names its modules."""

LAYOUT = Layout(
    name="hunyuan",
    summary=(
        "Hunyuan V4: the released names, `model.layers.N.hc_attn_layer.hc_pre.hc_fn`, and `hy_v4` of transformers, "
        "`model.layers.N.attn_hc.fn`, also as its `save_pretrained` writes it"
    ),
    source="transformers 5.23, hy_v4 and conversion_mapping.py, which reads all three; mlx-vlm 0.7.10, hy_v4",
    dialect="hunyuan-v4",
    residuals=frozenset({"identity"}),
    rows=ROWS,
    head=DEEPSEEK.head,
    names={
        **{
            ("layers", kind): tuple(f"{lead}layers.{{layer}}.{site}" for lead in ("model.", "") for site in sites)
            for kind, sites in SITES.items()
        },
        ("", "head"): (
            "model.hc_head.hc_head_",
            "model.hc_pre.hc_head.hc_head_",
            "model.hc_head.hc_",
            "hc_head.hc_head_",
            "hc_head.hc_pre.hc_head_",
            "hc_head.hc_",
        ),
    },
    models={"hy_v4": "hunyuan-v4", "hy_v4_vl": "hunyuan-v4"},
)
