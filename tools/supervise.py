#!/usr/bin/env python3
"""Start a training again when it fails: `python tools/supervise.py -- deepspeed ... tools/pretrain_slm.py ...`."""

import sys

from megatron_slm.cli.supervise import main

if __name__ == "__main__":
    sys.exit(main())
