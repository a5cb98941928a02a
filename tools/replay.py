#!/usr/bin/env python3
"""Run bad batches again: `deepspeed --num_gpus N tools/replay.py RUN_DIR/bad_batches.jsonl[:STEPS] [flags]`."""

from megatron_slm.cli.commands import replay

if __name__ == "__main__":
    replay()
