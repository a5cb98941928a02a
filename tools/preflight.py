#!/usr/bin/env python3
"""Check the machines of a run before it: `deepspeed --hostfile FILE tools/preflight.py --config run.yaml`."""

import os
import sys

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, imported next, otherwise warns that it guessed this

from megatron_slm.cli.preflight import main

if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as stop:  # --help
        code = int(stop.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as in pretrain_slm.py
