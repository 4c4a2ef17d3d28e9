"""Xing-4: its files and mlx-vlm's module have the same names; it has no head and takes the mean of the streams."""

from conformance.porter.layout import Layout
from conformance.porter.layouts.deepseek import ROWS

LEADS = ("model.", "language_model.model.", "")
"""Starts of names in the released files, in a whole model of mlx-vlm, and in its text model alone."""

LAYOUT = Layout(
    name="xing",
    summary="Xing-4 as released and in mlx-vlm, `model.layers.N.attn_hc.hc_fn`",
    source="mlx-vlm 0.7.10, models/xing4_0",
    dialect="xing-4",
    rows=ROWS,
    names={
        ("layers", "attention"): tuple(f"{lead}layers.{{layer}}.attn_hc.hc_" for lead in LEADS),
        ("layers", "ffn"): tuple(f"{lead}layers.{{layer}}.ffn_hc.hc_" for lead in LEADS),
    },
    models={"xing4_0": "xing-4"},
)
