#!/usr/bin/env python3
"""Plan a layout before it is run: `python tools/plan.py schedule --stages 4 --micro-batches 8 --png schedule.png`."""

import sys

from megatron_slm.pipeline.plan_command import main

if __name__ == "__main__":
    sys.exit(main())
