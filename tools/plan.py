#!/usr/bin/env python3
"""Plan a run before renting GPUs: `python tools/plan.py {layout,search,schedule} ...`."""

from megatron_slm.cli.commands import plan

if __name__ == "__main__":
    plan()
