"""Telling which function an implementation computes, from what it returns.

`forward` evaluates a layer, right or with one of the usual mistakes; `candidates` lists the functions that are tried;
`ranking` finds the nearest ones; `precision` says where narrow dtypes are rounded; `words` says it all in English.
"""
