#!/usr/bin/env python3
"""Tokenize text into Megatron's .bin/.idx corpora: `python tools/preprocess_data.py --input FILE ...`."""

import os
import sys

# A worker is one core: no threads of tokenizers, nor of NumPy, whose idle ones make malloc slower too.
os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

from megatron_slm.cli.preprocess import main

if __name__ == "__main__":
    sys.exit(main())
