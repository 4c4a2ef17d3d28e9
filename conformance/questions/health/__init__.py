"""Whether the hyper-connections of a model are healthy: figures of each site and of all together, and warnings.

`jax_impl.health` and `torch_impl.health` compute the same figures on the device; this is NumPy in float64, by the
formulas of the oracle, so that it needs neither and no rounding hides in it.
"""
