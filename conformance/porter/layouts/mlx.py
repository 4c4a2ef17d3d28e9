"""Models of mlx-lm and mlx-vlm, as they write them; both also read the released names, the layout ``deepseek``."""

from conformance.porter.layout import Layout
from conformance.porter.layouts.deepseek import LAYOUT as DEEPSEEK
from conformance.porter.layouts.deepseek import ROWS

LEADS = ("model.", "language_model.model.")
"""Starts of names in mlx-lm, and in mlx-vlm, whose models have a vision part too."""

LAYOUT = Layout(
    name="mlx",
    summary=(
        "`deepseek_v41` of mlx-lm, `deepseek_v4` and `glm5_next` of mlx-vlm: `model.layers.N.attn_hc.fn`, with the "
        "head as `model.hc_head.fn`"
    ),
    source="mlx-lm 0.32.2, models/deepseek_v41.py; mlx-vlm 0.7.10, models/deepseek_v4 and models/glm5_next",
    dialect="deepseek-v4",
    rank=1,
    rows=ROWS,
    head=DEEPSEEK.head,
    names={
        ("layers", "attention"): tuple(f"{lead}layers.{{layer}}.attn_hc." for lead in LEADS),
        ("layers", "ffn"): tuple(f"{lead}layers.{{layer}}.ffn_hc." for lead in LEADS),
        ("", "head"): tuple(f"{lead}hc_head." for lead in LEADS),
    },
    models={
        "deepseek_v4": "deepseek-v4",
        "deepseek_v41": "deepseek-v4.1",
        "deepseek_v41_text": "deepseek-v4.1",
        "glm5_next": "glm-5",
        "glm5_next_text": "glm-5",
    },
    leads={"glm-5": "language_model.model."},  # mlx-vlm's GLM-5 renames nothing that starts with model.layers
)
