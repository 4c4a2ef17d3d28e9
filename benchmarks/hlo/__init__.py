"""What a compiled program moves, read from the text of its optimised HLO: to memory (`traffic`), between devices
(`collectives`). Text in, figures out; no framework is imported."""
