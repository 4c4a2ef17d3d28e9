"""Modules written by hand, for the tests of `hlo`."""

from __future__ import annotations

SUM = """%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %added = f32[]{:T(128)} add(%a, %b)
}"""
BIG = "f32[1024,128]{1,0:T(8,128)}"
BIG_BYTES = 1024 * 128 * 4


def module(entry: str, *computations: str) -> str:
    """The text of a module whose entry has these lines."""
    body = "\n".join(f"  {line.strip()}" for line in entry.strip().splitlines())
    return "\n\n".join(["HloModule m", *computations, f"ENTRY %main () -> f32[] {{\n{body}\n}}", ""])


LESS = """%less (s: (s32[], f32[1024,128])) -> pred[] {
  %s = (s32[]{:T(128)}, f32[1024,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %stop = s32[]{:T(128)} constant(5)
  ROOT %go = pred[]{:T(512)} compare(%i, %stop), direction=LT
}"""
BODY = """%body (s: (s32[], f32[1024,128])) -> (s32[], f32[1024,128]) {
  %s = (s32[]{:T(128)}, f32[1024,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %one = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)S(6)} add(%i, %one)
  %x = f32[1024,128]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %y = f32[1024,128]{1,0:T(8,128)} copy(%x)
  ROOT %t = (s32[]{:T(128)}, f32[1024,128]{1,0:T(8,128)}) tuple(%next, %y)
}"""
STATE = f"(s32[]{{:T(128)}}, {BIG})"


def loop(start: int, condition: str = LESS, step: int = 1, stated: str = "") -> str:
    """A loop that copies an array in every round."""
    return module(
        f"""%x = {BIG} parameter(0)
        %begin = s32[]{{:T(128)}} constant({start})
        %state = {STATE} tuple(%begin, %x)
        ROOT %end = {STATE} while(%state), condition=%less, body=%body{stated}""",
        condition,
        BODY.replace("STEP", str(step)),
    )
