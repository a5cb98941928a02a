#!/usr/bin/env python3
"""Check the machines of a run before it: `deepspeed --hostfile FILE tools/preflight.py --config run.yaml`."""

from megatron_slm.cli.commands import preflight

if __name__ == "__main__":
    preflight()
