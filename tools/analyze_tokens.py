#!/usr/bin/env python3
"""Show kept tokens and their losses: `python tools/analyze_tokens.py {selection,dynamics} --load RUN ...`."""

from megatron_slm.cli.commands import analyze

if __name__ == "__main__":
    analyze()
