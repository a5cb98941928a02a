#!/usr/bin/env python3
"""What checkpoints there are, and whether they are whole: `python tools/checkpoint.py {list,verify} FOLDER`."""

import sys

from megatron_slm.cli.checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
