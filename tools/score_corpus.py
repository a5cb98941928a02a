#!/usr/bin/env python3
"""Store a reference's losses: `deepspeed --num_gpus N tools/score_corpus.py --config FILE --output STORE [flags]`."""

import os
import sys

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, imported next, otherwise warns that it guessed this

from megatron_slm.cli.score import main

if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as stop:  # --help
        code = int(stop.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # past the interpreter's teardown, as in pretrain_slm.py
