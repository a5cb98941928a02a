#!/usr/bin/env python3
"""Evaluate a model: `python tools/evaluate.py --model MODEL --perplexity NAME=FILE --task gsm8k=FILE`."""

from megatron_slm.cli.commands import evaluate

if __name__ == "__main__":
    evaluate()
