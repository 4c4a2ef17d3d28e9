"""Production sizes: fresh data from a counter-based generator, a truth in float64, and the same rule."""
