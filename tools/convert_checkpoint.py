#!/usr/bin/env python3
"""Convert between checkpoints and Hugging Face folders.

`python tools/convert_checkpoint.py {import,export,verify,inspect}`.
"""

from megatron_slm.cli.commands import convert

if __name__ == "__main__":
    convert()
