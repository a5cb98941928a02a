#!/usr/bin/env python3
"""List and verify checkpoints: `python tools/checkpoint.py {list,verify} FOLDER`."""

from megatron_slm.cli.commands import checkpoint

if __name__ == "__main__":
    checkpoint()
