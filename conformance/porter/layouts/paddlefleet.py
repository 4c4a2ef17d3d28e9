"""PaddleFleet's state dicts: Megatron's names, with the projection as Paddle's linear layers keep it."""

from dataclasses import replace

from conformance.porter.layouts.megatron import LAYOUT as MEGATRON

LAYOUT = replace(
    MEGATRON,
    name="paddlefleet",
    summary="Megatron-LM's names with `mapping_proj.weight` transposed, [n*C, 2n + n*n], safetensors or `.pt`",
    source="PaddleFleet (November 2026), paddlefleet/transformer/hyper_connection.py",
    rows=tuple(
        replace(row, axes="k m") if row.name == "mapping_proj.weight" else row for row in MEGATRON.rows
    ),
)  # fmt: skip
