"""Commands: one a file; `tools/*.py` and the console scripts are shims over them."""
