#!/usr/bin/env python3
"""Check and measure everything that depends on a GPU, on this machine: `python tools/gpu_check.py [--output FOLDER]`.

Each check runs in processes of its own, with a limit on its time, so that a crash or a hang of one leaves the others
alone. The folder then has gpu_check.json (all figures), gpu_check.md (a page to read) and the output of every check.
Nothing is downloaded. The exit code is 0 if no check failed, else 1.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu_checks.main import main

if __name__ == "__main__":
    sys.exit(main())
