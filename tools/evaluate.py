#!/usr/bin/env python3
"""Evaluate a model: `python tools/evaluate.py --model MODEL --perplexity NAME=FILE --task gsm8k=FILE`."""

import os
import sys

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, imported next, otherwise warns that it guessed this

from megatron_slm.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
