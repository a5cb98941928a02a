#!/usr/bin/env python3
"""Train a SentencePiece BPE tokenizer of Llama's kind from JSON lines."""

import sys

from megatron_slm.cli.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
