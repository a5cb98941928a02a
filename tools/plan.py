#!/usr/bin/env python3
"""Plan a run before it is rented: `python tools/plan.py layout --config run.yaml --nodes 2 --gpu h100`.

`search` proposes layouts that fit, `schedule` shows what the pipeline's schedules cost.
"""

import sys

from megatron_slm.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
