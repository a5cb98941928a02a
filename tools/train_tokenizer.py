#!/usr/bin/env python3
"""Train a SentencePiece tokenizer: `python tools/train_tokenizer.py --input FILE ... --output FOLDER/`."""

from megatron_slm.cli.commands import train_tokenizer

if __name__ == "__main__":
    train_tokenizer()
