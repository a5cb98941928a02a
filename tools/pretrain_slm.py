#!/usr/bin/env python3
"""Train selectively (or plainly): `deepspeed --num_gpus N tools/pretrain_slm.py --config FILE [flags]`."""

import contextlib
import os
import sys

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, imported next, otherwise warns that it guessed this

from megatron_slm.cli.pretrain import main

if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as stop:  # --help
        code = int(stop.code or 0)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a log on a full disk does not make the run a failed one
            stream.flush()
    # Past the interpreter's teardown: now and then a communication library's thread is still alive there, which
    # ends a finished run with "terminate called without an active exception" and a wrong exit code.
    os._exit(code)
