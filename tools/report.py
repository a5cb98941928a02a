#!/usr/bin/env python3
"""Compare runs in a page and a picture: `python tools/report.py RUN [RUN ...]`."""

from megatron_slm.cli.commands import report

if __name__ == "__main__":
    report()
