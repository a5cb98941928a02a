#!/usr/bin/env python3
"""Concatenate corpora: `python tools/merge_corpora.py --input PREFIX ... --output-prefix PREFIX`."""

from megatron_slm.cli.commands import merge_corpora

if __name__ == "__main__":
    merge_corpora()
