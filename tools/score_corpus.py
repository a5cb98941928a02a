#!/usr/bin/env python3
"""Store a reference's losses.

`deepspeed --num_gpus N tools/score_corpus.py --config FILE --output STORE [flags]`.
"""

from megatron_slm.cli.commands import score

if __name__ == "__main__":
    score()
