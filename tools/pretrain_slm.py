#!/usr/bin/env python3
"""Train selectively (or plainly): `deepspeed --num_gpus N tools/pretrain_slm.py --config FILE [flags]`."""

from megatron_slm.cli.commands import pretrain

if __name__ == "__main__":
    pretrain()
