#!/usr/bin/env python3
"""Between our checkpoints and Hugging Face folders: import, export, verify, inspect."""

import sys

from megatron_slm.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
