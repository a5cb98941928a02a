#!/usr/bin/env python3
"""Print corpora and training samples: `python tools/inspect_data.py --data-path PREFIX ...`."""

from megatron_slm.cli.commands import inspect_data

if __name__ == "__main__":
    inspect_data()
