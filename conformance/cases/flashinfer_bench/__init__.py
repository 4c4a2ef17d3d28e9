"""Golden cases as a data set of FlashInfer-Bench, which compares and times kernels (docs/kernel-benchmarks.md)."""
