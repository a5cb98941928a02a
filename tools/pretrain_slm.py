#!/usr/bin/env python3
"""Train selectively (or plainly): `deepspeed --num_gpus N tools/pretrain_slm.py --config FILE [flags]`."""

import sys

from megatron_slm.training.main import main

if __name__ == "__main__":
    sys.exit(main())
