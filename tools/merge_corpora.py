#!/usr/bin/env python3
"""Put corpora end to end into one, with their loss masks and sidecars."""

import sys

from megatron_slm.cli.merge_corpora import main

if __name__ == "__main__":
    sys.exit(main())
