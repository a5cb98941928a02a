#!/usr/bin/env python3
"""Show corpora and the samples that a run makes of them: counts, documents, samples as training reads them; hashes."""

import sys

from megatron_slm.cli.inspect_data import main

if __name__ == "__main__":
    sys.exit(main())
