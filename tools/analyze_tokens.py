#!/usr/bin/env python3
"""Look at tokens: `tools/analyze_tokens.py {selection,dynamics} --load RUN --text-file FILE --output PAGE.html`."""

import os
import sys

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, imported next, otherwise warns that it guessed this

from megatron_slm.cli.analyze_tokens import main

if __name__ == "__main__":
    sys.exit(main())
