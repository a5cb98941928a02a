#!/usr/bin/env python3
"""Tokenize text into Megatron's .bin/.idx corpora: `python tools/preprocess_data.py --input FILE ...`."""

from megatron_slm.cli.commands import preprocess

if __name__ == "__main__":
    preprocess()
