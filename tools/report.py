#!/usr/bin/env python3
"""Report runs side by side, as a page and a picture: `python tools/report.py RUN [RUN ...]`."""

import sys

from megatron_slm.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
