"""A site's time and memory beside those of other implementations of the same function (`python -m benchmarks`)."""
