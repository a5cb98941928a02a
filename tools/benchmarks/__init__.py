"""The benchmarks that `tools/benchmark.py` runs."""
