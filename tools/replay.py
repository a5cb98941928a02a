#!/usr/bin/env python3
"""Look again at bad batches: `deepspeed --num_gpus N tools/replay.py RUN_DIR/bad_batches.jsonl[:STEPS] [flags]`."""

import os
import sys

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, imported next, otherwise warns that it guessed this

from megatron_slm.cli.replay import main

if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as stop:  # --help
        code = int(stop.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # past the interpreter's teardown, as in pretrain_slm.py
