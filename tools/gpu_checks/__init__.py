"""Checks of the parts that depend on a GPU; `tools/gpu_check.py` runs them."""
